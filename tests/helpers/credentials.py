"""Credentials like those of Better Auth, and forged ones of attackers.

They follow https://www.better-auth.com/docs/concepts/session-management and …/plugins/jwt.
`test_better_auth_server` checks those of the real Better Auth.
"""

import base64
import hmac
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Final
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from driver import Connection

SECRET: Final = "the-secret-of-these-tests-alone-0123456789"  # noqa: S105  # it opens nothing
URL: Final = "http://localhost:3000"
COOKIE: Final = "better-auth.session_token"
SECURE_COOKIE: Final = f"__Secure-{COOKIE}"
_HOUR: Final = 3_600
_RSA: Final = rsa.generate_private_key(65_537, 2_048)
_P256: Final = ec.generate_private_key(ec.SECP256R1())
_P521: Final = ec.generate_private_key(ec.SECP521R1())

type Json = dict[str, Any]
type Sign = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Credential:
    """The two headers that can contain a credential."""

    cookie: str | None = None
    authorization: str | None = None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers, without any check of their values."""
        sent = (("cookie", self.cookie), ("authorization", self.authorization))
        return [
            (name.encode(), value.encode(errors="surrogatepass"))
            for name, value in sent
            if value is not None
        ]


@dataclass(frozen=True)
class Key:
    """A signing key of Better Auth, and the id of its row."""

    id: str = field(default_factory=lambda: token_hex(16))
    private: ed25519.Ed25519PrivateKey = field(default_factory=ed25519.Ed25519PrivateKey.generate)

    @property
    def public_bytes(self) -> bytes:
        return self.private.public_key().public_bytes_raw()

    @property
    def jwk(self) -> Json:
        return {"kty": "OKP", "crv": "Ed25519", "x": b64url(self.public_bytes)}

    @property
    def header(self) -> Json:
        return {"alg": "EdDSA", "kid": self.id}

    def jwt(self, **changes: object) -> str:
        """Sign alice's claims; None removes a claim."""
        return jwt(self.header, claims(**changes), self.private.sign)


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwt(header: Json | str, payload: Json | str, sign: Sign) -> str:
    """Return a JWT, also one that no library would create."""
    parts = (part if isinstance(part, str) else json.dumps(part) for part in (header, payload))
    told = ".".join(b64url(part.encode()) for part in parts)
    return f"{told}.{b64url(sign(told.encode()))}"


def claims(**changes: object) -> Json:
    """Return Better Auth's claims about alice; None removes a claim."""
    now = int(time.time())
    usual = {
        "sub": "alice",
        "iss": URL,
        "aud": URL,
        "iat": now,
        "exp": now + 900,
        "id": "alice",
        "email": "alice@example.org",
    }
    return {name: value for name, value in (usual | changes).items() if value is not None}


def signed(token: str, secret: str = SECRET) -> str:
    """Return the value of Better Auth's cookie, before it is percent-encoded."""
    digest = hmac.digest(secret.encode(), token.encode(), "sha256")
    return f"{token}.{base64.b64encode(digest).decode()}"


def cookie(value: str, name: str = COOKIE) -> Credential:
    return Credential(cookie=f"{name}={quote(value, safe='')}")


def bearer(credential: str) -> Credential:
    return Credential(authorization=f"Bearer {credential}")


def altered(text: str) -> Iterator[str]:
    """Yield the text with each of its characters changed in turn."""
    for index, char in enumerate(text):
        if char not in ".=":
            yield f"{text[:index]}{'A' if char != 'A' else 'B'}{text[index + 1 :]}"


def truncated(text: str) -> Iterator[str]:
    return (text[:length] for length in range(len(text)))


def _rsa_jwk() -> Json:
    numbers = _RSA.public_key().public_numbers()
    n, e = (b64url(n.to_bytes((n.bit_length() + 7) // 8)) for n in (numbers.n, numbers.e))
    return {"kty": "RSA", "n": n, "e": e}


def _ec_jwk(key: ec.EllipticCurvePrivateKey, curve: str, size: int) -> Json:
    point = key.public_key().public_numbers()
    x, y = (b64url(n.to_bytes(size)) for n in (point.x, point.y))
    return {"kty": "EC", "crv": curve, "x": x, "y": y}


# By their algorithm, which Better Auth stores beside the key.
JWKS: Final[dict[str, Json]] = {
    "RS256": _rsa_jwk(),
    "PS256": _rsa_jwk(),
    "ES256": _ec_jwk(_P256, "P-256", 32),
    "ES512": _ec_jwk(_P521, "P-521", 66),
}
# Keys with an algorithm that is not theirs, or that is not accepted.
MISLABELLED: Final[dict[str, tuple[Json, str | None]]] = {
    "RSA for EdDSA": (JWKS["RS256"], "EdDSA"),
    "RSA for HS256": (JWKS["RS256"], "HS256"),
    "RSA for RS512": (JWKS["RS256"], "RS512"),
    "P-256 for ES512": (JWKS["ES256"], "ES512"),
    "P-521 for ES256": (JWKS["ES512"], "ES256"),
    "RSA for encryption": (JWKS["RS256"] | {"use": "enc"}, "RS256"),
    "RSA that says HS256": (JWKS["RS256"] | {"alg": "HS256"}, "RS256"),
    "RSA with a junk algorithm": (JWKS["RS256"] | {"alg": [1]}, "RS256"),
}


# Values of `jwks.public_key` that are not a usable key.
NO_KEYS: Final[dict[str, str]] = {
    "another algorithm": json.dumps(
        {"kty": "EC", "crv": "P-256", "x": b64url(bytes(32)), "y": b64url(bytes(32))}
    ),
    "another curve": json.dumps(
        {
            "kty": "OKP",
            "crv": "X25519",
            "x": b64url(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw()),
        }
    ),
    "a secret": json.dumps({"kty": "oct", "k": b64url(SECRET.encode())}),
    "an empty object": "{}",
    "a list": "[]",
    "a null": "null",
    "a number": "1",
    "nothing": "",
    "no JSON": "junk",
    "deep JSON": "[" * 200_000,
    "a key of a junk type": json.dumps({"kty": 1}),
    "a key without its point": json.dumps({"kty": "OKP", "crv": "Ed25519"}),
    "a point of a junk type": json.dumps({"kty": "OKP", "crv": "Ed25519", "x": 1}),
    "a short point": json.dumps({"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}),
}


@dataclass(frozen=True)
class Issued:
    """The rows of Better Auth's tables: alice's sessions, and the signing keys."""

    token: str = field(default_factory=lambda: token_hex(16))
    session_id: str = field(default_factory=lambda: token_hex(16))
    expired: str = field(default_factory=lambda: token_hex(16))
    deleted: str = field(default_factory=lambda: token_hex(16))
    key: Key = field(default_factory=Key)
    other_key: Key = field(default_factory=Key)
    retired_key: Key = field(default_factory=Key)
    old_key: Key = field(default_factory=Key)
    ids: dict[str, str] = field(
        default_factory=lambda: {name: token_hex(16) for name in (*JWKS, *MISLABELLED)}
    )


async def add_user(owner: Connection, user_id: str) -> None:
    await owner.execute(
        "INSERT INTO users (id, email, name) VALUES ($1, $2, '')", user_id, f"{user_id}@example.org"
    )


async def add_session(
    owner: Connection,
    user_id: str,
    *,
    token: str | None = None,
    session_id: str | None = None,
    seconds: int = _HOUR,
) -> str:
    """Store a session of a user; return its token."""
    token = token or token_hex(16)
    await owner.execute(
        "INSERT INTO sessions (id, user_id, token, expires_at)"
        " VALUES ($1, $2, $3, now() + make_interval(secs => $4))",
        session_id or token_hex(16),
        user_id,
        token,
        seconds,
    )
    return token


async def add_key(
    owner: Connection,
    key_id: str,
    public_key: str,
    *,
    algorithm: str | None = None,
    expires_days: int | None = None,
) -> None:
    await owner.execute(
        "INSERT INTO jwks (id, public_key, private_key, alg, expires_at)"
        " VALUES ($1, $2, '', $3, now() + make_interval(days => $4))",
        key_id,
        public_key,
        algorithm,
        expires_days,
    )


def _named(name: str) -> str:
    return name.replace(" ", "-")


async def issue(owner: Connection) -> Issued:
    """Store sessions and keys in a database that has alice, as Better Auth does."""
    issued = Issued()
    await add_session(owner, "alice", token=issued.token, session_id=issued.session_id)
    await add_session(owner, "alice", token=issued.expired, seconds=-1)
    await add_session(owner, "alice", token=issued.deleted)
    await owner.execute("DELETE FROM sessions WHERE token = $1", issued.deleted)
    for key, days in (
        (issued.key, None),
        (issued.other_key, None),
        (issued.retired_key, -29),
        (issued.old_key, -31),
    ):
        await add_key(owner, key.id, json.dumps(key.jwk), expires_days=days)
    for name, key_id in issued.ids.items():
        jwk, algorithm = (JWKS[name], name) if name in JWKS else MISLABELLED[name]
        await add_key(owner, key_id, json.dumps(jwk), algorithm=algorithm)
    for name, public_key in NO_KEYS.items():
        await add_key(owner, _named(name), public_key)
    return issued


def accepted(issued: Issued) -> dict[str, Credential]:
    """Return alice's valid credentials, by name; the plain cookie only for an http URL."""
    return {
        "cookie": cookie(signed(issued.token)),
        "secure cookie": cookie(signed(issued.token), SECURE_COOKIE),
        "cookie between others": Credential(
            cookie=f"a=b; c; =d;{cookie(signed(issued.token)).cookie} ;e=f"
        ),
        "both cookies": Credential(
            cookie=f"{COOKIE}=junk; {cookie(signed(issued.token), SECURE_COOKIE).cookie}"
        ),
        "first of two cookies": Credential(
            cookie=f"{cookie(signed(issued.token)).cookie}; {COOKIE}=junk"
        ),
        "cookie not percent-encoded": Credential(cookie=f"{COOKIE}={signed(issued.token)}"),
        "cookie in quotes": Credential(cookie=f'{COOKIE}="{quote(signed(issued.token), safe="")}"'),
        "cookie beside another scheme": Credential(
            cookie(signed(issued.token)).cookie, "Basic YWxpY2U6c2VjcmV0"
        ),
        "bearer session token": bearer(issued.token),
        "bearer signed session token": bearer(signed(issued.token)),
        "bearer signed and percent-encoded": bearer(quote(signed(issued.token), safe="")),
        "bearer in any case": Credential(authorization=f"bEARER   {issued.token} "),
        "bearer before a junk cookie": Credential(f"{COOKIE}=junk", f"Bearer {issued.token}"),
        "jwt": bearer(issued.key.jwt()),
        "jwt of the other key": bearer(issued.other_key.jwt()),
        "jwt of a key retired 29 days ago": bearer(issued.retired_key.jwt()),
        "jwt for several audiences": bearer(issued.key.jwt(aud=["https://other.example.org", URL])),
        "jwt by a server whose clock is ahead": bearer(issued.key.jwt(iat=int(time.time()) + 60)),
        **{f"jwt by {name}": by(name, issued.ids[name]) for name in JWKS},
    }


def _unsigned(_message: bytes) -> bytes:
    return b""


def _zeros(_message: bytes) -> bytes:
    return bytes(64)


def _by_hmac(key: bytes) -> Sign:
    return lambda message: hmac.digest(key, message, "sha256")


def _by_rsa(message: bytes) -> bytes:
    return _RSA.sign(message, padding.PKCS1v15(), SHA256())


def _by_pss(message: bytes) -> bytes:
    return _RSA.sign(message, padding.PSS(padding.MGF1(SHA256()), SHA256().digest_size), SHA256())


def _raw(signature: bytes, size: int) -> bytes:
    return b"".join(number.to_bytes(size) for number in decode_dss_signature(signature))


def _by_p256(message: bytes) -> bytes:
    return _raw(_P256.sign(message, ec.ECDSA(SHA256())), 32)


def _by_p521(message: bytes) -> bytes:
    return _raw(_P521.sign(message, ec.ECDSA(SHA512())), 66)


SIGNED_BY: Final[dict[str, Sign]] = {
    "ES256": _by_p256,
    "ES512": _by_p521,
    "RS256": _by_rsa,
    "PS256": _by_pss,
}


def by(algorithm: str, key_id: str, **changes: object) -> Credential:
    """Return a JWT of a key of another kind than `Key`."""
    header = {"alg": algorithm, "kid": key_id}
    return bearer(jwt(header, claims(**changes), SIGNED_BY[algorithm]))


def _with_header(key: Key, **changes: object) -> Credential:
    header = {name: value for name, value in (key.header | changes).items() if value is not None}
    return bearer(jwt(header, claims(), key.private.sign))


def _with_payload(key: Key, payload: str) -> Credential:
    return bearer(jwt(key.header, payload, key.private.sign))


_ATTACKER: Final = Key()
_FORGED: Final[Sign] = _ATTACKER.private.sign
_FAR: Final = 2**40
_ALGORITHMS: Final[list[Any]] = ["none", "None", "NONE", "", "EdDSA", "junk", None, 1, [], {}]
_PLACES: Final[list[Any]] = [
    *(None, "", "http", 1, {}),
    *(URL[:-1], f"{URL}/", URL.upper(), "https://evil.example.org"),
]
_CLAIMS: Final[dict[str, list[Any]]] = {
    "exp": [None, 0, -1, True, "soon", [], {}, float("nan"), float("-inf"), float("inf")],
    "nbf": [_FAR, "never", []],
    "iss": [*_PLACES, [URL]],
    "aud": [*_PLACES, [], ["https://evil.example.org"], [URL, 1], list(URL)],
    "sub": [None, "", " ", "\u200b", 1, True, [], ["alice"], {}, "a" * 300, "a\x00", "\ud800"],
}
_HEADERS: Final[dict[str, Json]] = {
    "jwk": {"jwk": _ATTACKER.jwk | {"kid": _ATTACKER.id}},
    "jku": {"jku": "http://localhost:1/jwks"},
    "x5u": {"x5u": "http://localhost:1/x5u"},
    "x5c": {"x5c": [b64url(_ATTACKER.public_bytes)]},
}
_JUNK: Final = {
    "junk": "junk",
    "dots": "...",
    "two dots": "..",
    "percent": "%",
    "a surrogate": "\ud800.\udfff",
    "a NUL": "\x00",
    "an encoded NUL": "%00.%00",
    "no ASCII": "ключ.ключ",
    "a megabyte": "A" * 2**20,
    "a megabyte of dots": "." * 2**20,
    "a jwt of a megabyte": ".".join(["A" * 2**18] * 3),
}


def _refused_sessions(issued: Issued) -> dict[str, Credential]:
    return {
        "nothing": Credential(),
        "empty headers": Credential("", ""),
        "another cookie": cookie(signed(issued.token), "session_token"),
        "cookie's name in another case": cookie(signed(issued.token), COOKIE.upper()),
        "empty cookie": cookie(""),
        "unsigned cookie": cookie(issued.token),
        "cookie with an empty signature": cookie(f"{issued.token}."),
        "signature of nothing": cookie(signed("")),
        "tampered token": cookie(f"B{signed(issued.token)[1:]}"),
        "signature of another token": cookie(
            f"{issued.token}.{signed(issued.expired).partition('.')[2]}"
        ),
        "signature without padding": cookie(signed(issued.token).rstrip("=")),
        "signature with more padding": cookie(f"{signed(issued.token)}="),
        "signature in hex": cookie(
            f"{issued.token}.{hmac.digest(SECRET.encode(), issued.token.encode(), 'sha256').hex()}"
        ),
        "signed with another secret": cookie(signed(issued.token, "another")),
        "signed with an empty secret": cookie(signed(issued.token, "")),
        "percent-encoded twice": cookie(quote(signed(issued.token), safe="")),
        "first of two cookies is junk": Credential(
            cookie=f"{COOKIE}=junk; {cookie(signed(issued.token)).cookie}"
        ),
        "junk in the secure cookie": Credential(
            cookie=f"{cookie(signed(issued.token)).cookie}; {SECURE_COOKIE}=junk"
        ),
        "expired session in a cookie": cookie(signed(issued.expired)),
        "expired session": bearer(issued.expired),
        "deleted session in a cookie": cookie(signed(issued.deleted)),
        "deleted session": bearer(issued.deleted),
        "id of the session in a cookie": cookie(signed(issued.session_id)),
        "id of the session": bearer(issued.session_id),
        "id of the user": bearer("alice"),
        "id of a key": bearer(issued.key.id),
        "token in another case": bearer(issued.token.swapcase()),
        "pattern instead of a token": bearer("%"),
        "sql instead of a token": bearer("'OR'1'='1"),
        "signed sql instead of a token": cookie(signed("' OR true --")),
        "tampered bearer signature": bearer(
            f"{issued.token}.{next(altered(signed(issued.token).partition('.')[2]))}"
        ),
        "bearer with an empty signature": bearer(f"{issued.token}."),
        "empty bearer beside a good cookie": Credential(
            cookie(signed(issued.token)).cookie, "Bearer "
        ),
        "junk bearer beside a good cookie": Credential(
            cookie(signed(issued.token)).cookie, "Bearer junk"
        ),
        "bearer without a blank": Credential(authorization=f"Bearer{issued.token}"),
        "two bearers": bearer(f"{issued.token} {issued.token}"),
        "token without a scheme": Credential(authorization=issued.token),
        "another scheme": Credential(authorization=f"Basic {issued.token}"),
        "proxy's scheme": Credential(authorization=f"Token {issued.token}"),
    }


def _refused_jwts(issued: Issued) -> dict[str, Credential]:
    return {
        **{
            f"alg {alg!r} without a signature": bearer(
                jwt({"alg": alg, "kid": issued.key.id}, claims(), _unsigned)
            )
            for alg in _ALGORITHMS
        },
        "no alg": _with_header(issued.key, alg=None),
        "alg none with a signature": _with_header(issued.key, alg="none"),
        "alg in another case": _with_header(issued.key, alg="EDDSA"),
        "alg a list": _with_header(issued.key, alg=["EdDSA"]),
        "HS256 by the secret": bearer(
            jwt({"alg": "HS256", "kid": issued.key.id}, claims(), _by_hmac(SECRET.encode()))
        ),
        "HS256 by the public key": bearer(
            jwt({"alg": "HS256", "kid": issued.key.id}, claims(), _by_hmac(issued.key.public_bytes))
        ),
        "HS256 by the public key's JWK": bearer(
            jwt(
                {"alg": "HS256", "kid": issued.key.id},
                claims(),
                _by_hmac(json.dumps(issued.key.jwk).encode()),
            )
        ),
        "HS256 by the public key's PEM": bearer(
            jwt(
                {"alg": "HS256", "kid": issued.key.id},
                claims(),
                _by_hmac(
                    issued.key.private.public_key().public_bytes(
                        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
                    )
                ),
            )
        ),
        "HS256 that says EdDSA": bearer(
            jwt(issued.key.header, claims(), _by_hmac(issued.key.public_bytes))
        ),
        "HS256 by a secret among the keys": bearer(
            jwt({"alg": "HS256", "kid": "a-secret"}, claims(), _by_hmac(SECRET.encode()))
        ),
        "RS256": bearer(jwt({"alg": "RS256", "kid": issued.key.id}, claims(), _by_rsa)),
        "RS256 that says EdDSA": bearer(
            jwt({"alg": "EdDSA", "kid": issued.ids["RS256"]}, claims(), _by_rsa)
        ),
        "PS256 by a key for RS256": by("PS256", issued.ids["RS256"]),
        "RS256 by a key for PS256": by("RS256", issued.ids["PS256"]),
        "RS256 that says PS256": bearer(
            jwt({"alg": "PS256", "kid": issued.ids["PS256"]}, claims(), _by_rsa)
        ),
        "ES256 by a key for ES512": by("ES256", issued.ids["ES512"]),
        "EdDSA by the attacker for ES256": bearer(
            jwt({"alg": "EdDSA", "kid": issued.ids["ES256"]}, claims(), _FORGED)
        ),
        "HS256 by the RSA key's modulus": bearer(
            jwt(
                {"alg": "HS256", "kid": issued.ids["RS256"]},
                claims(),
                _by_hmac(json.dumps(JWKS["RS256"]).encode()),
            )
        ),
        **{
            f"key of {name}, by {algorithm}": by(algorithm, issued.ids[name])
            for name in MISLABELLED
            for algorithm in SIGNED_BY
        },
        **{f"{algorithm} by another key": by(algorithm, issued.key.id) for algorithm in SIGNED_BY},
        "jwt of a banned user": bearer(issued.key.jwt(banned=True)),
        "no kid": _with_header(issued.key, kid=None),
        "kid null": bearer(jwt({"alg": "EdDSA", "kid": None}, claims(), issued.key.private.sign)),
        **{
            f"kid {name}": _with_header(issued.key, kid=kid)
            for name, kid in {
                "unknown": "unknown",
                "empty": "",
                "a number": 1,
                "a flag": True,
                "a list": [],
                "an object": {"a": "b"},
                "with SQL": "' OR true --",
                "with SQL but no blank": "'OR(true)--",
                "a pattern": "%",
                "a path": "../../../dev/null",
                "a NUL": "\x00",
                "a surrogate": "\ud800",
                "long": "A" * 1_000,
                "of a user": "alice",
            }.items()
        },
        **{f"public key {name}": _with_header(issued.key, kid=_named(name)) for name in NO_KEYS},
        **{
            f"attacker's key in the header as {name}{of}": bearer(
                jwt({"alg": "EdDSA", "kid": kid or issued.key.id} | more, claims(), _FORGED)
            )
            for of, kid in {"": None, ", of its own id": _ATTACKER.id}.items()
            for name, more in _HEADERS.items()
        },
        "signed by the attacker": bearer(jwt(issued.key.header, claims(), _FORGED)),
        "signed by another key": bearer(
            jwt(issued.key.header, claims(), issued.other_key.private.sign)
        ),
        "signed by a key retired 31 days ago": bearer(issued.old_key.jwt()),
        "signature of another jwt": bearer(
            jwt(issued.key.header, claims(sub="bob"), _unsigned) + issued.key.jwt().split(".")[2]
        ),
        "signature of zeros": bearer(jwt(issued.key.header, claims(), _zeros)),
        "signature twice": bearer(
            jwt(issued.key.header, claims(), lambda text: issued.key.private.sign(text) * 2)
        ),
        "a cookie with a jwt": cookie(issued.key.jwt()),
        "a cookie with a signed jwt": cookie(signed(issued.key.jwt())),
        "a signed jwt": bearer(signed(issued.key.jwt())),
        "payload not signed": bearer(
            jwt(issued.key.header | {"b64": False, "crit": ["b64"]}, "", issued.key.private.sign)
        ),
        "an extension that is critical": _with_header(issued.key, crit=["junk"]),
        "junk that is critical": _with_header(issued.key, crit=1),
        "deep header": bearer(
            jwt(
                f'{{"kid": "{issued.key.id}", "x": {"[" * 2_000}', claims(), issued.key.private.sign
            )
        ),
        "header no object": bearer(jwt("[]", claims(), issued.key.private.sign)),
        "header no JSON": bearer(jwt("junk", claims(), issued.key.private.sign)),
        **{
            f"payload {name}": _with_payload(issued.key, payload)
            for name, payload in {
                "empty": "",
                "no JSON": "junk",
                "no object": "[]",
                "a null": "null",
                "deep": f'{{"sub": {"[" * 3_000}',
            }.items()
        },
        **{
            f"{name} {value!r:.40}": bearer(issued.key.jwt(**{name: value}))
            for name, values in _CLAIMS.items()
            for value in values
        },
        "expired a second ago": bearer(issued.key.jwt(exp=int(time.time()) - 1)),
    }


def refused(issued: Issued) -> dict[str, Credential]:
    """Return every credential that must be refused, by name."""
    junk = {
        f"{name} in {place}": credential
        for name, text in _JUNK.items()
        for place, credential in {
            "a cookie": Credential(f"{COOKIE}={text}"),
            "a bearer": bearer(text),
            "both headers": Credential(text, text),
        }.items()
    }
    return _refused_sessions(issued) | junk | _refused_jwts(issued)
