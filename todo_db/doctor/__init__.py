"""Find every known weakness of a live database, its URL and its role."""

from asyncio import BaseTransport
from dataclasses import dataclass
from ipaddress import ip_address
from ssl import CERT_REQUIRED
from time import time
from typing import Final, Literal, cast

from pydantic import SecretStr

from todo_db.doctor.catalogue import SETTINGS, STATEMENT, catalogued, differences
from todo_db.doctor.checks import CHECKS, QUERY
from todo_db.engine import Endpoint, Pool, PooledConnection, parse_url, transport
from todo_db.errors import translated
from todo_db.fence import ROLE
from todo_db.models import REVISION
from todo_db.settings import Settings

_SKEW_SECONDS: Final = 5.0
_OLDEST: Final = 150_000
_SERVER: Final = """
    SELECT current_setting('server_version') AS version,
        current_setting('server_version_num')::integer AS number, pg_backend_pid() AS pid,
        extract(epoch FROM clock_timestamp())::float8 AS clock
"""
_OWN_NAMES: Final = "SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE starts_with(name, $1))"
# After one of these findings the role cannot read which migrations have run.
_UNKNOWN: Final = frozenset({"login-not-member", "migrations-missing", "migrations-unreadable"})
# Codes with these prefixes are not about the schema. Any other finding can explain a difference.
_ELSEWHERE: Final = (
    "clock-",
    "direct-",
    "durability-weakened",
    "login-",
    "statements-",
    "tls-",
    "user-",
)

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
        subject: The name of the object, or a line of the catalogue; never a value of a row.
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
    """

    findings: tuple[Finding, ...]
    server_version: str
    revision: str | None
    endpoint: Literal["pooled", "direct"]
    line: Line


async def examine(settings: Settings) -> Report:
    """Find every known weakness, with the application's login, over a connection of its own.

    It only reads, and only the system catalogue, which every login may read. From a server before
    PostgreSQL 15 it reads only the version.

    At the end it compares all objects that the migrations created with those of the database. It
    does so only if the database is at exactly this package's revision, because a newer database
    may differ, and only without other findings about the schema, because those may explain the
    difference. Resolve such findings first.

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
    found = [(_WEAK[line], "the connection")] if line in _WEAK else []
    direct = settings.direct_database_url
    if direct is not None and _parsed(direct).is_pooled:
        found.append(("direct-pooled", "DIRECT_DATABASE_URL"))
    revision = None
    async with driver.transaction(readonly=True):
        # With this search path no object of the login hides one of the catalogue, and every name
        # is printed with its schema.
        await driver.execute(f"{SETTINGS}; SET LOCAL search_path = pg_catalog, pg_temp")
        asked = time()
        (server,) = await driver.fetch(_SERVER)
        is_pooled = pool.is_pooled(told_pid=driver.get_server_pid(), server_pid=server["pid"])
        if not asked - _SKEW_SECONDS <= server["clock"] <= time() + _SKEW_SECONDS:
            found.append(("clock-skewed", "the server"))
        if server["number"] < _OLDEST:
            found.append(("server-old", "the server"))
        else:
            found += [(row[0], row[1]) for row in await driver.fetch(QUERY)]
            if is_pooled and settings.prepared_statements is None:
                # A pooler that tracks prepared statements gives them names of its own.
                own_names = await driver.fetchval(_OWN_NAMES, driver.statement_prefix)
                found += [("statements-untracked", "the pooler")] if own_names else []
            if not {code for code, _ in found} & _UNKNOWN:
                revision = await _compare(connection, found)
    return Report(
        findings=tuple(sorted(_finding(code, subject) for code, subject in found)),
        server_version=server["version"].split()[0],
        revision=revision,
        endpoint="pooled" if is_pooled else "direct",
        line=line,
    )


async def _compare(connection: PooledConnection, found: list[tuple[str, str]]) -> str | None:
    """Return the last migration that ran, and add findings for differences of the schema."""
    driver = connection.driver
    await driver.execute(f"SET LOCAL ROLE {ROLE}")
    revision = cast(
        "str | None", await driver.fetchval("SELECT max(version_num) FROM public.todo_db_version")
    )
    if revision is None or revision < REVISION:
        found.append(("migrations-behind", "public.todo_db_version"))
    elif revision == REVISION and all(code.startswith(_ELSEWHERE) for code, _ in found):
        await driver.execute(SETTINGS)
        found += differences(catalogued((row[0], row[1]) for row in await driver.fetch(STATEMENT)))
    return revision


def _parsed(url: SecretStr) -> Endpoint:
    return parse_url(url.get_secret_value())


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


def _finding(code: str, subject: str) -> Finding:
    check = CHECKS[code]
    return Finding(code, subject, check.problem, check.remedy.replace("{}", subject))
