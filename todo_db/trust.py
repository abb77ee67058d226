"""Whose credentials are accepted, as the settings say it."""

from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from todo_db.errors import ConfigurationError
from todo_db.origins import Origins, origin_of
from todo_db.settings import Settings

ALGORITHMS: Final[dict[str, tuple[str, str | None]]] = {
    "EdDSA": ("OKP", "Ed25519"),
    "ES256": ("EC", "P-256"),
    "ES512": ("EC", "P-521"),
    "RS256": ("RSA", None),
    "PS256": ("RSA", None),
}
"""The algorithms of the signatures of JWTs, and the type and curve of their keys."""
COOKIE: Final = "better-auth.session_token"
"""The name of the session's cookie; with https `__Secure-` is in front of it."""
NOT_SET: Final = (
    "BETTER_AUTH_SECRET and BETTER_AUTH_URL must be set, or NEON_AUTH_BASE_URL, or"
    " TODO_DB_JWKS_URL and TODO_DB_JWT_ISSUER"
)
"""What to do where the settings do not say whose credentials are accepted."""
_SECURE_COOKIE: Final = f"__Secure-{COOKIE}"


@dataclass(frozen=True, slots=True)
class Trust:
    """What a credential must have.

    Attributes:
        issuer: The claim `iss` of a JWT.
        audiences: One of these must be in the claim `aud`; without any it is not checked.
        jwks_url: Where the public keys are; None is the table `jwks`.
        secret: What Better Auth signs cookies with; None if it does not run on this database.
        cookies: Names of the session's cookie, the best first.
        origins: The pages that may send requests with the cookie.
    """

    issuer: str
    audiences: tuple[str, ...]
    jwks_url: str | None = field(repr=False)
    secret: bytes | None = field(repr=False)
    cookies: tuple[str, ...]
    origins: Origins

    def __str__(self) -> str:
        parts = [
            f"JWTs of the issuer {self.issuer}",
            f"for {' or '.join(self.audiences)}" if self.audiences else "for any audience",
            f"with keys from {_shown(self.jwks_url) if self.jwks_url else 'the table jwks'}",
        ]
        if self.secret is not None:
            parts.append(f"and sessions by the cookie {' or '.join(self.cookies)} or as a bearer")
        return " ".join(parts)


def is_set(settings: Settings) -> bool:
    """Return whether the settings say whose credentials are accepted."""
    return any(
        value is not None
        for value in (
            settings.better_auth_secret,
            settings.better_auth_secrets,
            settings.neon_auth_base_url,
            settings.jwks_url,
            settings.jwt_issuer,
        )
    )


def trust_of(settings: Settings) -> Trust:
    """Return whose credentials the settings accept.

    Raises:
        ConfigurationError: They do not say it, or contradict each other.
    """
    secret, url = _secret(settings), settings.better_auth_url
    if settings.neon_auth_base_url is not None:
        if secret is not None:
            raise ConfigurationError(
                "NEON_AUTH_BASE_URL and BETTER_AUTH_SECRET contradict each other: only Neon has"
                " the secret of its Better Auth"
            )
        return _of_neon(settings, settings.neon_auth_base_url)
    if url is None and (secret is not None or settings.jwt_issuer is None):
        raise ConfigurationError(NOT_SET)
    if secret is None and settings.jwks_url is None:
        raise ConfigurationError(
            "BETTER_AUTH_SECRET and BETTER_AUTH_URL must be set, or TODO_DB_JWKS_URL, which says"
            " where the issuer's keys are"
        )
    origin = None if url is None else origin_of(url, "BETTER_AUTH_URL")
    return Trust(
        issuer=settings.jwt_issuer or str(origin),
        audiences=_audiences(settings, origin),
        jwks_url=_checked(settings.jwks_url),
        secret=secret,
        cookies=() if secret is None else _cookies(settings, str(origin)),
        origins=_origins(settings, origin),
    )


def _of_neon(settings: Settings, base_url: str) -> Trust:
    origin = origin_of(base_url, "NEON_AUTH_BASE_URL")
    return Trust(
        issuer=settings.jwt_issuer or origin,
        audiences=_audiences(settings, origin),
        jwks_url=_checked(settings.jwks_url)
        or f"{base_url.strip().rstrip('/')}/.well-known/jwks.json",
        secret=None,
        cookies=(),
        origins=_origins(settings, None),
    )


def _secret(settings: Settings) -> bytes | None:
    """Return what signs cookies: the first of Better Auth's secrets, or its only one."""
    if settings.better_auth_secrets is not None:
        entry = settings.better_auth_secrets.get_secret_value().partition(",")[0]
        version, colon, secret = entry.partition(":")
        if not colon or not version.strip().isdecimal() or not secret.strip():
            raise ConfigurationError(
                "BETTER_AUTH_SECRETS must be a list like 2:new-secret,1:old-secret"
            )
        return secret.strip().encode()
    if settings.better_auth_secret is None:
        return None
    return settings.better_auth_secret.get_secret_value().encode() or None


def _audiences(settings: Settings, origin: str | None) -> tuple[str, ...]:
    if settings.jwt_audience or settings.jwt_issuer is not None or origin is None:
        return settings.jwt_audience
    return (origin,)


def _cookies(settings: Settings, origin: str) -> tuple[str, ...]:
    if settings.session_cookie is not None:
        return (settings.session_cookie,)
    # With https an attacker could have set the plain cookie over an unencrypted connection.
    return (_SECURE_COOKIE,) if origin.startswith("https:") else (_SECURE_COOKIE, COOKIE)


def _origins(settings: Settings, origin: str | None) -> Origins:
    listed = (*settings.better_auth_trusted_origins, *([] if origin is None else [origin]))
    return Origins.of(listed, strict=settings.strict_origin)


def _shown(url: str) -> str:
    """Return a URL without its parts that can be secret."""
    return f"{origin_of(url, 'TODO_DB_JWKS_URL')}{urlsplit(url).path}"


def _checked(url: str | None) -> str | None:
    if url is not None:
        origin_of(url, "TODO_DB_JWKS_URL")
    return url
