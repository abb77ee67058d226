"""The URL as people paste it, and what the driver is told. No server is asked here.

What it says of TLS is in `test_tls_rules.py`.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from todo_db import ConfigurationError, Database
from todo_db.engine import Endpoint, parameters, parse_url

MARKER: Final = "swordfish"
POOLED: Final = "ep-cool-rain-123456-pooler.eu-central-1.aws.neon.tech"
DIRECT: Final = "ep-cool-rain-123456.eu-central-1.aws.neon.tech"
# As the console hands it out.
NEON: Final = f"postgresql://alice:{MARKER}@{POOLED}/neondb?sslmode=require&channel_binding=require"
PLAIN: Final = "postgresql://alice@localhost/todo"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of libpq's variables."""
    for name in ("PGHOST", "PGPORT"):
        monkeypatch.delenv(name, raising=False)


def refusal(text: str) -> str:
    """Return the message of the refusal, which has no marker in it."""
    with pytest.raises(ConfigurationError) as caught:
        parse_url(text)
    error = caught.value
    everything = f"{error} {error!r} {error.args} {error.__cause__} {error.__context__}"
    assert MARKER not in everything
    return str(error)


def driver_arguments(endpoint: Endpoint) -> dict[str, Any]:
    """Return what SQLAlchemy's dialect makes of it for asyncpg."""
    _, arguments = endpoint.url.get_dialect()().create_connect_args(endpoint.url)
    return dict(arguments)


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
        "scheme", ["postgresql+psycopg", "postgresql+psycopg2", "postgres+pg8000", "mysql+asyncmy"]
    )
    def test_another_driver_is_refused_and_ours_is_named(self, scheme: str) -> None:
        message = refusal(f"{scheme}://alice:{MARKER}@localhost/todo")
        assert "must begin with postgresql://" in message
        assert "asyncpg" in message

    @pytest.mark.parametrize(
        "text",
        [
            f"mysql://alice:{MARKER}@localhost/todo",
            f"sqlite:///{MARKER}",
            f"postgresqlx://alice:{MARKER}@localhost/todo",
            f"POSTGRESQL://alice:{MARKER}@localhost/todo",
            f"jdbc:postgresql://localhost/todo?user=alice&password={MARKER}",
            f"postgresql:/alice:{MARKER}@localhost/todo",
            f"alice:{MARKER}@localhost/todo",
            f"host=localhost password={MARKER}",
            MARKER,
            "",
        ],
    )
    def test_anything_else_is_told_how_a_url_begins(self, text: str) -> None:
        assert "must begin with postgresql://" in refusal(text)

    def test_command_of_psql_is_told_apart(self) -> None:
        assert "psql command" in refusal(f"psql 'postgresql://alice:{MARKER}@localhost/todo'")

    @pytest.mark.parametrize("byte", ["%00", "%0A", "%1F", "%7F", "%FF", "%ED%A0%80", "\udcff"])
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("user", "postgresql://{}:pw@h/todo"),
            ("password", "postgresql://alice:{}@h/todo"),
            ("host", "postgresql://alice@{}/todo"),
            ("host", "postgresql://alice@%2Frun%2F{}/todo"),
            ("host", "postgresql://alice@/todo?host=/run/{}"),
            ("database", "postgresql://alice@h/{}"),
            ("application_name", "postgresql://alice@h/todo?application_name={}"),
            ("sslrootcert", "postgresql://alice@h/todo?sslmode=verify-full&sslrootcert={}"),
        ],
    )
    def test_control_characters_and_other_encodings_are_refused_by_name(
        self, name: str, text: str, byte: str
    ) -> None:
        message = refusal(text.format(MARKER + byte))
        assert message.startswith(f"{name} of the database URL has a control character")

    def test_control_character_of_a_key_is_not_printed(self) -> None:
        assert refusal(f"{PLAIN}?zeb%1Bra=1").startswith(
            "the database URL has unknown keys: zeb?ra"
        )

    @given(st.text())
    def test_every_text_is_read_or_refused(self, text: str) -> None:
        for whole in (
            text,
            f"postgresql://{text}",
            f"postgresql://alice:{text}@h/todo",
            f"postgresql://alice@{text}/todo",
            f"{PLAIN}?{text}",
            f"{PLAIN}?host={text}",
            f"{PLAIN}?host=a,b&port={text}",
            f"{PLAIN}?connect_timeout={text}",
        ):
            with suppress(ConfigurationError):
                driver_arguments(parse_url(whole))


class TestLogin:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("p%25c", "p%c"),
            ("p%c", "p%c"),
            ("%2Fa%3A", "/a:"),
            ("100%", "100%"),
            ("p%40ss", "p@ss"),
            ("a:b", "a:b"),
            ("a?b", "a?b"),
            ("a+b", "a+b"),
            ("a#b", "a#b"),
            ("%C3%A9", "é"),
        ],
    )
    def test_password_is_decoded_once(self, written: str, meant: str) -> None:
        assert parse_url(f"postgresql://alice:{written}@h/todo").url.password == meant

    @pytest.mark.parametrize(
        ("text", "user", "password", "database"),
        [
            ("postgresql://alice@h/todo", "alice", None, "todo"),
            ("postgresql://alice:@h/todo", "alice", None, "todo"),
            ("postgresql://h/todo", None, None, "todo"),
            ("postgresql://alice@h", "alice", None, None),
            ("postgresql://alice@h/", "alice", None, None),
            ("postgresql://alice@h?application_name=a", "alice", None, None),
            ("postgresql://h:5432?application_name=a", None, None, None),
            ("postgresql://%61lice%40example.org@h/to%64o", "alice@example.org", None, "todo"),
            ("postgresql:///todo", None, None, "todo"),
            ("postgresql://", None, None, None),
        ],
    )
    def test_parts_may_be_left_out(
        self, text: str, user: str | None, password: str | None, database: str | None
    ) -> None:
        url = parse_url(text).url
        assert (url.username, url.password, url.database) == (user, password, database)

    @pytest.mark.parametrize(
        "text",
        [
            f"postgresql://alice:p@{MARKER}@localhost/todo",
            f"postgresql://alice@{MARKER}:pw@localhost/todo",
            f"postgresql://alice:p/{MARKER}@localhost/todo",
            f"postgresql://alice:12/{MARKER}@localhost/todo",
            f"postgresql://ali/{MARKER}:pw@localhost/todo",
            f"postgresql://ali?{MARKER}:pw@localhost/todo",
            f"postgresql://alice:p@ss?{MARKER}=1@localhost/todo",
            f"postgresql://alice:p@ss/{MARKER}@localhost/todo",
        ],
    )
    def test_raw_separators_in_it_are_refused_and_never_taken_for_the_host(self, text: str) -> None:
        assert "%40" in refusal(text)


class TestHosts:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("postgresql://alice@h/todo", "h", None),
            ("postgresql://alice@h:6432/todo", "h", 6432),
            ("postgresql://alice@h:/todo", "h", None),
            ("postgresql://alice@my_db-1/todo", "my_db-1", None),
            ("postgresql://alice@db%2Eexample.org/todo", "db.example.org", None),
            ("postgresql://alice@192.0.2.1:5433/todo", "192.0.2.1", 5433),
            ("postgresql://alice@[::1]/todo", "::1", None),
            ("postgresql://alice@[2001:db8::1]:5433/todo", "2001:db8::1", 5433),
            ("postgresql://alice@[fe80::1%25eth0]/todo", "fe80::1%eth0", None),
            ("postgresql://alice@/todo?host=h", "h", None),
            ("postgresql://alice@/todo?host=::1", "::1", None),
            ("postgresql://alice@/todo?port=5433", None, 5433),
            # The query counts more, as for libpq; Prisma's URLs for a socket need it.
            ("postgresql://alice@localhost/todo?host=/cloudsql/a:b:c", "/cloudsql/a:b:c", None),
            ("postgresql://alice@h:6432/todo?host=x", "x", 6432),
            ("postgresql://alice@h:6432/todo?port=5433", "h", 5433),
            ("postgresql://alice@/todo?host=/run/postgresql", "/run/postgresql", None),
            ("postgresql://alice@/todo?host=/run/postgresql&port=5433", "/run/postgresql", 5433),
            ("postgresql://alice@%2Fvar%2Frun/todo", "/var/run", None),
            ("postgresql://alice@%2Fvar%2Frun:5433/todo", "/var/run", 5433),
            ("postgresql://alice@/todo?host=/run/my%20folder", "/run/my folder", None),
            ("postgresql://alice@h1,h2/todo", ["h1", "h2"], [5432, 5432]),
            ("postgresql://alice@h1:1,h2/todo", ["h1", "h2"], [1, 5432]),
            ("postgresql://alice@[::1]:1,[::2]:2/todo", ["::1", "::2"], [1, 2]),
            ("postgresql://alice@%2Frun,h2:2/todo", ["/run", "h2"], [5432, 2]),
            ("postgresql://alice@/todo?host=h1,h2", ["h1", "h2"], [5432, 5432]),
            ("postgresql://alice@/todo?host=h1,h2&port=6432", ["h1", "h2"], [6432, 6432]),
            ("postgresql://alice@/todo?host=h1,h2&port=1,2", ["h1", "h2"], [1, 2]),
            ("postgresql://alice@/todo?host=::1,::2&port=,2", ["::1", "::2"], [5432, 2]),
            ("postgresql://alice@/todo?host=/run,/srv", ["/run", "/srv"], [5432, 5432]),
        ],
    )
    def test_every_spelling_of_libpqs_reaches_the_driver(
        self, text: str, host: object, port: object
    ) -> None:
        endpoint = parse_url(text)
        arguments = driver_arguments(endpoint)
        assert (arguments.get("host"), _numbers(arguments.get("port"))) == (host, port)
        assert list(endpoint.hosts) == (host if isinstance(host, list) else [host or ""])

    @pytest.mark.parametrize(
        "text",
        [
            "postgresql://alice@{}:port/todo",
            "postgresql://alice@{}:99999/todo",
            "postgresql://alice@{}:0/todo",
            "postgresql://alice@{}:-1/todo",
            f"postgresql://alice@{{}}:{'9' * 5000}/todo",
            "postgresql://alice@{}:٣/todo",
            "postgresql://alice@{}/todo?port=abc",
            "postgresql://alice@{}/todo?port=99999",
            "postgresql://alice@{}/todo?port=5432.0",
            "postgresql://alice@{},b/todo?port=1,x",
            "postgresql://alice@{},b/todo?port=1,2,3",
            "postgresql://alice@{}/todo?port=1,2",
        ],
    )
    def test_ports_that_are_none_or_do_not_match_are_refused(self, text: str) -> None:
        assert refusal(text.format(MARKER)).startswith("port of the database URL must be")

    @pytest.mark.parametrize(
        "text",
        [
            "postgresql://alice@{} x/todo",
            "postgresql://alice@{}%40b/todo",
            "postgresql://alice@{}%2Fb/todo",
            "postgresql://alice@[{}/todo",
            "postgresql://alice@[]:1/todo",
            "postgresql://alice@2001:db8::1/todo",
            "postgresql://alice@dé{}/todo",
            # An ideographic full stop is a dot to the resolver.
            f"postgresql://alice@{POOLED.replace('.', '。')}/todo",
            "postgresql://alice@/todo?host={}:5432",
            "postgresql://alice@/todo?host={}:5432,b:5433",
            "postgresql://alice@/todo?host=[::1]",
            "postgresql://alice@/todo?host=%40{}",
        ],
    )
    def test_what_is_no_host_is_refused(self, text: str) -> None:
        assert refusal(text.format(MARKER)).startswith("a host of the database URL is not")

    @pytest.mark.parametrize("text", ["postgresql://a,/todo", "postgresql:///todo?host=a,,b"])
    def test_gap_in_a_list_is_refused(self, text: str) -> None:
        assert "empty host" in refusal(text)


def _numbers(port: object) -> object:
    """As asyncpg reads it: a socket's port comes as SQLAlchemy has it in the query."""
    return int(port) if isinstance(port, str) else port


class TestEnvironment:
    def test_host_and_port_that_the_url_leaves_out_are_asyncpgs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGHOST", f"{POOLED.upper()}.")
        monkeypatch.setenv("PGPORT", "6432")
        endpoint = parse_url("postgresql:///neondb")
        assert (endpoint.url.host, endpoint.url.port) == (POOLED, 6432)
        assert (endpoint.is_pooled, endpoint.ssl_mode) == (True, "verify-full")

    def test_url_counts_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGHOST", "elsewhere")
        monkeypatch.setenv("PGPORT", "1")
        for text in ("postgresql://h:2/todo", "postgresql:///todo?host=h&port=2"):
            assert (parse_url(text).url.host, parse_url(text).url.port) == ("h", 2)

    @pytest.mark.parametrize(
        ("name", "value"), [("PGHOST", f"{MARKER} x"), ("PGHOST", f"/{MARKER}\n"), ("PGPORT", "x")]
    )
    def test_what_is_wrong_in_it_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(name, value)
        assert refusal("postgresql:///todo")

    def test_which_server_of_a_list_is_wanted_is_not_read_from_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGTARGETSESSIONATTRS", "standby")
        assert parse_url(PLAIN).connect_args()["target_session_attrs"] == "any"


class TestQuery:
    @pytest.mark.parametrize("key", ["zebra", "SSLMODE", "Host", "target-session-attrs", "supa"])
    def test_unknown_keys_are_named_and_so_are_the_known(self, key: str) -> None:
        message = refusal(f"{PLAIN}?{key}={MARKER}")
        assert message.startswith(f"the database URL has unknown keys: {key}. Known are app")
        assert "sslmode" in message

    def test_all_unknown_keys_are_named(self) -> None:
        assert "unknown keys: passwd, zebra." in refusal(f"{PLAIN}?zebra=1&passwd={MARKER}")

    @pytest.mark.parametrize(
        "key", ["application_name", "connect_timeout", "host", "pgbouncer", "port", "sslmode"]
    )
    def test_key_without_a_value_is_refused(self, key: str) -> None:
        assert refusal(f"{PLAIN}?{key}=") == refusal(f"{PLAIN}?{key}")
        assert refusal(f"{PLAIN}?{key}=").startswith(f"{key} of the database URL is empty")

    @pytest.mark.parametrize(
        ("query", "key"),
        [
            (f"sslmode=require&sslmode={MARKER}", "sslmode"),
            (f"host=h1:1&host={MARKER}:2", "host"),
            ("pgbouncer=true&pgbouncer=true", "pgbouncer"),
            ("sslsni=1&sslsni=1", "sslsni"),
        ],
    )
    def test_key_that_is_said_twice_is_refused(self, query: str, key: str) -> None:
        assert f"has {key} more than once" in refusal(f"{PLAIN}?{query}")

    @pytest.mark.parametrize("query", ["", "?", "?&", "?application_name=todo_db&"])
    def test_no_key_is_no_fault(self, query: str) -> None:
        assert parse_url(f"{PLAIN}{query}") == parse_url(PLAIN)

    def test_what_the_driver_calls_otherwise_is_translated(self) -> None:
        arguments = parse_url(
            f"{PLAIN}?application_name=my+worker&connect_timeout=7"
            "&target_session_attrs=read-write&sslmode=disable"
        ).connect_args()
        assert arguments == {
            "server_settings": {"application_name": "my worker"},
            "timeout": 7.0,
            "target_session_attrs": "read-write",
            "ssl": "disable",
            "direct_tls": False,
        }

    def test_says_who_is_calling_unless_told_otherwise(self) -> None:
        arguments = parse_url(PLAIN).connect_args()
        assert arguments["server_settings"] == {"application_name": "todo_db"}
        assert "timeout" not in arguments

    @pytest.mark.parametrize("seconds", [MARKER, "0", "-1", "1.5", "99999", "٣", "9" * 5000])
    def test_seconds_that_are_none_are_refused(self, seconds: str) -> None:
        message = refusal(f"{PLAIN}?connect_timeout={seconds}")
        assert message == "connect_timeout of the database URL must be a number from 1 to 3600"

    def test_servers_that_asyncpg_cannot_choose_are_refused(self) -> None:
        message = refusal(f"{PLAIN}?target_session_attrs={MARKER}")
        assert message.startswith("target_session_attrs of the database URL must be any, primary")

    def test_is_refused_where_a_database_is_made(self) -> None:
        for text in (f"{PLAIN}?zebra=1", f"{PLAIN}?sslmode=verify-full&sslrootcert=/missing"):
            with pytest.raises(ConfigurationError):
                Database.from_url(text)


class TestKeysThatChangeNothing:
    """asyncpg cannot be told otherwise, so only what it does anyway is accepted."""

    @pytest.mark.parametrize(
        "query",
        [
            "client_encoding=utf8",
            "client_encoding=UTF8",
            "gssdelegation=0",
            "gssencmode=disable",
            "gssencmode=prefer",
            "load_balance_hosts=disable",
            "max_protocol_version=latest",
            "min_protocol_version=3.0",
            "schema=public",
            "ssl_max_protocol_version=TLSv1.3",
            "ssl_min_protocol_version=TLSv1.2",
            "sslcompression=0",
            "sslsni=1",
            "uselibpqcompat=true",
        ],
    )
    def test_accepted_where_they_are_true(self, query: str) -> None:
        assert parse_url(f"{PLAIN}?{query}") == parse_url(PLAIN)

    @pytest.mark.parametrize(
        ("query", "remedy"),
        [
            ("client_encoding=latin1", "UTF-8"),
            ("gssdelegation=1", "GSSAPI"),
            ("gssencmode=require", "sslmode=verify-full"),
            ("load_balance_hosts=random", "order"),
            ("max_protocol_version=3.1", "3.0"),
            ("min_protocol_version=3.2", "3.0"),
            ("schema=app", "schema public"),
            ("ssl_max_protocol_version=TLSv1.1", "1.2 and 1.3"),
            ("ssl_min_protocol_version=TLSv1.3", "1.2 and 1.3"),
            ("sslcompression=1", "never"),
            ("sslsni=0", "SNI"),
            ("uselibpqcompat=false", "libpq"),
        ],
    )
    def test_refused_where_they_are_not(self, query: str, remedy: str) -> None:
        message = refusal(f"{PLAIN}?{query}")
        assert message.startswith(f"{query.partition('=')[0]} of the database URL must be ")
        assert remedy in message


class TestKeysThatCannotBeHonoured:
    @pytest.mark.parametrize(
        ("keys", "remedy"),
        [
            ("user password dbname", "user:password@host/database"),
            ("passfile service servicefile", "PGPASSFILE"),
            ("hostaddr", "write host"),
            ("connection_limit", "TODO_DB_POOL_SIZE"),
            ("pool_timeout", "TODO_DB_POOL_TIMEOUT_SECONDS"),
            ("command_timeout socket_timeout", "TODO_DB_COMMAND_TIMEOUT_SECONDS"),
            ("keepalives keepalives_count keepalives_idle", "TODO_DB_COMMAND_TIMEOUT_SECONDS"),
            ("keepalives_interval tcp_user_timeout", "TODO_DB_COMMAND_TIMEOUT_SECONDS"),
            ("statement_cache_size", "TODO_DB_PREPARED_STATEMENTS=false"),
            ("prepared_statement_cache_size", "TODO_DB_PREPARED_STATEMENTS=false"),
            ("prepared_statement_name_func", "TODO_DB_PREPARED_STATEMENTS=false"),
            ("sslcert sslkey sslpassword sslcertmode", "password"),
            ("sslcrl sslcrldir", "authority"),
            ("sslaccept", "sslmode"),
            ("require_auth", "sslmode=verify-full"),
            ("requirepeer", "folder"),
            ("krbsrvname gsslib", "password"),
            ("fallback_application_name", "application_name"),
            ("options", "ALTER ROLE"),
        ],
    )
    def test_are_refused_with_what_to_do_instead(self, keys: str, remedy: str) -> None:
        for key in keys.split():
            message = refusal(f"{PLAIN}?{key}={MARKER}")
            assert message.startswith(f"the database URL cannot have {key}: ")
            assert remedy in message.partition(": ")[2]

    def test_every_key_is_documented(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "reference" / "database-url.md"
        documented = set(re.findall(r"`(\w+)`", page.read_text()))
        assert {*parameters._READ, *parameters._FIXED, *parameters._REFUSED} <= documented

    def test_piece_of_a_password_is_not_named_as_an_unknown_key(self) -> None:
        assert "cannot have password" in refusal(f"{PLAIN}?password=a&{MARKER}=b")


class TestPooler:
    @pytest.mark.parametrize(
        ("query", "is_untracked"),
        [("", False), ("?pgbouncer=true", True), ("?pgbouncer=false", False)],
    )
    def test_pgbouncer_says_that_statements_are_not_tracked(
        self,
        query: str,
        is_untracked: bool,  # noqa: FBT001  # a column of the table
    ) -> None:
        endpoint = parse_url(f"{PLAIN}{query}")
        assert endpoint.assumes_untracked_pooler is is_untracked
        assert endpoint.direct().assumes_untracked_pooler is is_untracked

    @pytest.mark.parametrize("value", ["1", "TRUE", "yes", MARKER])
    def test_other_values_are_refused(self, value: str) -> None:
        message = refusal(f"{PLAIN}?pgbouncer={value}")
        assert message == "pgbouncer of the database URL must be true or false"


class TestLibpqUrl:
    @pytest.mark.parametrize(
        ("query", "kept"),
        [
            ("", ""),
            ("?sslmode=prefer&pgbouncer=true", ""),
            ("?sslmode=require&sslrootcert=/ca", "?sslmode=verify-ca&sslrootcert=%2Fca"),
            ("?sslmode=verify-full", "?sslmode=verify-full&sslrootcert=system"),
            ("?target_session_attrs=primary", "?target_session_attrs=primary"),
        ],
    )
    def test_keeps_what_is_said_of_tls_and_of_the_server(self, query: str, kept: str) -> None:
        endpoint = parse_url(f"postgres://alice@db.example.org/todo{query}")
        assert str(endpoint.libpq_url()) == f"postgresql://alice@db.example.org/todo{kept}"

    def test_unverified_stays_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/missing")
        endpoint = parse_url(f"{PLAIN}?sslmode=require")
        assert str(endpoint.libpq_url()) == f"{PLAIN}?sslmode=require"

    def test_keeps_a_list(self) -> None:
        endpoint = parse_url("postgresql://alice@h1:1,h2/todo")
        assert str(endpoint.libpq_url()) == "postgresql://alice@/todo?host=h1%2Ch2&port=1%2C5432"


def _spellings(host: str) -> Iterator[str]:
    yield f"postgresql://alice@{host}/neondb"
    yield f"postgresql://alice@{host.upper()}/neondb"
    yield f"postgresql://alice@{host}./neondb"
    yield f"postgresql://alice@{host.replace('-', '%2D')}:5432/neondb"
    yield f"postgresql://alice@/neondb?host={host}"
    yield f"postgresql://alice@localhost/neondb?host={host.upper()}.&port=5432"


class TestNeon:
    def test_url_of_the_console_is_taken_as_it_is(self) -> None:
        endpoint = parse_url(NEON)
        assert (endpoint.is_neon, endpoint.is_pooled) == (True, True)
        assert (endpoint.url.host, endpoint.ssl_mode) == (POOLED, "verify-full")
        assert not endpoint.url.query

    def test_less_than_tls_is_refused(self) -> None:
        assert refusal(f"{PLAIN}?host={POOLED}&sslmode=disable").startswith("Neon needs TLS")

    @pytest.mark.parametrize("text", [*_spellings(POOLED)])
    def test_pooler_is_seen_and_left_out_in_every_spelling(self, text: str) -> None:
        endpoint = parse_url(text)
        assert (endpoint.is_neon, endpoint.is_pooled) == (True, True)
        assert endpoint.url.host == POOLED
        direct = endpoint.direct()
        assert (direct.url.host, direct.is_neon, direct.is_pooled) == (DIRECT, True, False)
        assert direct.direct() is direct

    @pytest.mark.parametrize("text", [*_spellings(DIRECT)])
    def test_direct_endpoint_is_seen_in_every_spelling(self, text: str) -> None:
        endpoint = parse_url(text)
        assert (endpoint.is_neon, endpoint.is_pooled) == (True, False)
        assert endpoint.direct() is endpoint

    def test_direct_endpoint_keeps_the_rest(self) -> None:
        direct = parse_url(f"{NEON}&application_name=a").direct()
        assert (direct.url.password, direct.ssl_mode) == (MARKER, "verify-full")
        assert direct.connect_args()["server_settings"] == {"application_name": "a"}

    def test_every_host_of_a_list_loses_its_pooler_and_no_other_host_does(self) -> None:
        other = "ep-a-pooler.example.org"
        endpoint = parse_url(f"postgresql://alice@{POOLED}:1,{other},{POOLED.upper()}./neondb")
        assert (endpoint.is_neon, endpoint.is_pooled) == (True, True)
        direct = endpoint.direct()
        assert direct.hosts == (DIRECT, other, DIRECT)
        assert driver_arguments(direct)["port"] == [1, 5432, 5432]

    @pytest.mark.parametrize(
        "host",
        [
            "ep-a-pooler.example.org",
            "neon.tech.example.org",
            "ep-a-pooler.notneon.tech",
            "ep-a-pooler",
            "%2Frun%2Fep-a-pooler.neon.tech",
        ],
    )
    def test_other_hosts_are_not_taken_for_it(self, host: str) -> None:
        endpoint = parse_url(f"postgresql://alice@{host}/todo?sslmode=disable")
        assert (endpoint.is_neon, endpoint.is_pooled) == (False, False)
        assert endpoint.direct() is endpoint

    @pytest.mark.parametrize("host", [POOLED, DIRECT, f"db.example.org,{POOLED}"])
    @pytest.mark.parametrize(
        "options",
        [
            "endpoint%3Dep-cool-rain-123456",
            "endpoint=ep-cool-rain-123456-pooler",
            "project%3DEP-cool-rain-123456",
        ],
    )
    def test_option_that_repeats_the_endpoint_is_not_needed(self, host: str, options: str) -> None:
        plain = parse_url(f"postgresql://alice@{host}/neondb")
        assert parse_url(f"postgresql://alice@{host}/neondb?options={options}") == plain

    @pytest.mark.parametrize(
        ("host", "options"),
        [
            (POOLED, "endpoint%3Dep-other-1"),
            (POOLED, "endpoint%3Dep-cool-rain-123456%20-c%20jit%3Doff"),
            (POOLED, "-c%20jit%3Doff"),
            ("ep-cool-rain-123456.example.org", "endpoint%3Dep-cool-rain-123456"),
        ],
    )
    def test_other_options_are_refused(self, host: str, options: str) -> None:
        message = refusal(f"postgresql://alice@{host}/neondb?options={options}")
        assert message.startswith("the database URL cannot have options: ")


class TestSecrets:
    def test_endpoint_prints_neither_its_password_nor_other_values(self) -> None:
        endpoint = parse_url(f"{NEON}&sslrootcert=/{MARKER}&application_name={MARKER}")
        assert MARKER not in f"{endpoint} {endpoint!r} {endpoint.url} {endpoint.tls!r}"
