"""Verifies the credential of a request: a session of Better Auth, or a JWT of any issuer."""

import hmac
import logging
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import jwt

from todo_db import inputs
from todo_db.database import Database
from todo_db.errors import InvalidInputError, NotAuthenticatedError
from todo_db.keys import FetchedKeys, Keys, TableKeys
from todo_db.settings import Settings
from todo_db.trust import Trust, trust_of

# Better Auth's tokens have 32 characters; its JWTs contain the user, and have some hundred.
_LONGEST: Final = 8_192
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,512}")
_JWT_DOTS: Final = 2

_logger: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sent a request.

    Attributes:
        user_id: The user's id; for a JWT its claim `sub`.
        email: The e-mail address that a JWT contains; None for a session.
        name: The name that a JWT contains; None for a session.
        is_from_cookie: Whether a cookie was the credential. A browser adds cookies to requests of
            other pages too, so check where the page is from.
    """

    user_id: str
    email: str | None = None
    name: str | None = None
    is_from_cookie: bool = False


class Authenticator:
    """Verifies the credential of a request and returns its user.

    Attributes:
        trust: Whose credentials are accepted.

    Args:
        database: The database, with Better Auth's tables if it runs there.
        settings: `better_auth_secret` and `better_auth_url`, or `neon_auth_base_url`, or
            `jwks_url` and `jwt_issuer`.

    Raises:
        ConfigurationError: None of these is set, or they contradict each other.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self.trust: Final[Trust] = trust_of(settings)
        self._database = database
        self._keys: Keys = (
            TableKeys(database, settings.jwks_grace_period_seconds)
            if self.trust.jwks_url is None
            else FetchedKeys(self.trust.jwks_url)
        )
        self._has_warned = False

    @property
    def stores_its_users(self) -> bool:
        """Whether the issuer itself stores its users in `users`, as Better Auth does."""
        return self.trust.secret is not None

    async def user_id(self, *, cookie: str | None = None, authorization: str | None = None) -> str:
        """Return the id of the user who sent the request. See `identity`."""
        return (await self.identity(cookie=cookie, authorization=authorization)).user_id

    async def identity(
        self, *, cookie: str | None = None, authorization: str | None = None
    ) -> Identity:
        """Return the user who sent the request.

        A session costs one SELECT by unique index. A JWT costs one SELECT or one request for its
        key, unless the key was read in the last five minutes. The session of a JWT is not checked,
        so a JWT stays valid after a sign-out, and after its user is deleted, until it expires: 15
        minutes by Better Auth's default.

        Args:
            cookie: The whole header `Cookie`. The session's cookie must be signed.
            authorization: The header `Authorization`: `Bearer` and a session token, signed or
                not, or a JWT. With it, cookies are ignored. Other schemes are ignored.

        Raises:
            NotAuthenticatedError: The credential is missing or not valid. The reason is not
                disclosed.
            UnavailableError: The database, or the URL of the keys, did not answer.
        """
        bearer = _bearer(authorization)
        if bearer is None:
            token = self._verify_signature(self._cookie(cookie))
            return Identity(await self._from_session(token), is_from_cookie=True)
        if bearer.count(".") == _JWT_DOTS:
            return await self._from_jwt(bearer)
        token = self._verify_signature(bearer) if "." in bearer else bearer
        return Identity(await self._from_session(token))

    async def _from_session(self, token: str | None) -> str:
        if self.trust.secret is None or token is None or not _TOKEN.fullmatch(token):
            raise NotAuthenticatedError
        user_id = (await self._database.find_credential(session_token=token)).user_id
        if user_id is None:
            raise NotAuthenticatedError
        return user_id

    async def _from_jwt(self, token: str) -> Identity:
        key_id = _key_id(token)
        if key_id is None or not _TOKEN.fullmatch(key_id):
            raise NotAuthenticatedError
        key = await self._keys.find(key_id)
        claims = None if key is None else self._claims(token, key)
        # Neon and Better Auth's plugin `admin` put it into the token.
        if claims is None or claims.get("banned") is True:
            raise NotAuthenticatedError
        try:
            user_id = inputs.user_id(claims["sub"])
        except InvalidInputError:
            pass
        else:
            return Identity(user_id, _text(claims.get("email")), _text(claims.get("name")))
        raise NotAuthenticatedError

    def _claims(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any] | None:
        audiences = self.trust.audiences
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=audiences or None,
                issuer=self.trust.issuer,
                # The clocks of two machines differ, so only the expiry is checked.
                options={
                    "require": ["exp", "iss", "sub", *(["aud"] if audiences else [])],
                    "verify_iat": False,
                    "verify_aud": bool(audiences),
                },
            )
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError) as error:
            self._warn(type(error))
        except jwt.PyJWTError:
            pass
        return None

    def _warn(self, kind: type[jwt.PyJWTError]) -> None:
        """Say once that the settings may be wrong: a key of the issuer has signed the token."""
        if not self._has_warned:
            self._has_warned = True
            claim = "issuer" if kind is jwt.InvalidIssuerError else "audience"
            _logger.warning(
                "a JWT with a valid signature was refused: it has another %s",
                claim,
                extra={"event": "todo_db.jwt.refused", "claim": claim},
            )

    def _cookie(self, header: str | None) -> str | None:
        """Return the session's cookie: the first of its names that was sent."""
        found = dict(reversed(list(_cookies(header or ""))))
        return next((found[name] for name in self.trust.cookies if name in found), None)

    def _verify_signature(self, value: str | None) -> str | None:
        """Return the text before the signature, or None if the signature is not valid."""
        token, _, signature = unquote(value or "").rpartition(".")
        digest = hmac.digest(self.trust.secret or b"", token.encode(errors="replace"), "sha256")
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


def _text(claim: object) -> str | None:
    """Return a claim that is a text; an empty one says nothing."""
    return claim if isinstance(claim, str) and claim else None
