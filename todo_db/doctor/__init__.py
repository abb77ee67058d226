"""Find every known weakness of a live database, its URL and its role."""

from asyncio import BaseTransport
from dataclasses import dataclass
from importlib.resources import files
from ipaddress import ip_address
from ssl import CERT_REQUIRED
from time import time
from typing import Final, Literal, cast

from todo_db.doctor.catalogue import OBJECTS, SETTINGS, STATEMENT, catalogued, differences
from todo_db.engine import Pool, PooledConnection, parse_url, transport
from todo_db.errors import ConfigurationError, translated
from todo_db.fence import PRINTED_RULE, ROLE
from todo_db.models import OUR_COLUMNS, REVISION
from todo_db.settings import Settings
from todo_db.trust import ALGORITHMS, Trust, is_set, trust_of

_SKEW_SECONDS: Final = 5.0
_OLDEST: Final = 150_000
_SERVER: Final = """
    SELECT current_setting('server_version') AS version,
        current_setting('server_version_num')::integer AS number, pg_backend_pid() AS pid,
        extract(epoch FROM clock_timestamp())::float8 AS clock
"""
_OWN_NAMES: Final = "SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE starts_with(name, $1))"
# Every login may know the size of a table, and that of a table which never had a row is 0.
_KEYS: Final = """
    SELECT pg_relation_size(to_regclass('public.jwks')) = 0 AS are_missing,
        has_table_privilege(to_regclass('public.jwks'), 'SELECT') AS are_readable
"""
_OTHER_ALGORITHM: Final = """
    SELECT EXISTS (SELECT FROM public.jwks
        WHERE alg <> ALL ($1) AND (expires_at IS NULL OR expires_at > now()))
"""
# After one of these findings the role cannot read which migrations have run.
_UNKNOWN: Final = frozenset({"login-not-member", "migrations-missing", "migrations-unreadable"})

RULES: Final = files(__package__).joinpath("rules.sql").read_text("utf-8")
_OURS: Final = [
    f"public.{table}.{column}" for table, columns in OUR_COLUMNS.items() for column in columns
]
# Problem and remedy of each finding that no rule of rules.sql returns.
FURTHER: Final = {
    "catalogue-extra": (
        "no migration made it, so nothing tells what it opens or breaks",
        "drop or revoke it, or have a migration put back what it alters",
    ),
    "catalogue-missing": (
        "a migration made it, and it is gone or altered",
        "make it again as the file in alembic/versions does",
    ),
    "clock-skewed": (
        "its clock and this machine's differ by more than 5 seconds: tokens expire at other times",
        "synchronise both by NTP",
    ),
    "credentials-unusable": (
        "whose credentials are accepted is not clear, so an API with `lifespan()` does not start",
        "do what the line `credentials` says",
    ),
    "direct-pooled": (
        "it names Neon's pooler, which gives each transaction of a migration another session",
        "take -pooler out of its host, or leave it out: it is derived from DATABASE_URL",
    ),
    "jwks-algorithm": (
        "Better Auth signs JWTs by an algorithm that is not accepted: they are refused with 401",
        f"in its plugin jwt set keyPairConfig to one of {', '.join(ALGORITHMS)}",
    ),
    "migrations-behind": (
        f"it says that migrations before {REVISION} were the last to run",
        "todo-db migrate",
    ),
    "server-old": ("it is older than PostgreSQL 15, so nothing else was looked at", "upgrade it"),
    "statements-untracked": (
        (
            "it does not track prepared statements (or pools by session), so todo_db turns them"
            " off: each call costs one round trip more"
        ),
        (
            "set max_prepared_statements of PgBouncer above 0 (1.21 or later), or"
            " TODO_DB_PREPARED_STATEMENTS=false; =true if it pools by session"
        ),
    ),
    "tls-missing": (
        "the server is another machine, and everything goes to it in clear text",
        "use the server's TLS: add sslmode=verify-full to the URL",
    ),
    "tls-unverified": (
        (
            "it is encrypted, but another machine could pose as the server: certificate or name are"
            " not checked"
        ),
        "add sslmode=verify-full to the URL",
    ),
}

type Line = Literal[
    "unix socket", "this machine", "TLS, verified", "TLS, not verified", "clear text"
]
_WEAK: Final[dict[Line, str]] = {
    "clear text": "tls-missing",
    "TLS, not verified": "tls-unverified",
}


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One weakness.

    Attributes:
        code: The stable name of the check.
        subject: The object, or a part of it "on" its table, or an object and a fact about it that
            differs from what the migrations made; never a value of a row.
        problem: What the weakness permits or breaks.
        remedy: What the owner should do.
    """

    code: str
    subject: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was examined, and what was found.

    Attributes:
        findings: The weaknesses, sorted; empty for a sound database.
        server_version: PostgreSQL's version, such as `18.4`.
        revision: The last migration that ran; None if it is not known.
        endpoint: Whether there is a pooler in front of the server.
        line: How the connection to the server, or to its pooler, is protected.
        credentials: Whose credentials the settings accept, and what could not be examined.
    """

    findings: tuple[Finding, ...]
    server_version: str
    revision: str | None
    endpoint: Literal["pooled", "direct"]
    line: Line
    credentials: str


async def examine(settings: Settings) -> Report:
    """Find every known weakness, with the application's login, over a connection of its own.

    It only reads, and only the system catalogue, which every login may read, and the algorithms in
    `jwks`, if the login may read that table. From a server before PostgreSQL 15 it reads only the
    version.

    Rules judge everything that `todo_app` can touch, whoever made it. At the end the objects that
    the migrations made are compared with those of a fresh database: only if the database is at
    exactly this package's revision, because a newer one may differ, and only objects without
    another finding, which may explain the difference. What an application adds is not compared.

    Raises:
        ConfigurationError: A URL or the login is wrong.
        UnavailableError: The database cannot be reached.
    """
    pool = Pool(settings)
    try:
        connection = await pool.acquire()
        try:
            report = await _ask(pool, connection, settings)
        finally:
            pool.release(connection)
    except Exception as error:  # noqa: BLE001  # raised again, as ours
        failure = translated(error)
    else:
        return report
    finally:
        await pool.close()
    raise failure


async def _ask(pool: Pool, connection: PooledConnection, settings: Settings) -> Report:
    driver = connection.driver
    line = _line(transport(driver))
    found = [_further(_WEAK[line], "the connection")] if line in _WEAK else []
    direct = settings.direct_database_url
    if direct is not None and parse_url(direct.get_secret_value()).is_pooled:
        found.append(_further("direct-pooled", "DIRECT_DATABASE_URL"))
    trust, credentials = _trust(settings, found)
    revision = None
    async with driver.transaction(readonly=True):
        await driver.execute(SETTINGS)
        asked = time()
        (server,) = await driver.fetch(_SERVER)
        is_pooled = pool.is_pooled(told_pid=driver.get_server_pid(), server_pid=server["pid"])
        if not asked - _SKEW_SECONDS <= server["clock"] <= time() + _SKEW_SECONDS:
            found.append(_further("clock-skewed", "the server"))
        if server["number"] < _OLDEST:
            found.append(_further("server-old", "the server"))
        else:
            found += [Finding(*row) for row in await driver.fetch(RULES, _OURS, PRINTED_RULE)]
            if (
                is_pooled
                and settings.prepared_statements is None
                # A pooler that tracks prepared statements gives them names of its own.
                and await driver.fetchval(_OWN_NAMES, driver.statement_prefix)
            ):
                found.append(_further("statements-untracked", "the pooler"))
            if trust is not None and trust.jwks_url is None:
                credentials += await _keys(connection, found)
            if not {finding.code for finding in found} & _UNKNOWN:
                revision = await _compare(connection, found)
    return Report(
        findings=tuple(sorted(found)),
        server_version=server["version"].split()[0],
        revision=revision,
        endpoint="pooled" if is_pooled else "direct",
        line=line,
        credentials=credentials,
    )


def _trust(settings: Settings, found: list[Finding]) -> tuple[Trust | None, str]:
    """Return whose credentials the settings accept, also in words, or add a finding."""
    if not is_set(settings):
        return None, "none: the settings name no issuer"
    try:
        trust = trust_of(settings)
    except ConfigurationError as error:
        found.append(_further("credentials-unusable", "the settings"))
        return None, f"none: {error}"
    if trust.secret is None:
        return trust, str(trust)
    return trust, f"{trust}; whether the secret is Better Auth's, only its first cookie shows"


async def _keys(connection: PooledConnection, found: list[Finding]) -> str:
    """Return what is to be said about the table `jwks`, and add a finding about its keys."""
    driver = connection.driver
    (keys,) = await driver.fetch(_KEYS)
    if keys["are_missing"]:
        return "; jwks is empty: no JWT is accepted before Better Auth's plugin jwt makes a key"
    if keys["are_readable"] and await driver.fetchval(_OTHER_ALGORITHM, list(ALGORITHMS)):
        found.append(_further("jwks-algorithm", "public.jwks"))
    return ""


async def _compare(connection: PooledConnection, found: list[Finding]) -> str | None:
    """Return the last migration that ran, and add findings for differences of the schema."""
    driver = connection.driver
    await driver.execute(f"SET LOCAL ROLE {ROLE}")
    revision = cast(
        "str | None", await driver.fetchval("SELECT max(version_num) FROM public.todo_db_version")
    )
    if revision is None or revision < REVISION:
        found.append(_further("migrations-behind", "public.todo_db_version"))
    elif revision == REVISION:
        lines = await driver.fetch(STATEMENT, OBJECTS)
        explained = {finding.subject.rpartition(" on ")[2] for finding in found}
        found += [
            _further(code, line)
            for code, line in differences(catalogued((row[0], row[1]) for row in lines), explained)
        ]
    return revision


def _line(socket: BaseTransport) -> Line:
    """Classify a connection by its transport, not by the URL."""
    peer = socket.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return "unix socket"
    if ip_address(cast("str", peer[0])).is_loopback:
        return "this machine"
    tls = socket.get_extra_info("ssl_object")
    if tls is None:
        return "clear text"
    sound = tls.context.verify_mode is CERT_REQUIRED and tls.context.check_hostname
    return "TLS, verified" if sound else "TLS, not verified"


def _further(code: str, subject: str) -> Finding:
    return Finding(code, subject, *FURTHER[code])
