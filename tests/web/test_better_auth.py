"""Authentication. `credentials` lists valid and invalid credentials."""

import asyncio
import hmac
import json
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import quote

import asyncpg
import pytest
import pytest_asyncio
from credentials import (
    COOKIE,
    SECRET,
    SECURE_COOKIE,
    URL,
    Credential,
    Issued,
    Key,
    accepted,
    add_key,
    add_session,
    add_user,
    altered,
    bearer,
    claims,
    cookie,
    issue,
    jwt,
    refused,
    signed,
    truncated,
)
from driver import Connection
from events import events
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy import BEGIN, Fault, Proxy

from todo_db import (
    ConfigurationError,
    Database,
    NotAuthenticatedError,
    Settings,
    TodoDBError,
    UnavailableError,
    keys,
)
from todo_db.better_auth import Authenticator, Identity
from todo_db.embedded import LOGIN, OWNER, EmbeddedPostgres
from todo_db.keys import TableKeys

WORLD: Final = "todo_credentials"
_ACCEPTED: Final = sorted(accepted(Issued()))
_REFUSED: Final = sorted(refused(Issued()))
_EXAMPLES: Final = settings(max_examples=100)


def set_up(url: str = URL, secret: str = SECRET, **others: Any) -> Settings:  # noqa: ANN401
    given_ones = {"better_auth_secret": secret, "better_auth_url": url}
    return Settings(database_url="postgresql://x/x", **given_ones, **others)


async def asked(authenticator: Authenticator, credential: Credential) -> str:
    return await authenticator.user_id(
        cookie=credential.cookie, authorization=credential.authorization
    )


async def refusal(authenticator: Authenticator, credential: Credential) -> NotAuthenticatedError:
    """Check a credential that must be refused, and that the error does not depend on it."""
    with pytest.raises(NotAuthenticatedError) as caught:
        await asked(authenticator, credential)
    error = caught.value
    assert type(error) is NotAuthenticatedError
    assert str(error) == "The request carries no valid credential."
    assert error.args == ()
    assert vars(error) == {}
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def kept(authenticator: Authenticator) -> list[str]:
    """Return the ids of the keys that are in memory."""
    assert isinstance(authenticator._keys, TableKeys)
    return list(authenticator._keys._keys)


class World:
    """A database in which alice is signed in, for tests that only read."""

    def __init__(self, database: Database, issued: Issued) -> None:
        self.database = database
        self.issued = issued
        self.accepted = accepted(issued)
        self.refused = refused(issued)
        self.authenticator = Authenticator(database, set_up())
        self.behind_tls = Authenticator(database, set_up("https://todo.example.org"))


@pytest_asyncio.fixture(scope="module")
async def world(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[World]:
    todo_postgres.create_database(WORLD, template="todo_template")
    owner = await asyncpg.connect(todo_postgres.url(database=WORLD))
    await add_user(owner, "alice")
    issued = await issue(owner)
    await owner.close()
    async with Database.from_url(todo_postgres.url(user=LOGIN, database=WORLD)) as database:
        yield World(database, issued)
    todo_postgres.drop_database(WORLD)


@pytest_asyncio.fixture
async def alice(owner: Connection) -> str:
    """Alice's session token, in the test's own database."""
    await add_user(owner, "alice")
    return await add_session(owner, "alice")


@pytest_asyncio.fixture
async def key(owner: Connection) -> Key:
    """A signing key, in the test's own database."""
    made = Key()
    await add_key(owner, made.id, json.dumps(made.jwk))
    return made


class TestAuthenticator:
    def test_needs_a_secret_and_a_url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("BETTER_AUTH_SECRET", "BETTER_AUTH_URL"):
            monkeypatch.delenv(name, raising=False)
        both: dict[str, Any] = {"better_auth_secret": SECRET, "better_auth_url": URL}
        for missing in (set(both), *({name} for name in both)):
            given_ones = {name: value for name, value in both.items() if name not in missing}
            setup = Settings(database_url="postgresql://x/x", **given_ones)
            with pytest.raises(ConfigurationError, match="BETTER_AUTH_SECRET and BETTER_AUTH_URL"):
                Authenticator(Database(setup), setup)

    async def test_shows_no_secret(self) -> None:
        authenticator = Authenticator(Database(set_up()), set_up())
        assert SECRET not in repr(authenticator)


class TestUserId:
    @pytest.mark.parametrize("name", _ACCEPTED)
    async def test_accepts_alices(self, name: str, world: World) -> None:
        assert await asked(world.authenticator, world.accepted[name]) == "alice"

    @pytest.mark.parametrize("name", _REFUSED)
    async def test_refuses(self, name: str, world: World) -> None:
        async with asyncio.timeout(10):
            await refusal(world.authenticator, world.refused[name])

    async def test_answers_the_same_under_the_owners_login(
        self, todo_postgres: EmbeddedPostgres, world: World
    ) -> None:
        async with Database.from_url(todo_postgres.url(user=OWNER, database=WORLD)) as database:
            authenticator = Authenticator(database, set_up())
            for credential in world.accepted.values():
                assert await asked(authenticator, credential) == "alice"
            for credential in world.refused.values():
                await refusal(authenticator, credential)

    async def test_accepts_only_the_secure_cookie_with_https(self, world: World) -> None:
        value = signed(world.issued.token)
        good, plain = cookie(value, SECURE_COOKIE), cookie(value)
        assert await asked(world.behind_tls, good) == "alice"
        await refusal(world.behind_tls, plain)
        # An attacker who can set a plain cookie must not sign the user in as another user.
        await refusal(world.behind_tls, Credential(f"{plain.cookie}; {SECURE_COOKIE}=junk"))
        both = Credential(f"{COOKIE}=junk; {good.cookie}")
        assert await asked(world.behind_tls, both) == "alice"

    @pytest.mark.parametrize("change", [truncated, altered])
    async def test_refuses_a_changed_cookie(
        self, change: Callable[[str], Any], world: World
    ) -> None:
        for value in change(signed(world.issued.token)):
            await refusal(world.authenticator, cookie(value))

    @pytest.mark.parametrize("change", [truncated, altered])
    async def test_refuses_a_changed_session_token(
        self, change: Callable[[str], Any], world: World
    ) -> None:
        for value in change(world.issued.token):
            await refusal(world.authenticator, bearer(value))

    @pytest.mark.parametrize("change", [truncated, altered])
    async def test_refuses_a_changed_signed_token(
        self, change: Callable[[str], Any], world: World
    ) -> None:
        for value in change(signed(world.issued.token)):
            # Without any signature it is the session token, which is a valid credential too.
            if value != world.issued.token:
                await refusal(world.authenticator, bearer(value))

    @pytest.mark.parametrize("change", [truncated, altered])
    async def test_refuses_a_changed_jwt(self, change: Callable[[str], Any], world: World) -> None:
        for value in change(world.issued.key.jwt()):
            await refusal(world.authenticator, bearer(value))

    async def test_a_secret_of_a_later_deployment_ends_the_cookies(self, world: World) -> None:
        rotated = Authenticator(world.database, set_up(secret="another"))  # noqa: S106  # as it says
        await refusal(rotated, cookie(signed(world.issued.token)))
        assert await asked(rotated, cookie(signed(world.issued.token, "another"))) == "alice"

    async def test_a_jwt_of_another_deployment_is_refused(self, world: World) -> None:
        await refusal(world.behind_tls, bearer(world.issued.key.jwt()))
        url = "https://todo.example.org"
        other = world.issued.key.jwt(iss=url, aud=url)
        await refusal(world.authenticator, bearer(other))
        assert await asked(world.behind_tls, bearer(other)) == "alice"

    @pytest.mark.parametrize("verdict", [True, False])
    async def test_only_a_comparison_in_constant_time_decides(
        self, *, verdict: bool, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hmac, "compare_digest", lambda _one, _other: verdict)
        good, bad = cookie(signed(world.issued.token)), cookie(f"{world.issued.token}.junk")
        for credential in (good, bad):
            if verdict:
                assert await asked(world.authenticator, credential) == "alice"
            else:
                await refusal(world.authenticator, credential)

    async def test_distinguishes_two_users(self, database: Database, owner: Connection) -> None:
        authenticator = Authenticator(database, set_up())
        tokens = {}
        for user in ("alice", "bob"):
            await add_user(owner, user)
            tokens[user] = await add_session(owner, user)
        for user, token in tokens.items():
            assert await asked(authenticator, bearer(token)) == user
            assert await asked(authenticator, cookie(signed(token))) == user
        swapped = f"{tokens['alice']}.{signed(tokens['bob']).partition('.')[2]}"
        await refusal(authenticator, cookie(swapped))

    async def test_ends_with_the_session(
        self, alice: str, database: Database, owner: Connection
    ) -> None:
        authenticator = Authenticator(database, set_up())
        assert await asked(authenticator, bearer(alice)) == "alice"
        await owner.execute("UPDATE sessions SET expires_at = now()")
        await refusal(authenticator, bearer(alice))
        await owner.execute("UPDATE sessions SET expires_at = 'infinity'")
        assert await asked(authenticator, bearer(alice)) == "alice"
        await owner.execute("DELETE FROM users")
        await refusal(authenticator, bearer(alice))

    async def test_todo_app_sees_no_session_itself(
        self, todo_postgres: EmbeddedPostgres, todo_database_name: str, alice: str
    ) -> None:
        url = todo_postgres.url(user=LOGIN, database=todo_database_name)
        login = await asyncpg.connect(url)
        for table in ("sessions", "jwks", "accounts", "verifications"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await login.fetch(f"SELECT 1 FROM {table}")
        found = await login.fetch("SELECT * FROM find_credential($1, $2)", alice, "")
        assert [tuple(row) for row in found] == [("alice", None, None, None)]
        await login.close()


class TestSettings:
    @pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/api/auth", "HTTP://LocalHost:3000"])
    async def test_of_a_url_with_one_origin_accept_the_same(self, url: str, world: World) -> None:
        authenticator = Authenticator(world.database, set_up(url))
        for name in ("cookie", "bearer session token", "jwt"):
            assert await asked(authenticator, world.accepted[name]) == "alice"

    async def test_may_name_issuer_and_audience(self, world: World) -> None:
        given_ones = {"jwt_issuer": "https://issuer/", "jwt_audience": "a, b"}
        authenticator = Authenticator(world.database, set_up(**given_ones))
        key = world.issued.key
        for audience in ("a", "b", ["x", "b"]):
            credential = bearer(key.jwt(iss="https://issuer/", aud=audience))
            assert await asked(authenticator, credential) == "alice"
        for changes in (
            {},
            {"iss": "https://issuer", "aud": "a"},
            {"iss": "https://issuer/"},
            {"iss": "https://issuer/", "aud": None},
            {"iss": "https://issuer/", "aud": "a, b"},
        ):
            await refusal(authenticator, bearer(key.jwt(**changes)))

    async def test_of_an_issuer_alone_accept_any_audience(self, world: World) -> None:
        authenticator = Authenticator(world.database, set_up(jwt_issuer="x"))
        for audience in (None, "a", ["a"]):
            credential = bearer(world.issued.key.jwt(iss="x", aud=audience))
            assert await asked(authenticator, credential) == "alice"

    @pytest.mark.parametrize("url", [URL, "https://todo.example.org"])
    @pytest.mark.parametrize("name", [COOKIE, SECURE_COOKIE, "shop.session_token", "sid"])
    async def test_name_the_one_cookie(self, name: str, url: str, world: World) -> None:
        authenticator = Authenticator(world.database, set_up(url, session_cookie=name))
        value = signed(world.issued.token)
        assert await asked(authenticator, cookie(value, name)) == "alice"
        for other in {COOKIE, SECURE_COOKIE, f"__Secure-{name}", name.upper()} - {name}:
            await refusal(authenticator, cookie(value, other))

    async def test_of_rotated_secrets_accept_cookies_of_the_newest_as_better_auth_does(
        self, world: World
    ) -> None:
        secrets = set_up(secret="ancient", better_auth_secrets="2: new ,1:old")  # noqa: S106
        authenticator = Authenticator(world.database, secrets)
        token = world.issued.token
        assert await asked(authenticator, cookie(signed(token, "new"))) == "alice"
        for other in ("old", "ancient", "1:old", "2: new ,1:old", ""):
            await refusal(authenticator, cookie(signed(token, other)))
        assert await asked(authenticator, bearer(world.issued.key.jwt())) == "alice"

    async def test_that_do_not_fit_are_told_once(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        for claim, word in (("iss", "issuer"), ("aud", "audience")):
            caplog.clear()
            authenticator = Authenticator(world.database, set_up())
            for _ in range(2):
                await refusal(authenticator, bearer(world.issued.key.jwt(**{claim: "other"})))
                forged = claims(**{claim: "other"})
                await refusal(
                    Authenticator(world.database, set_up()),
                    bearer(jwt(world.issued.key.header, forged, Key().private.sign)),
                )
            assert events(caplog) == [{"event": "todo_db.jwt.refused", "claim": word}]


class TestIdentity:
    async def test_of_a_session_is_its_user(self, world: World) -> None:
        for name, is_from_cookie in (("cookie", True), ("bearer session token", False)):
            credential = world.accepted[name]
            assert await world.authenticator.identity(
                cookie=credential.cookie, authorization=credential.authorization
            ) == Identity("alice", is_from_cookie=is_from_cookie)

    @pytest.mark.parametrize(
        ("email", "name", "expected"),
        [
            ("a@b.org", "Alice", ("a@b.org", "Alice")),
            (None, None, (None, None)),
            ("", "", (None, None)),
            (1, ["Alice"], (None, None)),
        ],
    )
    async def test_of_a_jwt_has_what_it_contains(
        self, email: object, name: object, expected: tuple[str | None, str | None], world: World
    ) -> None:
        token = world.issued.key.jwt(email=email, name=name)
        identity = await world.authenticator.identity(authorization=f"Bearer {token}")
        assert identity == Identity("alice", *expected)


class TestKeys:
    @pytest.mark.parametrize(("days", "seconds", "ok"), [(-1, 86_399, 0), (-1, 86_410, 1)])
    async def test_a_retired_key_is_accepted_for_the_grace_period(
        self, *, days: int, seconds: int, ok: int, database: Database, owner: Connection
    ) -> None:
        made = Key()
        await add_key(owner, made.id, json.dumps(made.jwk), expires_days=days)
        authenticator = Authenticator(database, set_up(jwks_grace_period_seconds=seconds))
        for _ in range(2):
            if ok:
                assert await asked(authenticator, bearer(made.jwt())) == "alice"
            else:
                await refusal(authenticator, bearer(made.jwt()))

    async def test_a_key_in_memory_ends_with_its_grace_period(
        self, database: Database, owner: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1_000.0
        started = time.time()
        clock = SimpleNamespace(monotonic=lambda: now, time=lambda: started - 1_000 + now)
        monkeypatch.setattr(keys, "time", clock)
        made = Key()
        await add_key(owner, made.id, json.dumps(made.jwk), expires_days=-1)
        authenticator = Authenticator(database, set_up(jwks_grace_period_seconds=86_460))
        for seconds in (0, 50):
            now += seconds
            assert await asked(authenticator, bearer(made.jwt())) == "alice"
        now += 20
        await refusal(authenticator, bearer(made.jwt()))

    async def test_a_jwt_of_a_deleted_user_is_still_valid(
        self, database: Database, key: Key
    ) -> None:
        authenticator = Authenticator(database, set_up())
        assert await asked(authenticator, bearer(key.jwt(sub="gone"))) == "gone"

    async def test_a_deleted_key_is_accepted_for_five_minutes(
        self, database: Database, owner: Connection, key: Key, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1_000.0
        clock = SimpleNamespace(monotonic=lambda: now, time=time.time)
        monkeypatch.setattr(keys, "time", clock)
        authenticator = Authenticator(database, set_up())
        assert await asked(authenticator, bearer(key.jwt())) == "alice"
        await owner.execute("DELETE FROM jwks")
        now += 299
        assert await asked(authenticator, bearer(key.jwt())) == "alice"
        now += 2
        await refusal(authenticator, bearer(key.jwt()))
        now -= 2
        await refusal(authenticator, bearer(key.jwt()))

    async def test_a_new_key_is_accepted_at_once(
        self, database: Database, owner: Connection
    ) -> None:
        authenticator = Authenticator(database, set_up())
        made = Key()
        await refusal(authenticator, bearer(made.jwt()))
        await add_key(owner, made.id, json.dumps(made.jwk))
        assert await asked(authenticator, bearer(made.jwt())) == "alice"

    async def test_unknown_ids_are_not_remembered(self, database: Database, key: Key) -> None:
        authenticator = Authenticator(database, set_up())
        for _ in range(20):
            await refusal(authenticator, bearer(Key().jwt()))
        assert kept(authenticator) == []
        assert await asked(authenticator, bearer(key.jwt())) == "alice"
        await refusal(authenticator, bearer(jwt(key.header, claims(), Key().private.sign)))
        assert kept(authenticator) == [key.id]


class TestRoundTrips:
    async def test_are_three_for_a_session_good_or_bad(self, proxy: Proxy, alice: str) -> None:
        async with Database.from_url(proxy.url) as database:
            authenticator = Authenticator(database, set_up())
            await asked(authenticator, bearer(alice))
            for credential in (bearer(alice), cookie(signed(alice)), bearer("unknown")):
                assert await proxy.turns(asked(authenticator, credential)) == 3

    async def test_are_none_for_what_cannot_be_a_session(self, proxy: Proxy, alice: str) -> None:
        async with Database.from_url(proxy.url) as database:
            authenticator = Authenticator(database, set_up())
            for credential in (
                *(Credential(), cookie(alice), cookie(f"{alice}.junk"), bearer("")),
                *(bearer(f"{alice}\x00"), bearer("A" * 1_000), bearer(quote(f"{alice}.junk"))),
                *(Credential(alice, alice), cookie(signed("a b")), bearer("a.b.c")),
            ):
                assert await proxy.turns(asked(authenticator, credential)) == 0

    async def test_are_three_for_a_jwt_and_none_for_the_next(self, proxy: Proxy, key: Key) -> None:
        async with Database.from_url(proxy.url) as database:
            authenticator = Authenticator(database, set_up())
            await asked(Authenticator(database, set_up()), bearer(key.jwt()))
            credentials = [bearer(key.jwt()), bearer(key.jwt(sub="bob")), bearer(key.jwt(exp=1))]
            turns = [await proxy.turns(asked(authenticator, each)) for each in credentials]
            assert turns == [3, 0, 0]

    async def test_are_three_for_each_unknown_key(self, proxy: Proxy) -> None:
        async with Database.from_url(proxy.url) as database:
            authenticator = Authenticator(database, set_up())
            unknown = bearer(Key().jwt())
            await proxy.turns(asked(authenticator, unknown))
            turns = [await proxy.turns(asked(authenticator, unknown)) for _ in range(2)]
            assert turns == [3, 3]


class TestArbitraryText:
    """Any other text in the headers is refused with the same error."""

    @_EXAMPLES
    @given(header=st.text(alphabet=st.characters(exclude_categories=())))
    async def test_in_either_header(self, header: str, world: World) -> None:
        for credential in (
            *(Credential(header, None), Credential(None, header), Credential(header, header)),
            *(Credential(f"{COOKIE}={header}"), Credential(f"{SECURE_COOKIE}={header}")),
            bearer(header),
        ):
            await refusal(world.authenticator, credential)

    @_EXAMPLES
    @given(parts=st.lists(st.binary(), min_size=3, max_size=3))
    async def test_in_the_parts_of_a_jwt(self, parts: list[bytes], world: World) -> None:
        text = ".".join(part.decode("latin-1") for part in parts)
        await refusal(world.authenticator, bearer(text))

    @_EXAMPLES
    @given(
        more=st.dictionaries(
            st.sampled_from(["alg", "b64", "crit", "cty", "jku", "jwk", "kid", "typ", "zip"]),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats()
                | st.text()
                | st.sampled_from(["EdDSA", "none", "HS256", "b64"]),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
        )
    )
    async def test_in_the_header_of_a_forged_jwt(
        self, more: dict[str, object], world: World
    ) -> None:
        header = world.issued.key.header | more
        await refusal(world.authenticator, bearer(jwt(header, claims(), Key().private.sign)))

    @_EXAMPLES
    @given(
        changes=st.dictionaries(
            st.sampled_from(["aud", "exp", "iss", "nbf", "sub"]),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.text(max_size=3),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=3,
            ),
            min_size=1,
        )
    )
    async def test_in_the_claims_that_were_signed(
        self, changes: dict[str, object], world: World
    ) -> None:
        credential = bearer(world.issued.key.jwt(**changes))
        try:
            user_id = await asked(world.authenticator, credential)
        except NotAuthenticatedError:
            return
        # Another existing user and a later expiry are valid.
        assert set(changes) <= {"exp", "nbf", "sub"}
        assert user_id == changes.get("sub", "alice")


class TestUnavailable:
    async def test_is_no_refusal(self, proxy: Proxy, alice: str, key: Key) -> None:
        async with Database.from_url(proxy.url, retry_attempts=1) as database:
            authenticator = Authenticator(database, set_up())
            proxy.break_at(BEGIN, Fault.CUT_BEFORE, times=3)
            for credential in (bearer(alice), cookie(signed(alice)), bearer(key.jwt())):
                with pytest.raises(UnavailableError):
                    await asked(authenticator, credential)
            assert proxy.pending == 0
            assert await asked(authenticator, bearer(key.jwt())) == "alice"

    async def test_is_tried_again(self, proxy: Proxy, alice: str) -> None:
        async with Database.from_url(proxy.url) as database:
            authenticator = Authenticator(database, set_up())
            proxy.break_at(BEGIN, Fault.CUT_AFTER)
            assert await asked(authenticator, bearer(alice)) == "alice"
            assert proxy.pending == 0


class TestSecrecy:
    async def test_no_credential_is_logged_or_in_an_error(
        self, world: World, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level(logging.DEBUG)
        for name in ("asyncio", "asyncpg", "sqlalchemy", "sqlalchemy.engine", "todo_db"):
            caplog.set_level(logging.DEBUG, logger=name)
        told = []
        for credential in world.accepted.values():
            await asked(world.authenticator, credential)
        for credential in world.refused.values():
            error = await refusal(world.authenticator, credential)
            told += traceback.format_exception(error)
        printed = capfd.readouterr()
        heard = "\n".join([caplog.text, *told, printed.out, printed.err])
        issued = world.issued
        digests = [signed(token).split(".")[1] for token in (issued.token, issued.expired)]
        for secret in (SECRET, issued.token, issued.expired, issued.key.id, *digests, "eyJ"):
            assert secret not in heard

    async def test_no_credential_is_in_an_error_of_the_database(
        self,
        alice: str,
        key: Key,
        database: Database,
        owner: Connection,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        await owner.execute("DROP FUNCTION find_credential")
        authenticator = Authenticator(database, set_up())
        for credential in (bearer(alice), bearer(key.jwt())):
            with pytest.raises(TodoDBError) as caught:
                await asked(authenticator, credential)
            assert not isinstance(caught.value, NotAuthenticatedError)
            heard = caplog.text + "".join(traceback.format_exception(caught.value))
            for secret in (SECRET, alice, key.id, "eyJ"):
                assert secret not in heard
