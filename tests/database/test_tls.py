"""TLS to a server that has it, and to impostors. The URLs say `localhost`."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal, Self, override
from urllib.parse import urlencode

import pytest
import pytest_asyncio
from certificates import Certificate
from cluster import Cluster
from ports import free_port
from proxy import until
from sqlalchemy import text
from typer.testing import CliRunner, Result

from todo_db import ConfigurationError, Database, Settings, TodoDBError, UnavailableError, doctor
from todo_db.cli import app
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.engine import create_direct_engine
from todo_db.errors import translated
from todo_db.migrations import upgrade

pytestmark = pytest.mark.tls

DATABASE: Final = "todo"
MARKER: Final = "hunter2"
ASKS_FOR_TLS: Final = struct.pack("!ii", 8, 80877103)
ASKS_FOR_PASSWORD: Final = struct.pack("!cii", b"R", 8, 3)
# What a client says in TLS begins with its hello.
HELLO: Final = b"\x16\x03"
ENCRYPTED: Final = ("require", "verify-ca", "verify-full")

type Manner = Literal["passes", "denies", "upgrades", "speaks TLS"]


@dataclass
class Link:
    """One client's connection."""

    heard: bytearray = field(default_factory=bytearray)
    round_trips: int = 0
    protocol: str | None = None
    answered: bool = True


class Between:
    """Stands between client and server, by TCP on this machine, and notes what it hears.

    With a certificate it speaks TLS itself, at once or when it is asked to, and clear text to
    the server. Or it denies that there is TLS, and asks a client that goes on for the password.

    Attributes:
        links: The connections made to it, in their order.
    """

    def __init__(
        self, port: int, manner: Manner = "passes", certificate: Certificate | None = None
    ) -> None:
        self.links: list[Link] = []
        self._server_port = port
        self._manner = manner
        self._preamble = certificate.context() if certificate else None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        context = self._preamble if self._manner == "speaks TLS" else None
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", ssl=context)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.links.append(link := Link())
        writers = [writer]
        try:
            if self._manner == "denies":
                for answer in (b"N", ASKS_FOR_PASSWORD, b""):
                    link.heard += await reader.read(1 << 16)
                    writer.write(answer)
                    await writer.drain()
                return
            if self._manner == "upgrades":
                assert self._preamble is not None
                assert await reader.readexactly(8) == ASKS_FOR_TLS
                writer.write(b"S")
                await writer.start_tls(self._preamble)
            if tls := writer.get_extra_info("ssl_object"):
                link.protocol = tls.selected_alpn_protocol()
            answers, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
            writers.append(to_server)
            ways = [
                asyncio.create_task(self._carry(link, reader, to_server, of_client=True)),
                asyncio.create_task(self._carry(link, answers, writer, of_client=False)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
        except (OSError, asyncio.CancelledError):
            # The client did not like the certificate, or the test is over.
            return
        finally:
            for end in writers:
                end.close()
            for end in writers:
                with suppress(OSError):
                    await end.wait_closed()
            self._tasks.discard(task)

    async def _carry(
        self,
        link: Link,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        *,
        of_client: bool,
    ) -> None:
        with suppress(OSError):
            while piece := await source.read(1 << 16):
                if of_client:
                    link.heard += piece
                    link.round_trips += link.answered
                link.answered = not of_client
                sink.write(piece)
                await sink.drain()


class Server(Cluster):
    """Debian's PostgreSQL, because the wheel's has no OpenSSL, with a certificate for localhost."""

    def __init__(self, port: int, folder: Path, authorities: dict[str, Certificate]) -> None:
        self.port = port
        # It has to reach its certificate.
        folder.chmod(0o755)
        self._roots = {name: folder / f"{name}.pem" for name in authorities}
        for name, authority in authorities.items():
            self._roots[name].write_bytes(authority.pem)
        super().__init__(15, durable=True)
        certificate, key = authorities["ours"].issue("localhost").write(folder, owner=self._user)
        self._settings |= {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "ssl": True,
            "ssl_cert_file": certificate,
            "ssl_key_file": key,
        }

    @override
    def url(self, user: str, database: str) -> str:
        return f"{super().url(user, database)}&port={self.port}"

    def tls_url(  # noqa: PLR0913  # each is one part of it
        self,
        sslmode: str,
        *,
        port: int | None = None,
        root: str | None = "ours",
        user: str = LOGIN,
        database: str = DATABASE,
        host: str = "localhost",
        **query: str,
    ) -> str:
        query |= {"sslmode": sslmode}
        if root is not None:
            query |= {"sslrootcert": str(self._roots[root])}
        place = f"{host}:{port or self.port}"
        return f"postgresql://{user}:{MARKER}@{place}/{database}?{urlencode(query)}"

    async def alone(self) -> None:
        """Wait until the server has ended the connections of the test before."""
        async with asyncio.timeout(30):
            while await self.encrypted():  # noqa: ASYNC110  # nothing sets an event
                await asyncio.sleep(0.01)

    async def encrypted(self) -> list[bool]:
        """Return of each connection of the package whether it is encrypted."""
        connection = await self.connect()
        rows = await connection.fetch(
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            " WHERE application_name = 'todo_db'"
        )
        await connection.close()
        return [row["ssl"] for row in rows]


@pytest.fixture(scope="module")
def authority() -> Certificate:
    return Certificate.authority("ours")


@pytest_asyncio.fixture(scope="module")
async def server(
    authority: Certificate,
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the user that a server runs as
) -> AsyncGenerator[Server]:
    port = free_port()
    with TemporaryDirectory(prefix="todo-db-") as folder:
        authorities = {"ours": authority, "theirs": Certificate.authority("theirs")}
        with Server(port, Path(folder), authorities) as server:
            await server.create_database(DATABASE)
            await upgrade(server.url(OWNER, DATABASE))
            await server.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app")
            yield server


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the doctor take this machine's address for that of another one."""
    monkeypatch.setattr(doctor, "ip_address", lambda _address: ip_address("203.0.113.7"))


@pytest.fixture
def home_root(authority: Certificate, tmp_path: Path) -> None:
    """Have libpq's default file name the authority of the server."""
    root = tmp_path / ".postgresql" / "root.crt"
    root.parent.mkdir()
    root.write_bytes(authority.pem)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .env, no URL and no certificates of the developer's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("DIRECT_DATABASE_URL", raising=False)


async def refused(url: str, **settings: object) -> TodoDBError:
    """Return the error that opening a database ends with, soon."""
    async with asyncio.timeout(15):
        with pytest.raises(TodoDBError) as caught:
            await Database.from_url(url, **settings).open()
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert MARKER not in repr(caught.value)
    return caught.value


def is_encrypted(link: Link) -> bool:
    """Whether the first words were the request for TLS and the hello in it."""
    clear = (LOGIN, OWNER, MARKER, DATABASE, "SELECT", "CREATE")
    return link.heard.startswith(ASKS_FOR_TLS + HELLO) and not any(
        word.encode() in link.heard for word in clear
    )


class TestVerified:
    @pytest_asyncio.fixture(autouse=True)
    async def alone(self, server: Server) -> None:
        await server.alone()

    @pytest.mark.parametrize("sslmode", ["verify-ca", "verify-full"])
    async def test_T2_connects_to_a_server_with_a_certificate_of_the_authority(
        self, server: Server, sslmode: str
    ) -> None:
        async with (
            Between(server.port) as between,
            Database.from_url(server.tls_url(sslmode, port=between.port)) as db,
        ):
            assert await server.encrypted() == [True]
            assert (await db.health()).ok
        assert [is_encrypted(link) for link in between.links] == [True]

    async def test_T2_environment_for_other_clients_takes_nothing_away(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGSSLMODE", "disable")
        async with Database.from_url(server.tls_url("verify-full")):
            assert await server.encrypted() == [True]
        failure = await refused(server.tls_url("verify-full", root="theirs"))
        assert type(failure) is ConfigurationError

    async def test_migrations_and_direct_engines_are_encrypted_too(self, server: Server) -> None:
        await server.create_database("fresh")
        async with Between(server.port) as between:
            url = server.tls_url("verify-full", port=between.port, user=OWNER, database="fresh")
            await upgrade(url)
            await server.alone()
            engine = create_direct_engine(url, Settings())
            async with engine.connect() as connection:
                assert await server.encrypted() == [True]
                assert await connection.scalar(text("SELECT count(*) FROM tasks")) == 0
            await engine.dispose()
        assert [is_encrypted(link) for link in between.links] == [True, True]

    async def test_certificate_of_an_old_authority_will_do(
        self, server: Server, authority: Certificate
    ) -> None:
        certificate = authority.issue("localhost", names_its_authority=False)
        async with (
            Between(server.port, "upgrades", certificate) as between,
            Database.from_url(server.tls_url("verify-full", port=between.port)) as db,
        ):
            assert (await db.health()).ok

    async def test_first_host_of_a_list_that_answers_and_is_verified_is_taken(
        self, server: Server
    ) -> None:
        with socket.socket() as nobody_listens:
            nobody_listens.bind(("127.0.0.1", 0))
            closed: int = nobody_listens.getsockname()[1]
            async with (
                Between(server.port, "upgrades", Certificate.self_signed("localhost")) as impostor,
                Between(impostor.port) as between,
            ):
                hosts = f"localhost:{closed},localhost:{between.port},localhost"
                url = server.tls_url("verify-full", host=hosts, target_session_attrs="read-write")
                async with Database.from_url(url):
                    assert await server.encrypted() == [True]
                assert [bytes(link.heard) for link in impostor.links] == [b""]

    async def test_request_to_cancel_is_encrypted_too(self, server: Server) -> None:
        async with Between(server.port) as between:
            url = server.tls_url("verify-full", port=between.port, connect_timeout="5")
            async with Database.from_url(url, retry_attempts=1) as db:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5), db.transaction("alice") as tx:
                        await tx.execute(text("SELECT pg_sleep(4)"))
                assert (await db.health()).ok
            await until(lambda: len(between.links) > 1)
            await until(lambda: all(map(is_encrypted, between.links)))

    @pytest.mark.parametrize("sslmode", ENCRYPTED)
    async def test_one_context_serves_all_connections(
        self, server: Server, sslmode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = 0
        name = ssl.SSLContext.set_alpn_protocols

        def counted(context: ssl.SSLContext, protocols: list[str]) -> None:
            # asyncpg would do so too, if it made one.
            nonlocal made
            made += 1
            name(context, protocols)

        monkeypatch.setattr(ssl.SSLContext, "set_alpn_protocols", counted)
        async with Database.from_url(server.tls_url(sslmode), pool_size=4, max_overflow=0) as db:
            await asyncio.gather(*(db.tasks.count("alice") for _ in range(20)))
            assert await server.encrypted() == [True] * 4
        assert made == 1


class TestImpostors:
    @pytest.fixture
    def impostors(self, authority: Certificate) -> dict[str, Certificate]:
        return {
            "of another host": authority.issue("db.example.org"),
            "self-signed": Certificate.self_signed("localhost"),
            "ended": authority.issue("localhost", ended=True),
            "of another authority": Certificate.authority("ours").issue("localhost"),
        }

    @pytest.mark.parametrize(
        ("certificate", "sslmode"),
        [
            ("of another host", "verify-full"),
            *product(
                ("self-signed", "ended", "of another authority"),
                # With sslrootcert it means verify-ca, says libpq.
                ENCRYPTED,
            ),
        ],
    )
    async def test_T3_are_refused_once_and_are_told_nothing(
        self, server: Server, impostors: dict[str, Certificate], certificate: str, sslmode: str
    ) -> None:
        async with (
            Between(server.port, "upgrades", impostors[certificate]) as impostor,
            Between(impostor.port) as between,
        ):
            failure = await refused(server.tls_url(sslmode, port=between.port))
            assert type(failure) is ConfigurationError
            assert [is_encrypted(link) for link in between.links] == [True]
            assert [bytes(link.heard) for link in impostor.links] == [b""]

    async def test_T2_system_knows_no_private_authority(self, server: Server) -> None:
        async with Between(server.port) as between:
            url = server.tls_url("verify-full", port=between.port, root=None)
            for text in (url, f"{url}&sslrootcert=system"):
                assert type(await refused(text)) is ConfigurationError
        assert [is_encrypted(link) for link in between.links] == [True, True]

    @pytest.mark.usefixtures("home_root")
    async def test_T2_authority_of_the_home_is_the_only_one_where_it_is_there(
        self, server: Server, impostors: dict[str, Certificate]
    ) -> None:
        for sslmode in ENCRYPTED:
            url = server.tls_url(sslmode, root=None)
            async with Database.from_url(url) as db:
                assert (await db.health()).ok
            async with (
                Between(server.port, "upgrades", impostors["self-signed"]) as impostor,
                Between(impostor.port) as between,
            ):
                url = server.tls_url(sslmode, port=between.port, root=None)
                assert type(await refused(url)) is ConfigurationError
                assert [bytes(link.heard) for link in impostor.links] == [b""]

    async def test_T2_name_is_what_the_url_says_not_what_it_resolves_to(
        self, server: Server
    ) -> None:
        failure = await refused(server.tls_url("verify-full", host="127.0.0.1"))
        assert type(failure) is ConfigurationError

    async def test_verify_ca_takes_any_name(
        self, server: Server, impostors: dict[str, Certificate]
    ) -> None:
        async with (
            Between(server.port, "upgrades", impostors["of another host"]) as between,
            Database.from_url(server.tls_url("verify-ca", port=between.port)) as db,
        ):
            assert (await db.health()).ok

    @pytest.mark.parametrize(
        "certificate", ["of another host", "self-signed", "ended", "of another authority"]
    )
    async def test_T1_require_takes_anybody(
        self, server: Server, impostors: dict[str, Certificate], certificate: str
    ) -> None:
        async with (
            Between(server.port, "upgrades", impostors[certificate]) as between,
            Database.from_url(server.tls_url("require", port=between.port, root=None)) as db,
        ):
            assert (await db.health()).ok

    async def test_T3_migrations_refuse_them_too(self, server: Server) -> None:
        async with Between(server.port) as between:
            url = server.tls_url("verify-full", port=between.port, root="theirs", user=OWNER)
            with pytest.raises((OSError, TodoDBError)) as caught:
                await upgrade(url)
            assert type(translated(caught.value)) is ConfigurationError
            assert [is_encrypted(link) for link in between.links] == [True]


class TestDenial:
    """Somebody on the way answers that the server has no TLS."""

    @pytest.mark.parametrize("sslmode", ENCRYPTED)
    async def test_T1_ends_the_attempt_before_a_word_in_clear(
        self, server: Server, sslmode: str
    ) -> None:
        async with Between(server.port, "denies") as between:
            url = server.tls_url(sslmode, port=between.port)
            failure = await refused(url, retry_attempts=1)
            assert type(failure) in {ConfigurationError, UnavailableError}
        assert [bytes(link.heard) for link in between.links] == [ASKS_FOR_TLS]

    async def test_T1_is_not_asked_again(self, server: Server) -> None:
        async with Between(server.port, "denies") as between:
            url = server.tls_url("verify-full", port=between.port)
            failure = await refused(url, connect_retry_seconds=1)
            assert type(failure) is ConfigurationError
        assert [bytes(link.heard) for link in between.links] == [ASKS_FOR_TLS]

    @pytest.mark.parametrize("sslmode", ENCRYPTED)
    async def test_T1_migrations_send_nothing_in_clear(self, server: Server, sslmode: str) -> None:
        async with Between(server.port, "denies") as between:
            with pytest.raises((OSError, TodoDBError)):
                await upgrade(server.tls_url(sslmode, port=between.port, user=OWNER))
        assert [bytes(link.heard) for link in between.links] == [ASKS_FOR_TLS]

    async def test_T1_prefer_would_give_the_password_away(self, server: Server) -> None:
        async with Between(server.port, "denies") as between:
            await refused(server.tls_url("prefer", port=between.port, root=None), retry_attempts=1)
        assert [MARKER.encode() in link.heard for link in between.links] == [True]


class TestDirectNegotiation:
    async def test_saves_a_round_trip(self, server: Server, authority: Certificate) -> None:
        certificate = authority.issue("localhost")
        counts: list[int] = []
        manners: list[tuple[Manner, str]] = [("upgrades", "postgres"), ("speaks TLS", "direct")]
        for manner, negotiation in manners:
            async with (
                Between(server.port, manner, certificate) as speaker,
                Between(speaker.port) as between,
            ):
                url = server.tls_url("verify-full", port=between.port, sslnegotiation=negotiation)
                async with Database.from_url(url) as db:
                    assert (await db.health()).ok
                    counts.append(between.links[0].round_trips)
                assert [link.protocol for link in speaker.links] == ["postgresql"]
                begin = HELLO if negotiation == "direct" else ASKS_FOR_TLS
                assert [link.heard.startswith(begin) for link in between.links] == [True]
        asked, direct = counts
        assert direct == asked - 1

    async def test_T3_verifies_as_well(self, server: Server) -> None:
        async with (
            Between(server.port, "speaks TLS", Certificate.self_signed("localhost")) as between,
        ):
            url = server.tls_url("verify-full", port=between.port, sslnegotiation="direct")
            assert type(await refused(url)) is ConfigurationError


class TestDoctor:
    """Of a server that it takes for another machine, unless a test says otherwise."""

    @staticmethod
    def consult(monkeypatch: pytest.MonkeyPatch, url: str) -> Result:
        monkeypatch.setenv("DATABASE_URL", url)
        return CliRunner().invoke(app.app, ["doctor"])

    @pytest.mark.usefixtures("elsewhere")
    def test_T2_says_nothing_of_tls_with_a_verified_certificate(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.consult(monkeypatch, server.tls_url("verify-full"))
        assert "found" in result.output
        assert "tls-" not in result.output

    @pytest.mark.usefixtures("elsewhere")
    @pytest.mark.parametrize(
        ("sslmode", "root", "code"),
        [
            ("disable", None, "tls-missing"),
            ("allow", None, "tls-missing"),
            ("prefer", None, "tls-unverified"),
            ("require", None, "tls-unverified"),
            ("require", "ours", "tls-unverified"),
            ("verify-ca", "ours", "tls-unverified"),
        ],
    )
    def test_T1_finds_what_is_less(
        self,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        sslmode: str,
        root: str | None,
        code: str,
    ) -> None:
        result = self.consult(monkeypatch, server.tls_url(sslmode, root=root))
        assert {word for word in result.output.split() if word.startswith("tls-")} == {code}
        assert result.exit_code == 1
        assert MARKER not in result.output

    def test_minds_no_clear_text_within_this_machine(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.consult(monkeypatch, server.tls_url("disable", root=None))
        assert "found" in result.output
        assert "tls-" not in result.output

    def test_says_what_is_wrong_with_a_certificate_and_exits_1(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.consult(monkeypatch, server.tls_url("verify-full", root="theirs"))
        assert "ConfigurationError: the server's certificate cannot be verified" in result.output
        assert result.exit_code == 1
