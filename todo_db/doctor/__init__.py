"""Is this database, URL and role safe: every known weakness, looked for on a live database."""

from asyncio import BaseTransport
from dataclasses import dataclass
from ipaddress import ip_address
from ssl import CERT_REQUIRED
from time import time
from typing import Final, Literal, cast

from pydantic import SecretStr

from todo_db.doctor.catalogue import SETTINGS, STATEMENT, catalogued, differences
from todo_db.doctor.checks import CHECKS, QUERY
from todo_db.engine import Endpoint, Pool, PooledConnection, parse_url
from todo_db.errors import translated
from todo_db.models import REVISION
from todo_db.settings import Settings
from todo_db.transaction import ROLE

_SKEW_SECONDS: Final = 5.0
_OLDEST: Final = 150_000
_SERVER: Final = """
    SELECT current_setting('server_version') AS version,
        current_setting('server_version_num')::integer AS number, pg_backend_pid() AS pid,
        extract(epoch FROM clock_timestamp())::float8 AS clock
"""
# After one of these nobody may ask which migrations have run.
_UNKNOWN: Final = frozenset({"login-not-member", "migrations-missing", "migrations-unreadable"})
# What begins like this is not about the schema; anything else explains why that differs.
_ELSEWHERE: Final = ("clock-", "direct-", "durability-weakened", "login-", "tls-", "user-")

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
        code: Which check found it; stable.
        subject: The name of the object that has it, or a line of the catalogue; nothing of a row.
        problem: What it opens, or breaks.
        remedy: What the owner does about it.
    """

    code: str
    subject: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was looked at, and what was found.

    Attributes:
        findings: The weaknesses, sorted; nothing is what it should be.
        server_version: As PostgreSQL says it, such as `18.4`.
        revision: The last migration that ran; None where that cannot be told.
        endpoint: Whether a pooler stands in front of the server.
        line: How the way to the server, or to its pooler, is protected.
    """

    findings: tuple[Finding, ...]
    server_version: str
    revision: str | None
    endpoint: Literal["pooled", "direct"]
    line: Line


async def examine(settings: Settings) -> Report:
    """Look for every known weakness, as the login of the application, over its own connection.

    Only reads, and needs no more than the login may read anyway: the system's catalogue. Of a
    server before PostgreSQL 15 it asks nothing but the version.

    At the end everything that the migrations made is compared with what is there: only at
    exactly the revision of this package, because a newer database may differ, and only if
    nothing else was found about the schema, because that explains the difference. Mend it first.

    Raises:
        ConfigurationError: A URL or the login is wrong.
        UnavailableError: The database cannot be reached.
    """
    pool = Pool(settings)
    try:
        connection = await pool.acquire()
        try:
            report = await _ask(connection, settings)
        finally:
            await pool.release(connection)
    except Exception as error:  # noqa: BLE001  # raised again, as ours
        failure = translated(error)
    else:
        return report
    finally:
        await pool.close()
    raise failure


async def _ask(connection: PooledConnection, settings: Settings) -> Report:
    driver = connection.driver
    line = _line(connection.transport)
    found = [(_WEAK[line], "the connection")] if line in _WEAK else []
    direct = settings.direct_database_url
    if direct is not None and _parsed(direct).is_pooled:
        found.append(("direct-pooled", "DIRECT_DATABASE_URL"))
    revision = None
    async with driver.transaction(readonly=True):
        # Nothing of the login's or of a temporary schema can pose as the catalogue, and every
        # name is printed with its schema.
        await driver.execute(f"{SETTINGS}; SET LOCAL search_path = pg_catalog, pg_temp")
        asked = time()
        (server,) = await driver.fetch(_SERVER)
        if not asked - _SKEW_SECONDS <= server["clock"] <= time() + _SKEW_SECONDS:
            found.append(("clock-skewed", "the server"))
        if server["number"] < _OLDEST:
            found.append(("server-old", "the server"))
        else:
            found += [(row[0], row[1]) for row in await driver.fetch(QUERY)]
            if not {code for code, _ in found} & _UNKNOWN:
                revision = await _compare(connection, found)
    place = _parsed(cast("SecretStr", settings.database_url))
    # PgBouncer names a process of its own. So does Neon's proxy, pooled or not.
    is_pooled = place.is_pooled if place.is_neon else server["pid"] != driver.get_server_pid()
    return Report(
        findings=tuple(sorted(_finding(code, subject) for code, subject in found)),
        server_version=server["version"].split()[0],
        revision=revision,
        endpoint="pooled" if is_pooled else "direct",
        line=line,
    )


async def _compare(connection: PooledConnection, found: list[tuple[str, str]]) -> str | None:
    """Return how far the migrations went, and add how the schema differs from what they made."""
    driver = connection.driver
    await driver.execute(f"SET LOCAL ROLE {ROLE}")
    revision = cast(
        "str | None", await driver.fetchval("SELECT max(version_num) FROM public.alembic_version")
    )
    if revision is None or revision < REVISION:
        found.append(("migrations-behind", "public.alembic_version"))
    elif revision == REVISION and all(code.startswith(_ELSEWHERE) for code, _ in found):
        await driver.execute(SETTINGS)
        found += differences(catalogued((row[0], row[1]) for row in await driver.fetch(STATEMENT)))
    return revision


def _parsed(url: SecretStr) -> Endpoint:
    return parse_url(url.get_secret_value())


def _line(transport: BaseTransport) -> Line:
    """Judge a connection by what it is, not by what the URL asked for."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return "unix socket"
    if ip_address(cast("str", peer[0])).is_loopback:
        return "this machine"
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        return "clear text"
    sound = tls.context.verify_mode is CERT_REQUIRED and tls.context.check_hostname
    return "TLS, verified" if sound else "TLS, not verified"


def _finding(code: str, subject: str) -> Finding:
    check = CHECKS[code]
    return Finding(code, subject, check.problem, check.remedy.replace("{}", subject))
