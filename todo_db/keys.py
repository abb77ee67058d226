"""The public keys that verify JWTs, from the table `jwks` or from a URL."""

import asyncio
import json
import logging
import time
from typing import Any, Final, Protocol, cast

import jwt

from todo_db.database import Database
from todo_db.errors import UnavailableError
from todo_db.trust import ALGORITHMS

# How long a key is used before it is read again.
_FRESH_SECONDS: Final = 300.0
# How long the keys of a URL are used while it does not answer.
_STALE_SECONDS: Final = 3_600.0
_FETCH_SECONDS: Final = 5.0
# How long a failure counts, and how often unknown ids may cause a request at most.
_PAUSE_SECONDS: Final = 5.0

_logger: Final = logging.getLogger(__name__)


class Keys(Protocol):
    """Finds the key with an id."""

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key, or None if there is no such key.

        Raises:
            UnavailableError: The keys could not be read.
        """
        ...


class TableKeys:
    """The keys of the table `jwks`, which Better Auth writes.

    Args:
        database: The database with the table.
        grace_period_seconds: How long a key is used after it expired.
    """

    def __init__(self, database: Database, grace_period_seconds: int) -> None:
        self._database = database
        self._grace_period = grace_period_seconds
        self._keys: dict[str, tuple[float, jwt.PyJWK]] = {}

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key of a row: one SELECT, unless it was read in the last five minutes."""
        until, key = self._keys.get(key_id, (0.0, None))
        if key is None or until < time.monotonic():
            self._keys.pop(key_id, None)
            row = await self._database.find_credential(key_id=key_id)
            key = verifying_key(_parsed(row.public_key), row.algorithm)
            if key is None:
                return None
            left = _FRESH_SECONDS
            if row.expires_at is not None:
                left = min(left, row.expires_at + self._grace_period - time.time())
            if left <= 0:
                return None
            self._keys[key_id] = (time.monotonic() + left, key)
        return key


class FetchedKeys:
    """The keys behind a URL, a JWK Set as OpenID issuers publish it.

    They are fetched at first use, again every five minutes, and for an unknown id, but not twice in
    five seconds. While the URL does not answer, known keys are used for an hour.

    Args:
        url: An http or https URL. Redirects are not followed.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=_FETCH_SECONDS)
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._failed_at = float("-inf")
        self._fetching: asyncio.Task[bool] | None = None

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key with the id; fetch the keys if they are old or the id is unknown."""
        age = time.monotonic() - self._fetched_at
        is_fresh = age < (_FRESH_SECONDS if key_id in self._keys else _PAUSE_SECONDS)
        if is_fresh or await self._fetched():
            return self._keys.get(key_id)
        if key_id in self._keys and age < _STALE_SECONDS:
            return self._keys[key_id]
        raise UnavailableError(
            "the public keys of the issuer could not be fetched", retry_after=_PAUSE_SECONDS
        )

    async def _fetched(self) -> bool:
        """Fetch the keys, together with every other call that waits for them."""
        if time.monotonic() - self._failed_at < _PAUSE_SECONDS:
            return False
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        fetching = self._fetching
        # A call that is cancelled, or waited for too long, does not stop it for the others. It
        # cannot be stopped either: a thread runs it.
        done, _ = await asyncio.wait({fetching}, timeout=_FETCH_SECONDS)
        if not done:
            self._failed_at = time.monotonic()
        return bool(done) and fetching.result()

    async def _fetch(self) -> bool:
        try:
            fetched = await asyncio.to_thread(self._client.fetch_data)
            self._keys = _usable(fetched)
        except (jwt.PyJWTError, OSError, ValueError, RecursionError) as error:
            self._failed_at = time.monotonic()
            _logger.warning(
                "the public keys could not be fetched: %s",
                type(error).__name__,
                extra={"event": "todo_db.keys.failed", "reason": type(error).__name__},
            )
            return False
        else:
            self._fetched_at = time.monotonic()
            return True
        finally:
            self._fetching = None


def verifying_key(entry: object, algorithm: str | None = None) -> jwt.PyJWK | None:
    """Return a public key that verifies signatures of one algorithm, its own.

    Args:
        entry: A JWK, after JSON.
        algorithm: Its algorithm, if the entry does not have one.

    Returns:
        None if it is no such key: a symmetric one, say, or one of an unknown type.
    """
    if not isinstance(entry, dict):
        return None
    key = cast("dict[str, Any]", entry)
    kind = (key.get("kty"), None if key.get("kty") == "RSA" else key.get("crv"))
    name = key.get("alg") or algorithm or next((n for n, k in ALGORITHMS.items() if k == kind), "")
    if not isinstance(name, str) or ALGORITHMS.get(name) != kind or key.get("use", "sig") != "sig":
        return None
    try:
        return jwt.PyJWK(key, algorithm=name)
    except (jwt.PyJWTError, TypeError, ValueError):
        return None


def _usable(fetched: Any) -> dict[str, jwt.PyJWK]:  # noqa: ANN401  # JSON
    """Return the usable keys of a JWK Set, by their ids."""
    found: dict[str, jwt.PyJWK] = {}
    entries = fetched.get("keys")
    for entry in cast("list[object]", entries) if isinstance(entries, list) else []:
        key = verifying_key(entry)
        if key is not None and isinstance(key.key_id, str):
            found[key.key_id] = key
    if not found:
        raise ValueError("no usable key")
    return found


def _parsed(public_key: str | None) -> object:
    try:
        return json.loads(public_key or "null")
    except (RecursionError, ValueError):
        return None
