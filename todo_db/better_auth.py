"""Authentication by Better Auth's cookies, session tokens and JWTs, from its tables.

No request is sent to the Better Auth server. A session is looked up in the table `sessions`, and a
JWT is verified with a public key from the table `jwks`. `BETTER_AUTH_SECRET` only signs cookies, so
it cannot verify a JWT. Better Auth documents both formats:
https://www.better-auth.com/docs/concepts/session-management and …/plugins/jwt.
"""

import hmac
import json
import re
import time
from base64 import b64encode
from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote

import jwt

from todo_db import inputs
from todo_db.database import Database
from todo_db.errors import ConfigurationError, InvalidInputError, NotAuthenticatedError
from todo_db.settings import Settings

_COOKIE: Final = "better-auth.session_token"
_SECURE_COOKIE: Final = f"__Secure-{_COOKIE}"
# Better Auth's tokens have 32 characters; its JWTs contain the user, and have some hundred.
_LONGEST: Final = 8_192
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,512}")
_JWT_DOTS: Final = 2
# How long a cached key is used after it was retired or deleted.
_KEY_SECONDS: Final = 300.0
_ALGORITHM: Final = "EdDSA"
_CLAIMS: Final = ["aud", "exp", "iss", "sub"]


class Authenticator:
    """Verifies the credential of a request and returns the id of its user.

    Args:
        database: The database with Better Auth's tables.
        settings: With the `better_auth_secret` and `better_auth_url` of the Better Auth server.

    Raises:
        ConfigurationError: One of the two is not set.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        if settings.better_auth_secret is None or settings.better_auth_url is None:
            raise ConfigurationError("BETTER_AUTH_SECRET and BETTER_AUTH_URL must be set")
        self._database = database
        self._secret = settings.better_auth_secret.get_secret_value().encode()
        self._url = settings.better_auth_url
        self._keys: dict[str, tuple[float, jwt.PyJWK]] = {}

    async def user_id(self, *, cookie: str | None = None, authorization: str | None = None) -> str:
        """Return the id of the user who sent the request.

        A session costs one SELECT by unique index. A JWT costs one SELECT for its key, unless the
        key was read in the last five minutes. The session of a JWT is not checked, so a JWT stays
        valid after a sign-out, and after its user is deleted, until it expires: 15 minutes by
        Better Auth's default.

        Args:
            cookie: The whole header `Cookie`. The session's cookie must be signed.
            authorization: The header `Authorization`: `Bearer` and a session token, signed or
                not, or a JWT. With it, cookies are ignored. Other schemes are ignored.

        Raises:
            NotAuthenticatedError: The credential is missing or not valid. The reason is not
                disclosed.
            UnavailableError: The database did not answer.
        """
        bearer = _bearer(authorization)
        if bearer is None:
            return await self._from_session(self._verify_signature(self._cookie(cookie)))
        if bearer.count(".") == _JWT_DOTS:
            return await self._from_jwt(bearer)
        return await self._from_session(self._verify_signature(bearer) if "." in bearer else bearer)

    async def _from_session(self, token: str | None) -> str:
        if token is None or not _TOKEN.fullmatch(token):
            raise NotAuthenticatedError
        user_id, _ = await self._database.find_credential(session_token=token)
        if user_id is None:
            raise NotAuthenticatedError
        return user_id

    async def _from_jwt(self, token: str) -> str:
        key = await self._key(_key_id(token))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                audience=self._url,
                issuer=self._url,
                # The clocks of two machines differ, so only the expiry is checked.
                options={"require": _CLAIMS, "verify_iat": False},
            )
            return inputs.user_id(claims["sub"])
        except (jwt.PyJWTError, InvalidInputError):
            pass
        raise NotAuthenticatedError

    async def _key(self, key_id: str | None) -> jwt.PyJWK:
        if key_id is None or not _TOKEN.fullmatch(key_id):
            raise NotAuthenticatedError
        until, key = self._keys.get(key_id, (0.0, None))
        if key is None or until < time.monotonic():
            self._keys.pop(key_id, None)
            _, public_key = await self._database.find_credential(key_id=key_id)
            key = _verifying_key(public_key)
            if key is None:
                raise NotAuthenticatedError
            self._keys[key_id] = (time.monotonic() + _KEY_SECONDS, key)
        return key

    def _cookie(self, header: str | None) -> str | None:
        """Return the session's cookie; with an https URL only the `__Secure-` one."""
        found = dict(reversed(list(_cookies(header or ""))))
        plain = None if self._url.startswith("https:") else found.get(_COOKIE)
        return found.get(_SECURE_COOKIE, plain)

    def _verify_signature(self, value: str | None) -> str | None:
        """Return the text before the signature, or None if the signature is not valid."""
        token, _, signature = unquote(value or "").rpartition(".")
        digest = hmac.digest(self._secret, token.encode(errors="replace"), "sha256")
        sound = hmac.compare_digest(b64encode(digest), signature.encode(errors="replace"))
        return token if sound else None


def _bearer(header: str | None) -> str | None:
    scheme, _, credential = (header or "").strip().partition(" ")
    if scheme.lower() != "bearer":
        return None
    return credential.strip() if len(credential) <= _LONGEST else ""


def _cookies(header: str) -> Iterator[tuple[str, str]]:
    for pair in header[: 2 * _LONGEST].split(";"):
        name, _, value = pair.partition("=")
        yield name.strip(), value.strip().strip('"')


def _key_id(token: str) -> str | None:
    try:
        return jwt.get_unverified_header(token).get("kid")
    except Exception:  # noqa: BLE001  # a malformed token can raise any exception here
        return None


def _verifying_key(public_key: str | None) -> jwt.PyJWK | None:
    try:
        return jwt.PyJWK(dict(json.loads(public_key or "{}")), algorithm=_ALGORITHM)
    except (jwt.PyJWTError, RecursionError, TypeError, ValueError):
        # There is no such key, or it is for another algorithm, which is not supported here.
        return None
