"""Is this database, URL and role safe: every known weakness, looked for on a live database."""

from asyncio import BaseTransport
from dataclasses import dataclass
from ipaddress import ip_address
from ssl import CERT_REQUIRED
from time import time
from typing import Final, cast

from todo_db.doctor.checks import CHECKS, QUERY
from todo_db.engine import Lease, Pool
from todo_db.errors import translated
from todo_db.models import REVISION
from todo_db.settings import Settings
from todo_db.transaction import ROLE

_SKEW_SECONDS: Final = 5.0
# After one of these nobody may ask which migrations have run.
_UNKNOWN: Final = frozenset({"login-not-member", "migrations-missing", "migrations-unreadable"})


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One weakness.

    Attributes:
        code: Which check found it; stable.
        subject: The name of the object that has it, never a value.
        problem: What it opens, or breaks.
        remedy: What the owner does about it.
    """

    code: str
    subject: str
    problem: str
    remedy: str


async def examine(settings: Settings) -> list[Finding]:
    """Look for every known weakness, as the login of the application, over its own connection.

    Only reads, and needs no more than the login may read anyway: the system's catalogue.

    Returns:
        What was found, sorted; nothing is what it should be.

    Raises:
        ConfigurationError: The URL or the login is wrong.
        UnavailableError: The database cannot be reached.
    """
    pool = Pool(settings)
    try:
        lease = await pool.acquire()
        try:
            found = await _ask(lease)
        finally:
            await pool.release(lease)
    except Exception as error:  # noqa: BLE001  # raised again, as ours
        failure = translated(error)
    else:
        return sorted(_finding(code, subject) for code, subject in found)
    finally:
        await pool.close()
    raise failure


async def _ask(lease: Lease) -> list[tuple[str, str]]:
    """Return code and subject of each finding."""
    driver = lease.driver
    found: list[tuple[str, str]] = []
    if weakness := _line_weakness(lease.transport):
        found.append((weakness, "the connection"))
    async with driver.transaction(readonly=True):
        # Nothing of the login's or of a temporary schema can pose as the catalogue, and every
        # name is printed with its schema.
        await driver.execute("SET LOCAL search_path = pg_catalog, pg_temp")
        asked = time()
        clock = await driver.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        if not asked - _SKEW_SECONDS <= clock <= time() + _SKEW_SECONDS:
            found.append(("clock-skewed", "the server"))
        found += [(row[0], row[1]) for row in await driver.fetch(QUERY)]
        if not {code for code, _ in found} & _UNKNOWN:
            await driver.execute(f"SET LOCAL ROLE {ROLE}")
            revision = await driver.fetchval("SELECT max(version_num) FROM public.alembic_version")
            if revision is None or revision < REVISION:
                found.append(("migrations-behind", "public.alembic_version"))
    return found


def _line_weakness(transport: BaseTransport) -> str | None:
    """Judge a connection by what it is, not by what the URL asked for."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or ip_address(cast("str", peer[0])).is_loopback:
        return None
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        return "tls-missing"
    sound = tls.context.verify_mode is CERT_REQUIRED and tls.context.check_hostname
    return None if sound else "tls-unverified"


def _finding(code: str, subject: str) -> Finding:
    check = CHECKS[code]
    return Finding(code, subject, check.problem, check.remedy.replace("{}", subject))
