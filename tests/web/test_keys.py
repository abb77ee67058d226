"""The public keys behind a URL; `test_better_auth` tests those of the table."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

import pytest
import pytest_asyncio
from credentials import JWKS, NO_KEYS, Key, bearer, by, claims, jwt
from events import events

from todo_db import Database, NotAuthenticatedError, Settings, UnavailableError, keys
from todo_db.better_auth import Authenticator, Identity
from todo_db.keys import FetchedKeys, verifying_key

ISSUER: Final = "https://issuer.example.org/"
type Answer = Callable[[], Awaitable[bytes]]


def response(body: object, status: str = "200 OK", *headers: str) -> bytes:
    text = (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(text)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + text


FAILURES: Final[dict[str, bytes]] = {
    "an error": response("", "500 Internal Server Error"),
    "a redirect": response("", "302 Found", "Location: http://127.0.0.1:1/"),
    "a redirect to a file": response("", "302 Found", "Location: file:///etc/passwd"),
    "no JSON": response("junk"),
    "deep JSON": response("[" * 200_000),
    "a list": response([]),
    "an empty object": response({}),
    "keys that are no list": response({"keys": {}}),
    "no keys": response({"keys": []}),
    "no usable keys": response({"keys": ["x", {}, {"kty": "oct", "k": "AAAA", "kid": "x"}]}),
    "a key without an id": response({"keys": [Key().jwk]}),
    "a key with a number as its id": response({"keys": [Key().jwk | {"kid": 1}]}),
    "no HTTP": b"junk\r\n\r\n",
    "half an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{",
    "no UTF-8": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xff",
}


class Endpoint:
    """An HTTP server of one answer, which counts its requests."""

    def __init__(self) -> None:
        self.key = Key()
        self.requests = 0
        self.open = asyncio.Event()
        self.open.set()
        self.body: object = {"keys": [self.key.jwk | {"kid": self.key.id, "alg": "EdDSA"}]}
        self.raw: bytes | None = None
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        await self.open.wait()
        writer.write(response(self.body) if self.raw is None else self.raw)
        await writer.drain()
        writer.close()

    def serve(self, *served: Key) -> None:
        self.body = {"keys": [key.jwk | {"kid": key.id, "alg": "EdDSA"} for key in served]}

    def break_down(self) -> None:
        self.raw = response("", "500 Internal Server Error")


class Clock:
    """The time of the module."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest_asyncio.fixture
async def endpoint() -> AsyncGenerator[Endpoint]:
    made = Endpoint()
    server = await asyncio.start_server(made, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
    yield made
    made.open.set()
    server.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(keys, "time", made)
    return made


@pytest.fixture
def fetched(endpoint: Endpoint, clock: Clock) -> FetchedKeys:  # noqa: ARG001  # patched first
    return FetchedKeys(endpoint.url)


class TestFind:
    async def test_fetches_once_in_five_minutes(
        self, fetched: FetchedKeys, endpoint: Endpoint, clock: Clock
    ) -> None:
        assert endpoint.requests == 0
        for seconds, requests in ((0, 1), (299, 1), (2, 2), (0, 2)):
            clock.now += seconds
            found = await fetched.find(endpoint.key.id)
            assert found is not None
            assert found.algorithm_name == "EdDSA"
            assert endpoint.requests == requests

    async def test_fetches_for_an_unknown_id_once_in_five_seconds(
        self, fetched: FetchedKeys, endpoint: Endpoint, clock: Clock
    ) -> None:
        new = Key()
        for seconds, requests in ((0, 1), (4, 1), (2, 2), (1, 2), (5, 3)):
            clock.now += seconds
            for key_id in ("unknown", "other", new.id):
                assert await fetched.find(key_id) is None
            assert endpoint.requests == requests
        endpoint.serve(endpoint.key, new)
        clock.now += 5
        assert await fetched.find(new.id) is not None

    async def test_a_key_that_was_withdrawn_is_forgotten(
        self, fetched: FetchedKeys, endpoint: Endpoint, clock: Clock
    ) -> None:
        assert await fetched.find(endpoint.key.id) is not None
        endpoint.serve(Key())
        clock.now += 301
        assert await fetched.find(endpoint.key.id) is None

    async def test_fetches_once_for_many_calls(
        self, fetched: FetchedKeys, endpoint: Endpoint
    ) -> None:
        found = await asyncio.gather(*(fetched.find(endpoint.key.id) for _ in range(10)))
        assert all(found)
        assert endpoint.requests == 1

    async def test_a_call_that_is_cancelled_stops_no_other(
        self, fetched: FetchedKeys, endpoint: Endpoint
    ) -> None:
        endpoint.open.clear()
        first, second = [asyncio.create_task(fetched.find(endpoint.key.id)) for _ in range(2)]
        await asyncio.sleep(0.05)
        first.cancel()
        endpoint.open.set()
        assert await second is not None
        with pytest.raises(asyncio.CancelledError):
            await first


class TestFailure:
    @pytest.mark.parametrize("name", FAILURES)
    async def test_is_unavailable_and_told(
        self,
        name: str,
        fetched: FetchedKeys,
        endpoint: Endpoint,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        endpoint.raw = FAILURES[name]
        with pytest.raises(UnavailableError, match="could not be fetched") as caught:
            await fetched.find(endpoint.key.id)
        assert caught.value.retry_after == 5
        assert caught.value.__context__ is None
        (failed,) = events(caplog, "todo_db.keys.failed")
        assert failed["reason"]

    async def test_is_remembered_for_five_seconds(
        self, fetched: FetchedKeys, endpoint: Endpoint, clock: Clock
    ) -> None:
        endpoint.break_down()
        for seconds, requests in ((0, 1), (4, 1), (2, 2), (4, 2)):
            clock.now += seconds
            with pytest.raises(UnavailableError):
                await fetched.find(endpoint.key.id)
            assert endpoint.requests == requests
        endpoint.raw = None
        clock.now += 1
        assert await fetched.find(endpoint.key.id) is not None

    async def test_leaves_known_keys_for_an_hour(
        self, fetched: FetchedKeys, endpoint: Endpoint, clock: Clock
    ) -> None:
        assert await fetched.find(endpoint.key.id) is not None
        endpoint.break_down()
        for seconds in (301, 10, 3_280):
            clock.now += seconds
            assert await fetched.find(endpoint.key.id) is not None
            # Whether there is such a key is not known.
            with pytest.raises(UnavailableError):
                await fetched.find("unknown")
        clock.now += 10
        with pytest.raises(UnavailableError):
            await fetched.find(endpoint.key.id)

    async def test_is_known_to_all_callers_of_a_hanging_endpoint_at_once(
        self, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keys, "_FETCH_SECONDS", 0.5)
        fetched = FetchedKeys(endpoint.url)
        fetched._client.timeout = 30
        endpoint.open.clear()
        async with asyncio.timeout(20):
            for _ in range(2):
                found = await asyncio.gather(
                    *(fetched.find(endpoint.key.id) for _ in range(10)), return_exceptions=True
                )
                assert {type(each) for each in found} == {UnavailableError}
        # No second thread waits for it.
        fetched._failed_at = 0.0
        with pytest.raises(UnavailableError):
            await fetched.find(endpoint.key.id)
        assert endpoint.requests == 1
        endpoint.open.set()
        fetched._failed_at = 0.0
        assert await fetched.find(endpoint.key.id) is not None
        assert endpoint.requests == 1

    async def test_of_nobody_who_listens(self, clock: Clock) -> None:  # noqa: ARG002  # patched
        with pytest.raises(UnavailableError):
            await FetchedKeys("http://127.0.0.1:1/jwks").find("x")


class TestVerifyingKey:
    @pytest.mark.parametrize("algorithm", JWKS)
    def test_has_the_algorithm_of_its_entry(self, algorithm: str) -> None:
        for entry, beside in (
            (JWKS[algorithm], algorithm),
            (JWKS[algorithm] | {"alg": algorithm}, None),
        ):
            found = verifying_key(entry, beside)
            assert found is not None
            assert found.algorithm_name == algorithm

    def test_without_an_algorithm_has_that_of_its_type(self) -> None:
        found = {name: verifying_key(jwk) for name, jwk in JWKS.items()}
        assert {name: key and key.algorithm_name for name, key in found.items()} == {
            "RS256": "RS256",
            "PS256": "RS256",
            "ES256": "ES256",
            "ES512": "ES512",
        }

    @pytest.mark.parametrize("name", NO_KEYS)
    def test_is_no_junk(self, name: str) -> None:
        assert verifying_key(keys._parsed(NO_KEYS[name])) is None


# Claims and key entries as the issuers document them.
FORMS: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any], Identity]]] = {
    "Clerk": (
        "RS256",
        {"jwt_issuer": "https://clerk.todo.org"},
        {"iss": "https://clerk.todo.org", "aud": None, "sub": "user_2x", "azp": "https://todo.org"},
        Identity("user_2x"),
    ),
    "Auth0": (
        "RS256",
        {"jwt_issuer": "https://todo.eu.auth0.com/", "jwt_audience": "https://api.todo.org"},
        {
            "iss": "https://todo.eu.auth0.com/",
            "aud": ["https://api.todo.org", "https://todo.eu.auth0.com/userinfo"],
            "sub": "auth0|507f",
        },
        Identity("auth0|507f"),
    ),
    "Supabase": (
        "ES256",
        {"jwt_issuer": "https://x.supabase.co/auth/v1", "jwt_audience": "authenticated"},
        {
            "iss": "https://x.supabase.co/auth/v1",
            "aud": "authenticated",
            "sub": "6b1c8f5e-0000-4000-8000-0123456789ab",
            "email": "a@b.org",
            "role": "authenticated",
        },
        Identity("6b1c8f5e-0000-4000-8000-0123456789ab", "a@b.org"),
    ),
}


async def outcome(authenticator: Authenticator, authorization: str | None) -> Identity | None:
    try:
        return await authenticator.identity(authorization=authorization)
    except NotAuthenticatedError:
        return None


class TestIssuers:
    @pytest.mark.parametrize("name", FORMS)
    async def test_are_accepted_in_their_form_and_not_in_another(
        self, name: str, endpoint: Endpoint, database: Database
    ) -> None:
        algorithm, given, claimed, identity = FORMS[name]
        endpoint.body = {
            "keys": [
                JWKS[algorithm]
                | {"kid": "1", "alg": algorithm, "use": "sig", "key_ops": ["verify"]}
            ]
        }
        settings = Settings(jwks_url=endpoint.url, **given)
        authenticator = Authenticator(database, settings)
        claimed = {"email": None} | claimed
        assert await outcome(authenticator, by(algorithm, "1", **claimed).authorization) == identity
        wrongs: list[dict[str, Any]] = [
            {"iss": claimed["iss"] + "/"},
            {"iss": claimed["iss"].rstrip("/")[:-1]},
            {"exp": 1},
            {"sub": None},
        ]
        if claimed["aud"] is not None:
            wrongs += [{"aud": "other"}, {"aud": None}]
        for wrong in wrongs:
            token = by(algorithm, "1", **claimed | wrong).authorization
            assert await outcome(authenticator, token) is None
        # A session is not a credential there.
        for other in ("Bearer token", "Bearer token.c2ln", "Bearer ", None):
            assert await outcome(authenticator, other) is None
        assert not authenticator.stores_its_users

    async def test_of_neon_are_known_by_one_url(
        self, endpoint: Endpoint, database: Database
    ) -> None:
        base = endpoint.url.removesuffix("/jwks.json")
        authenticator = Authenticator(database, Settings(neon_auth_base_url=f"{base}/todo/auth"))
        user_id = "6b1c8f5e-0000-4000-8000-0123456789ab"
        told: dict[str, Any] = {
            "iss": base,
            "aud": base,
            "sub": user_id,
            "email": "a@b.org",
            "name": "A",
        }
        told |= {"role": "authenticated", "banned": False}
        good = bearer(endpoint.key.jwt(**told)).authorization
        assert await outcome(authenticator, good) == Identity(user_id, "a@b.org", "A")
        wrongs: list[dict[str, Any]] = [
            {"banned": True},
            {"iss": f"{base}/todo/auth"},
            {"aud": f"{base}/"},
        ]
        for wrong in wrongs:
            token = bearer(endpoint.key.jwt(**told | wrong)).authorization
            assert await outcome(authenticator, token) is None
        forged = jwt(endpoint.key.header, claims(**told), Key().private.sign)
        assert await outcome(authenticator, bearer(forged).authorization) is None
