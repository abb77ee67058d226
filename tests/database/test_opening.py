"""The first opening of a Database: what it refuses, and what callers that wait for it get."""

import asyncio
import struct
import traceback
from typing import Final, override

import pytest
from driver import Connection
from proxy import STARTUP, Fault, Proxy

from todo_db import (
    ConfigurationError,
    Database,
    IsolationError,
    Settings,
    TodoDBError,
    UnavailableError,
)
from todo_db.doctor import examine
from todo_db.embedded import LOGIN
from todo_db.engine import Pool
from todo_db.fence import RULE

WAITERS: Final = 20
ASLEEP: Final = (
    "Couldn't connect to compute node",
    "Control plane request failed: Request failed with status 503",
)


@pytest.fixture
def login() -> str:
    """One is enough: connections are the same for both."""
    return LOGIN


class TestFailure:
    """Twenty callers wait for an opening that fails."""

    @staticmethod
    async def failures(database: Database) -> list[TodoDBError]:
        results = await asyncio.gather(
            *(database.tasks.count("alice") for _ in range(WAITERS)), return_exceptions=True
        )
        return [result for result in results if isinstance(result, TodoDBError)]

    @pytest.mark.parametrize("kind", [ConfigurationError, UnavailableError])
    async def test_E11_each_gets_an_instance_of_its_own(
        self, proxy: Proxy, kind: type[TodoDBError]
    ) -> None:
        database = self.broken(proxy, kind)
        failures = await self.failures(database)
        assert [type(failure) for failure in failures] == [kind] * WAITERS
        assert len({id(failure) for failure in failures}) == WAITERS
        assert len({str(failure) for failure in failures}) == 1

    @pytest.mark.parametrize("kind", [ConfigurationError, UnavailableError])
    async def test_E11_its_traceback_does_not_grow(
        self, proxy: Proxy, kind: type[TodoDBError]
    ) -> None:
        database = self.broken(proxy, kind)
        depths = [
            max(len(traceback.extract_tb(failure.__traceback__)) for failure in failures)
            for failures in (
                await self.failures(database),
                await self.failures(database),
                await self.failures(database),
            )
        ]
        assert max(depths) < 20
        assert depths == [depths[0]] * 3
        assert database._failure.__traceback__ is None, "it keeps the frames of a caller alive"

    @pytest.mark.parametrize("kind", [ConfigurationError, UnavailableError])
    async def test_E11_it_does_not_refer_to_another_callers(
        self, proxy: Proxy, kind: type[TodoDBError]
    ) -> None:
        for failure in await self.failures(self.broken(proxy, kind)):
            assert (failure.__cause__, failure.__context__) == (None, None)

    @staticmethod
    def broken(proxy: Proxy, kind: type[TodoDBError]) -> Database:
        if kind is ConfigurationError:
            return Database.from_url(proxy.url.replace(LOGIN, "unknown_login"))
        proxy.break_at(STARTUP, Fault.CUT_BEFORE, times=999)
        return Database.from_url(proxy.url, connect_retry_seconds=0.2)


class Refusing(Proxy):
    """Refuses the first clients with an ErrorResponse, as Neon's proxy does without a compute."""

    def __init__(self, url: str, text: str, *, times: int) -> None:
        super().__init__(url)
        fields = f"SERROR\0VERROR\0CXX000\0M{text}\0\0".encode()
        self._error = b"E" + struct.pack("!i", len(fields) + 4) + fields
        self._left = times

    @override
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._left:
            await super()._serve(reader, writer)
            return
        self._left -= 1
        self.connections += 1
        assert await reader.read(1 << 16)
        writer.write(self._error)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


class TestSleepingCompute:
    """Neon's proxy says XX000 for a compute that does not start, and for a used-up quota."""

    @pytest.mark.parametrize("text", ASLEEP)
    async def test_E5_is_waited_for(self, url: str, text: str) -> None:
        async with (
            Refusing(url, text, times=3) as proxy,
            Database.from_url(proxy.url) as database,
        ):
            assert await database.tasks.count("alice") == 0
            assert proxy.connections == 4

    @pytest.mark.parametrize("text", ASLEEP)
    async def test_E5_is_unavailable_when_its_time_is_up(self, url: str, text: str) -> None:
        async with Refusing(url, text, times=999) as proxy:
            database = Database.from_url(proxy.url, connect_retry_seconds=1.5)
            with pytest.raises(UnavailableError) as failure:
                await database.open()
            assert proxy.connections > 1
        assert text not in str(failure.value)

    @pytest.mark.parametrize("text", ASLEEP)
    async def test_E5_is_unavailable_at_once_without_retries(self, url: str, text: str) -> None:
        async with Refusing(url, text, times=999) as proxy:
            database = Database.from_url(proxy.url, retry_attempts=1)
            with pytest.raises(UnavailableError):
                await database.open()
            assert proxy.connections == 1

    async def test_E5_any_other_internal_error_is_not_tried_again(self, url: str) -> None:
        text = "Your account or project has exceeded the compute time quota."
        async with Refusing(url, text, times=999) as proxy:
            database = Database.from_url(proxy.url)
            with pytest.raises(TodoDBError) as failure:
                await database.open()
            assert type(failure.value) is TodoDBError
            assert proxy.connections == 1


class TestPooler:
    """The server shows the package's own names of prepared statements, as an old pooler would.

    `test_untracked_pooler` opens it behind real ones.
    """

    @pytest.fixture
    def behind_a_pooler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Pool, "is_pooled", lambda *_, **__: True)

    @staticmethod
    def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
        return [
            record.getMessage() for record in caplog.records if record.name.startswith("todo_db")
        ]

    @pytest.mark.usefixtures("behind_a_pooler")
    async def test_E1_statements_go_off_with_one_warning(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Database.from_url(url) as database:
            assert not database._pool.keeps_statements
            assert await database.tasks.count("alice") == 0
        (warning,) = self.warnings(caplog)
        assert "TODO_DB_PREPARED_STATEMENTS" in warning

    @pytest.mark.usefixtures("behind_a_pooler")
    async def test_E1_setting_on_is_obeyed(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Database.from_url(url, prepared_statements=True) as database:
            assert database._pool.keeps_statements
        assert self.warnings(caplog) == []

    async def test_E1_statement_that_the_server_does_not_know_turns_them_off_once(
        self, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        # As `open` finds behind a pooler that tracks statements, and later does not.
        db._pool.has_pooler = True
        await self.forget(db, 3)
        counts = await asyncio.gather(*(db.tasks.count("alice") for _ in range(3)))
        assert counts == [0, 0, 0]
        assert not db._pool.keeps_statements
        assert len(self.warnings(caplog)) == 1

    @pytest.mark.parametrize("in_transaction", [False, True])
    async def test_E1_statement_that_the_server_does_not_know_names_the_setting(
        self,
        db: Database,
        url: str,
        in_transaction: bool,  # noqa: FBT001
    ) -> None:
        assert (await db.users.get("alice")).id == "alice"
        async with Database.from_url(
            url, prepared_statements=True, retry_attempts=1, pool_size=1, max_overflow=0
        ) as forced:
            forced._pool.has_pooler = True

            async def count() -> int:
                if not in_transaction:
                    return await forced.tasks.count("alice")
                async with forced.transaction("alice") as tx:
                    return await tx.tasks.count("alice")

            assert await count() == 0
            await self.forget(forced, 1)
            with pytest.raises(UnavailableError, match="TODO_DB_PREPARED_STATEMENTS=false"):
                await count()
            assert forced._pool.keeps_statements
            assert await count() == 0

    async def test_E1_without_a_pooler_they_stay_on(self, db: Database) -> None:
        await self.forget(db, 1)
        assert await db.tasks.count("alice") == 0
        assert db._pool.keeps_statements

    @staticmethod
    async def forget(database: Database, number: int) -> None:
        """Have the server forget the statements that a number of connections prepared."""
        held = [await database._pool.acquire() for _ in range(number)]
        for connection in held:
            database._pool.release(connection)
        await asyncio.gather(*(database.tasks.count("alice") for _ in range(number)))
        held = [await database._pool.acquire() for _ in range(number)]
        for connection in held:
            await connection.driver.execute("DEALLOCATE ALL")
        for connection in held:
            database._pool.release(connection)


class TestRowSecurityOff:
    """With `row_security = off`, PostgreSQL refuses every statement on a fenced table."""

    @pytest.fixture(params=["database", "login"])
    async def off(
        self, request: pytest.FixtureRequest, superuser: Connection, todo_database_name: str
    ) -> None:
        place = f"DATABASE {todo_database_name}"
        if request.param == "login":
            place = f"ROLE {LOGIN} IN {place}"
        await superuser.execute(f"ALTER {place} SET row_security = off")

    @pytest.mark.usefixtures("off")
    async def test_E12_opening_is_refused(self, url: str) -> None:
        database = Database.from_url(url)
        with pytest.raises(IsolationError, match="row-level security"):
            await database.open()
        health = await database.health()
        assert (health.ok, health.problem) == (False, "IsolationError")
        await database.close()

    @pytest.mark.usefixtures("off")
    async def test_E12_the_doctor_names_it(self, url: str) -> None:
        assert await self.found(url) == [("row-security-off", "row_security")]

    async def test_E12_on_is_accepted(self, url: str) -> None:
        async with Database.from_url(url) as database:
            assert (await database.health()).ok
        assert await self.found(url) == []

    @staticmethod
    async def found(url: str) -> list[tuple[str, str]]:
        """Return what the doctor finds, except that the server of the tests is not durable."""
        report = await examine(Settings(database_url=url))
        return [
            (finding.code, finding.subject)
            for finding in report.findings
            if finding.code != "durability-weakened"
        ]


MINE: Final = f"user_id {RULE}"
FENCE: Final = f"""
    ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY own ON notes USING ({MINE});
    CREATE POLICY fence ON notes AS RESTRICTIVE USING ({MINE}) WITH CHECK ({MINE});
    GRANT SELECT, INSERT (user_id, body) ON notes TO todo_app
"""
SHARED: Final = """
    ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY todo_db_shared ON notes FOR SELECT USING (true);
    GRANT SELECT ON notes TO todo_app
"""


class TestTables:
    """Every table that the transactions can touch is fenced, or shared."""

    @pytest.fixture
    async def notes(self, owner: Connection) -> None:
        await owner.execute("CREATE TABLE notes (user_id text NOT NULL, body text)")

    @pytest.mark.usefixtures("notes")
    @pytest.mark.parametrize("tables", ["SELECT", FENCE, SHARED], ids=["none", "fence", "shared"])
    async def test_D6_opens_where_they_are(self, url: str, owner: Connection, tables: str) -> None:
        await owner.execute(tables)
        async with Database.from_url(url):
            pass

    @pytest.mark.usefixtures("notes")
    @pytest.mark.parametrize(
        "mistake",
        [
            "GRANT SELECT ON notes TO todo_app",
            "GRANT SELECT (body) ON notes TO PUBLIC",
            "GRANT DELETE ON notes TO todo_app",
            "GRANT TRUNCATE ON notes TO todo_app",
            f"{FENCE}; ALTER TABLE notes DISABLE ROW LEVEL SECURITY",
            f"{FENCE}; ALTER TABLE notes NO FORCE ROW LEVEL SECURITY",
            f"{FENCE}; DROP POLICY fence ON notes",
            f"{FENCE}; ALTER POLICY fence ON notes TO todo_auth",
            f"{FENCE}; ALTER POLICY fence ON notes USING (user_id IS NOT NULL)",
            f"{FENCE}; ALTER POLICY fence ON notes WITH CHECK (true)",
            f"{FENCE}; ALTER POLICY fence ON notes USING (body {RULE})",
            FENCE.replace("AS RESTRICTIVE USING", "AS RESTRICTIVE FOR UPDATE USING"),
            FENCE.replace("AS RESTRICTIVE", ""),
            f"{SHARED}; GRANT UPDATE (body) ON notes TO todo_app",
            f"{SHARED}; GRANT DELETE ON notes TO todo_app",
            SHARED.replace("todo_db_shared", "everybody"),
        ],
    )
    async def test_D6_refuses_and_names_one_that_is_not(
        self, url: str, owner: Connection, mistake: str
    ) -> None:
        await owner.execute(mistake)
        database = Database.from_url(url)
        with pytest.raises(IsolationError, match=r"without a fence: notes\."):
            await database.open()
