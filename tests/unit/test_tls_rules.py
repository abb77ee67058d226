"""What a connection does about TLS, by all the keys and hosts that decide it together.

No server is asked here; `test_tls.py` has one.
"""

import ssl
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Final

import pytest
from certificates import Certificate

from todo_db import ConfigurationError
from todo_db.engine import parse_url

POOLED: Final = "ep-cool-rain-123456-pooler.eu-central-1.aws.neon.tech"
# Each spelling of a host, with the rest of the query to follow.
ELSEWHERE: Final = {
    "name": "postgresql://alice@db.example.org/todo?",
    "address": "postgresql://alice@[2001:db8::1]/todo?",
    "in the query": "postgresql://alice@/todo?host=db.example.org&",
    "list": "postgresql://alice@db1.example.org,db2.example.org/todo?",
    "socket in a list": "postgresql://alice@%2Frun,db2.example.org/todo?",
    "not given": "postgresql://alice@/todo?",
    "Neon as a subdomain": "postgresql://alice@neon.tech.example.org/todo?",
    "end of another name": "postgresql://alice@ep-a.notneon.tech/todo?",
    "Neon replaced by the query": f"postgresql://alice@{POOLED}/todo?host=db.example.org&",
}
NEON: Final = {
    "as pasted": f"postgresql://alice@{POOLED}/todo?",
    "capitals": f"postgresql://alice@{POOLED.upper()}/todo?",
    "trailing dot": f"postgresql://alice@{POOLED}./todo?",
    "percent-encoded": f"postgresql://alice@{POOLED.replace('.', '%2E')}/todo?",
    "in the query": f"postgresql://alice@/todo?host={POOLED}&",
    "in the query, over another": f"postgresql://alice@localhost/todo?host={POOLED.upper()}.&",
    "first of a list": f"postgresql://alice@{POOLED},db.example.org/todo?",
    "last of a list": f"postgresql://alice@/todo?host=db.example.org,{POOLED}.&",
    "after a socket": f"postgresql://alice@%2Frun,{POOLED}/todo?",
    "Neon's other domain": "postgresql://alice@ep-a.eu-west-1.aws.neon.build/todo?",
}
SOCKETS: Final = {
    "socket": "postgresql://alice@/todo?host=/run/postgresql&",
    "socket before the path": "postgresql://alice@%2Frun%2Fpostgresql/todo?",
    "sockets": "postgresql://alice@/todo?host=/run/postgresql,/tmp&",
}

# The mode in force, by sslmode, and by sslrootcert: absent, absent while ~/.postgresql/root.crt
# is there, system, or a file. `require` verifies nothing. ! is a refusal that names the key.
TABLE_ELSEWHERE: Final = """
               absent        home          system         file
(absent)       prefer        prefer        verify-full    !sslrootcert
disable        disable       disable       !sslrootcert   !sslrootcert
allow          allow         allow         !sslrootcert   !sslrootcert
prefer         prefer        prefer        !sslrootcert   !sslrootcert
require        require       verify-ca     !sslrootcert   verify-ca
verify-ca      !sslrootcert  verify-ca     !sslrootcert   verify-ca
verify-full    verify-full   verify-full   verify-full    verify-full
"""
TABLE_NEON: Final = """
               absent        home          system         file
(absent)       verify-full   verify-full   verify-full    verify-full
disable        !sslmode      !sslmode      !sslmode       !sslmode
allow          !sslmode      !sslmode      !sslmode       !sslmode
prefer         !sslmode      !sslmode      !sslmode       !sslmode
require        verify-full   verify-full   verify-full    verify-full
verify-ca      verify-full   verify-full   verify-full    verify-full
verify-full    verify-full   verify-full   verify-full    verify-full
"""
# A socket has no TLS, but contradictions are refused as elsewhere.
TABLE_SOCKETS: Final = """
               absent        home          system         file
(absent)       disable       disable       disable        !sslrootcert
disable        disable       disable       !sslrootcert   !sslrootcert
allow          disable       disable       !sslrootcert   !sslrootcert
prefer         disable       disable       !sslrootcert   !sslrootcert
require        disable       disable       !sslrootcert   disable
verify-ca      !sslrootcert  disable       !sslrootcert   disable
verify-full    disable       disable       disable        disable
"""


def rows(table: str, spellings: Mapping[str, str]) -> Iterator[object]:
    """One parameter set for each cell of the table and each spelling of a host."""
    head, *lines = table.strip().splitlines()
    for line, (spelling, url) in product(lines, spellings.items()):
        sslmode, *cells = line.split()
        for root, expected in zip(head.split(), cells, strict=True):
            yield pytest.param(url, sslmode, root, expected, id=f"{spelling}-{sslmode}-{root}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without certificates."""
    for name in ("PGHOST", "PGPORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def home_root(home: Path) -> Path:
    root = home / ".postgresql" / "root.crt"
    root.parent.mkdir()
    root.write_bytes(Certificate.authority("of the home").pem)
    return root


class TestMode:
    """`sslmode` and `sslrootcert` decide together, and the host with them."""

    FILE: Final = "/etc/ca.pem"

    def mode(self, url: str, sslmode: str, root: str, binding: str = "") -> str:
        """Return the mode in force, or the key that a refusal begins with."""
        query = {
            "sslmode": sslmode.replace("(absent)", ""),
            "sslrootcert": {"system": "system", "file": self.FILE}.get(root, ""),
            "channel_binding": binding,
        }
        text = "&".join(f"{key}={value}" for key, value in query.items() if value)
        try:
            endpoint = parse_url((url + text).rstrip("?&"))
        except ConfigurationError as error:
            keys = ("channel_binding", "sslrootcert", "sslmode")
            return "!" + next(key for key in keys if key in str(error))
        assert endpoint.demands_tls == (
            endpoint.ssl_mode in {"require", "verify-ca", "verify-full"}
        )
        return endpoint.ssl_mode

    @pytest.mark.parametrize(
        ("url", "sslmode", "root", "expected"),
        [*rows(TABLE_ELSEWHERE, ELSEWHERE), *rows(TABLE_SOCKETS, SOCKETS)],
    )
    def test_elsewhere_it_is_libpqs_and_channel_binding_cannot_be_required(
        self, url: str, sslmode: str, root: str, expected: str, request: pytest.FixtureRequest
    ) -> None:
        request.getfixturevalue("home_root" if root == "home" else "home")
        for binding in ("", "disable", "prefer"):
            assert self.mode(url, sslmode, root, binding) == expected
        refused = expected if expected.startswith("!") else "!channel_binding"
        assert self.mode(url, sslmode, root, "require") == refused

    @pytest.mark.parametrize(("url", "sslmode", "root", "expected"), [*rows(TABLE_NEON, NEON)])
    def test_on_neon_the_server_is_verified_and_channel_binding_is_accepted_for_it(
        self, url: str, sslmode: str, root: str, expected: str, request: pytest.FixtureRequest
    ) -> None:
        request.getfixturevalue("home_root" if root == "home" else "home")
        for binding in ("", "disable", "prefer", "require"):
            assert self.mode(url, sslmode, root, binding) == expected

    @pytest.mark.usefixtures("home")
    @pytest.mark.parametrize(
        ("query", "mode"),
        [
            ("ssl=true", "require"),
            ("ssl=require", "require"),
            ("ssl=disable", "disable"),
            ("ssl=verify-full", "verify-full"),
            ("uselibpqcompat=true&sslmode=require", "require"),
        ],
    )
    def test_spellings_of_other_clients(self, query: str, mode: str) -> None:
        assert parse_url(ELSEWHERE["name"] + query).ssl_mode == mode

    @pytest.mark.parametrize(
        ("query", "key"),
        [
            ("sslmode=", "sslmode"),
            ("sslmode=REQUIRE", "sslmode"),
            ("sslmode=verify_full", "sslmode"),
            # node-postgres's.
            ("sslmode=no-verify", "sslmode"),
            ("ssl=false", "ssl"),
            ("ssl=1", "ssl"),
            ("ssl=true&sslmode=require", "sslmode"),
            ("ssl=verify-ca", "sslrootcert"),
            ("channel_binding=1", "channel_binding"),
            ("channel_binding=", "channel_binding"),
            ("sslrootcert=", "sslrootcert"),
            ("sslnegotiation=tls", "sslnegotiation"),
        ],
    )
    @pytest.mark.usefixtures("home")
    def test_other_values_are_refused(self, query: str, key: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"\b{key}\b"):
            parse_url(ELSEWHERE["name"] + query)

    @pytest.mark.usefixtures("home")
    @pytest.mark.parametrize("mode", ["disable", "allow", "prefer", ""])
    def test_direct_negotiation_needs_a_mode_that_demands_tls(self, mode: str) -> None:
        query = f"sslmode={mode}&" if mode else ""
        with pytest.raises(ConfigurationError, match=r"sslnegotiation=direct .* needs sslmode"):
            parse_url(f"{ELSEWHERE['name']}{query}sslnegotiation=direct")

    @pytest.mark.usefixtures("home")
    @pytest.mark.parametrize(
        ("url", "is_direct"),
        [
            (f"{ELSEWHERE['name']}sslmode=require&sslnegotiation=direct", True),
            (f"{ELSEWHERE['name']}sslrootcert=system&sslnegotiation=direct", True),
            (f"{NEON['as pasted']}sslnegotiation=direct", True),
            (f"{NEON['as pasted']}sslnegotiation=postgres", False),
            (f"{SOCKETS['sockets']}sslmode=require&sslnegotiation=direct", False),
        ],
    )
    def test_direct_negotiation_is_asked_for_where_there_is_tls(
        self,
        url: str,
        is_direct: bool,  # noqa: FBT001  # a column of the table
    ) -> None:
        assert parse_url(url).connect_args()["direct_tls"] is is_direct

    @pytest.mark.usefixtures("home")
    def test_environment_of_other_clients_does_not_count(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {
            "PGSSLMODE": "disable",
            "PGSSLROOTCERT": "/missing",
            "PGSSLNEGOTIATION": "direct",
            "PGCHANNELBINDING": "require",
        }.items():
            monkeypatch.setenv(name, value)
        arguments = parse_url(ELSEWHERE["name"].rstrip("?")).connect_args()
        assert (arguments["ssl"], arguments["direct_tls"]) == ("prefer", False)

    def test_home_that_cannot_be_found_has_no_root_certificate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        assert self.mode(ELSEWHERE["name"], "require", "absent") == "require"


class TestContext:
    """The mode in force is what the driver's context does."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "ca.pem"
        file.write_bytes(Certificate.authority("of the file").pem)
        return file

    @staticmethod
    def context(query: str, url: str = ELSEWHERE["name"]) -> ssl.SSLContext:
        context = parse_url(url + query).connect_args()["ssl"]
        assert isinstance(context, ssl.SSLContext)
        return context

    @staticmethod
    def trusted(context: ssl.SSLContext) -> set[object]:
        return {str(certificate["subject"]) for certificate in context.get_ca_certs()}

    @pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
    def test_modes_that_do_not_demand_tls_are_the_drivers(self, mode: str) -> None:
        endpoint = parse_url(f"{ELSEWHERE['name']}sslmode={mode}")
        assert endpoint.connect_args()["ssl"] == mode

    @pytest.mark.usefixtures("home")
    def test_require_encrypts_and_verifies_nothing(self) -> None:
        context = self.context("sslmode=require")
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)

    @pytest.mark.parametrize("mode", ["require", "verify-ca"])
    def test_verify_ca_checks_the_certificate_alone(self, mode: str, file: Path) -> None:
        context = self.context(f"sslmode={mode}&sslrootcert={file}")
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)

    @pytest.mark.usefixtures("home")
    @pytest.mark.parametrize(
        "url",
        [
            f"{ELSEWHERE['name']}sslmode=verify-full",
            f"{ELSEWHERE['name']}sslrootcert=system",
            f"{NEON['as pasted']}sslmode=require&channel_binding=require",
        ],
    )
    def test_verify_full_checks_certificate_and_name(self, url: str) -> None:
        context = self.context("", url)
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert context.verify_flags & ssl.VERIFY_X509_STRICT

    def test_root_is_the_file_and_nothing_else(self, file: Path, home_root: Path) -> None:
        assert home_root.exists()
        for url in (ELSEWHERE["name"], NEON["as pasted"]):
            context = self.context(f"sslmode=verify-full&sslrootcert={file}", url)
            (trusted,) = self.trusted(context)
            assert "of the file" in str(trusted)
            assert context.check_hostname

    @pytest.mark.usefixtures("home_root")
    @pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
    def test_root_is_that_of_the_home_where_the_url_names_none(self, mode: str) -> None:
        (trusted,) = self.trusted(self.context(f"sslmode={mode}"))
        assert "of the home" in str(trusted)

    @pytest.mark.usefixtures("home_root")
    def test_root_on_neon_and_of_system_is_never_that_of_the_home(self) -> None:
        for context in (
            self.context("sslmode=verify-full&sslrootcert=system"),
            self.context("sslmode=require", NEON["as pasted"]),
        ):
            assert not any("of the home" in str(name) for name in self.trusted(context))

    def test_root_of_ones_own_need_not_be_strict_about_rfc_5280(self, file: Path) -> None:
        context = self.context(f"sslmode=verify-full&sslrootcert={file}")
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT

    def test_root_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        junk = tmp_path / "swordfish"
        junk.write_text("no certificate")
        for path in (tmp_path / "missing", junk, tmp_path):
            for mode in ("require", "verify-ca", "verify-full"):
                endpoint = parse_url(f"{ELSEWHERE['name']}sslmode={mode}&sslrootcert={path}")
                with pytest.raises(ConfigurationError, match="sslrootcert") as caught:
                    endpoint.connect_args()
                assert caught.value.__context__ is None
                assert str(tmp_path) not in repr(caught.value)

    def test_every_context_names_postgresql_as_its_protocol(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        named: list[list[str]] = []
        monkeypatch.setattr(
            ssl.SSLContext, "set_alpn_protocols", lambda _self, names: named.append(names)
        )
        self.context("sslmode=require")
        self.context("sslmode=verify-full")
        assert named == [["postgresql"], ["postgresql"]]
