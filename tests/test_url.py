"""The URL as people paste it, and what the driver is told. No server is asked here."""

import ssl
from itertools import product
from pathlib import Path

import pytest

from todo_db import ConfigurationError
from todo_db.engine import parse_url

MARKER = "swordfish"
POOLED = "ep-cool-rain-123456-pooler.eu-central-1.aws.neon.tech"
DIRECT = "ep-cool-rain-123456.eu-central-1.aws.neon.tech"
# As the console hands it out.
NEON = f"postgresql://alice:{MARKER}@{POOLED}/neondb?sslmode=require&channel_binding=require"


def told(error: BaseException) -> str:
    return f"{error} {error!r} {error.args} {error.__cause__} {error.__context__}"


class TestText:
    @pytest.mark.parametrize(
        ("name", "around"),
        list(
            product(
                ["postgres", "postgresql", "postgresql+asyncpg"], ["{}", " {}\n", "'{}'", '"{}" ']
            )
        ),
    )
    def test_every_name_of_postgresql_quoted_or_not(self, name: str, around: str) -> None:
        text = around.format(f"{name}://alice:s%40cret@db.example.org:6432/todo")
        url = parse_url(text).url
        assert url.drivername == "postgresql+asyncpg"
        assert (url.username, url.password) == ("alice", "s@cret")
        assert (url.host, url.port, url.database) == ("db.example.org", 6432, "todo")

    @pytest.mark.parametrize(
        ("written", "meant"),
        [("p%25c", "p%c"), ("p%c", "p%c"), ("%2Fa%3A", "/a:"), ("100%", "100%")],
    )
    def test_percent_signs_in_a_password(self, written: str, meant: str) -> None:
        assert parse_url(f"postgresql://alice:{written}@h/todo").url.password == meant

    def test_folder_of_a_socket(self) -> None:
        endpoint = parse_url("postgresql://alice@/todo?host=/run/postgresql&port=5433")
        assert dict(endpoint.url.query) == {"host": "/run/postgresql", "port": "5433"}

    @pytest.mark.parametrize(
        "text",
        [
            f"mysql://alice:{MARKER}@localhost/todo",
            f"sqlite:///{MARKER}",
            f"postgresql+psycopg://alice:{MARKER}@localhost/todo",
            f"postgresqlx://alice:{MARKER}@localhost/todo",
            f"postgresql://alice:{MARKER}@localhost:port/todo",
            f"postgresql://alice:{MARKER}@localhost:99999/todo",
            f"psql 'postgresql://alice:{MARKER}@localhost/todo'",
            f"alice:{MARKER}@localhost/todo",
            MARKER,
            "",
        ],
    )
    def test_anything_else_is_refused_and_not_repeated(self, text: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            parse_url(text)
        assert MARKER not in told(caught.value)


class TestQuery:
    def test_unknown_keys_are_named_without_their_values(self) -> None:
        with pytest.raises(ConfigurationError, match=r"passwd, zebra$") as caught:
            parse_url(f"postgresql://alice@localhost/todo?zebra=1&passwd={MARKER}")
        assert MARKER not in told(caught.value)

    @pytest.mark.parametrize(
        "query",
        [
            f"sslmode={MARKER}",
            f"sslnegotiation={MARKER}",
            f"connect_timeout={MARKER}",
            "connect_timeout=0",
            "connect_timeout=-1",
            "connect_timeout=1.5",
            "connect_timeout=99999",
            f"sslmode=require&sslmode={MARKER}",
        ],
    )
    def test_values_that_mean_nothing_are_refused_and_not_repeated(self, query: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            parse_url(f"postgresql://alice@localhost/todo?{query}")
        assert MARKER not in told(caught.value)

    @pytest.mark.parametrize(
        "key",
        ["channel_binding", "gssencmode", "keepalives_idle", "pgbouncer", "schema", "sslsni"],
    )
    def test_keys_of_other_clients_are_passed_over(self, key: str) -> None:
        plain = parse_url("postgresql://alice@localhost/todo")
        assert parse_url(f"postgresql://alice@localhost/todo?{key}=1") == plain

    def test_what_the_driver_calls_otherwise_is_translated(self) -> None:
        arguments = parse_url(
            "postgresql://alice@h/todo?application_name=worker&connect_timeout=7"
            "&sslnegotiation=direct&options=-c%20jit%3Doff"
        ).connect_args()
        assert arguments["server_settings"] == {
            "application_name": "worker",
            "options": "-c jit=off",
        }
        assert (arguments["timeout"], arguments["direct_tls"]) == (7.0, True)

    def test_says_who_is_calling_unless_told_otherwise(self) -> None:
        arguments = parse_url("postgresql://alice@h/todo?sslnegotiation=postgres").connect_args()
        assert arguments["server_settings"] == {"application_name": "todo_db"}
        assert "direct_tls" not in arguments


class TestTls:
    @staticmethod
    def context(text: str) -> ssl.SSLContext:
        context = parse_url(text).connect_args()["ssl"]
        assert isinstance(context, ssl.SSLContext)
        return context

    @pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
    def test_modes_without_a_promise_are_the_drivers(self, mode: str) -> None:
        endpoint = parse_url(f"postgresql://alice@db.example.org/todo?sslmode={mode}")
        assert endpoint.connect_args()["ssl"] == mode

    def test_elsewhere_no_mode_is_libpqs_default(self) -> None:
        assert parse_url("postgresql://alice@db.example.org/todo").ssl_mode == "prefer"

    def test_require_encrypts_and_trusts_anybody_as_libpq_does(self) -> None:
        context = self.context("postgresql://alice@db.example.org/todo?sslmode=require")
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)

    @pytest.mark.parametrize("key", ["sslmode", "ssl"])
    def test_verify_full_checks_certificate_and_name(self, key: str) -> None:
        context = self.context(f"postgresql://alice@db.example.org/todo?{key}=verify-full")
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)

    def test_verify_ca_checks_the_certificate_alone(self) -> None:
        context = self.context(
            "postgresql://alice@db.example.org/todo?sslmode=verify-ca&sslrootcert=system"
        )
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)

    def test_root_certificate_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        junk = tmp_path / MARKER
        junk.write_text("no certificate")
        for path in (tmp_path / "missing", junk):
            endpoint = parse_url(
                f"postgresql://alice@db.example.org/todo?sslmode=verify-full&sslrootcert={path}"
            )
            with pytest.raises(ConfigurationError, match="sslrootcert") as caught:
                endpoint.connect_args()
            assert MARKER not in told(caught.value)


class TestLibpqUrl:
    @pytest.mark.parametrize(
        ("query", "kept"),
        [
            ("", ""),
            ("?sslmode=prefer&pgbouncer=true", ""),
            ("?sslmode=require&channel_binding=require", "?sslmode=require"),
            ("?sslmode=require&sslrootcert=/ca", "?sslmode=require&sslrootcert=%2Fca"),
            ("?sslmode=verify-full", "?sslmode=verify-full&sslrootcert=system"),
        ],
    )
    def test_keeps_what_is_said_of_tls(self, query: str, kept: str) -> None:
        endpoint = parse_url(f"postgres://alice@db.example.org/todo{query}")
        assert str(endpoint.libpq_url()) == f"postgresql://alice@db.example.org/todo{kept}"


class TestNeon:
    @pytest.fixture(params=["", "?sslmode=require", "?sslmode=verify-ca", "?sslmode=verify-full"])
    def query(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_certificate_is_verified_whatever_was_asked(self, query: str) -> None:
        endpoint = parse_url(f"postgresql://alice@{POOLED}/neondb{query}")
        context = endpoint.connect_args()["ssl"]
        assert isinstance(context, ssl.SSLContext)
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)

    @pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
    def test_less_is_refused(self, mode: str) -> None:
        with pytest.raises(ConfigurationError, match="Neon needs TLS"):
            parse_url(f"postgresql://alice@{POOLED}/neondb?sslmode={mode}")

    def test_url_of_the_console_is_taken_as_it_is(self) -> None:
        endpoint = parse_url(NEON)
        assert (endpoint.is_neon, endpoint.is_pooled) == (True, True)
        assert endpoint.url.host == POOLED
        assert not endpoint.url.query

    def test_direct_endpoint_is_the_one_without_the_pooler(self) -> None:
        direct = parse_url(NEON).direct()
        assert (direct.url.host, direct.is_pooled) == (DIRECT, False)
        assert (direct.url.password, direct.ssl_mode) == (MARKER, "verify-full")
        assert direct.direct() == direct

    @pytest.mark.parametrize(
        "host", ["ep-a-pooler.example.org", "neon.tech.example.org", "ep-a-pooler.notneon.tech"]
    )
    def test_other_hosts_are_not_taken_for_it(self, host: str) -> None:
        endpoint = parse_url(f"postgresql://alice@{host}/todo?sslmode=disable")
        assert not endpoint.is_neon
        assert endpoint.direct().url.host == host

    @pytest.mark.parametrize(
        ("written", "left"),
        [
            ("endpoint%3Dep-a", None),
            ("project%3Dp", None),
            ("endpoint%3Dep-a%20-c%20jit%3Doff", "-c jit=off"),
            ("-c%20jit%3Doff%20endpoint%3Dep-a", "-c jit=off"),
        ],
    )
    def test_option_for_clients_without_sni_is_dropped(
        self, written: str, left: str | None
    ) -> None:
        arguments = parse_url(
            f"postgresql://alice@{DIRECT}/neondb?options={written}"
        ).connect_args()
        assert arguments["server_settings"].get("options") == left


class TestSecrets:
    def test_endpoint_does_not_print_its_password(self) -> None:
        endpoint = parse_url(NEON)
        assert MARKER not in f"{endpoint} {endpoint!r} {endpoint.url} {endpoint.url!r}"
