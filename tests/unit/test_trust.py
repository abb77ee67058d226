"""Whose credentials are accepted, as the settings say it."""

from typing import Any, Final

import pytest

from todo_db import ConfigurationError, Settings
from todo_db.trust import Trust, is_set, trust_of

BETTER_AUTH: Final = {"better_auth_secret": "swordfish", "better_auth_url": "http://localhost:3000"}
NEON: Final = "https://ep-x.neonauth.eu.aws.neon.tech/todo/auth"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BETTER_AUTH_SECRET", "BETTER_AUTH_URL"):
        monkeypatch.delenv(name, raising=False)


def trust(**given: Any) -> Trust:  # noqa: ANN401  # Settings checks them
    settings = Settings(**given)
    assert is_set(settings)
    return trust_of(settings)


class TestBetterAuth:
    @pytest.mark.parametrize(
        ("url", "origin"),
        [
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://localhost:3000/", "http://localhost:3000"),
            ("http://localhost:3000/api/auth", "http://localhost:3000"),
            ("https://Todo.Example.org:443/x?y#z", "https://todo.example.org"),
            ("http://todo:80", "http://todo"),
            ("https://todo:80", "https://todo:80"),
            (" https://u:p@todo ", "https://todo"),
            ("http://[::1]:3000/", "http://[::1]:3000"),
        ],
    )
    def test_signs_for_the_origin_of_its_url(self, url: str, origin: str) -> None:
        found = trust(**BETTER_AUTH | {"better_auth_url": url})
        assert (found.issuer, found.audiences, found.jwks_url) == (origin, (origin,), None)
        assert found.origins.trusted == {origin}
        assert found.secret == b"swordfish"

    @pytest.mark.parametrize(
        "url", ["x", "", "//x", "ftp://x", "http://", "http://x:y", "http://["]
    )
    def test_needs_a_usable_url(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="BETTER_AUTH_URL") as caught:
            trust(**BETTER_AUTH | {"better_auth_url": url})
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None

    @pytest.mark.parametrize(
        ("url", "cookies"),
        [
            ("http://x", ("__Secure-better-auth.session_token", "better-auth.session_token")),
            ("https://x", ("__Secure-better-auth.session_token",)),
        ],
    )
    def test_has_a_cookie_by_its_scheme(self, url: str, cookies: tuple[str, ...]) -> None:
        assert trust(**BETTER_AUTH | {"better_auth_url": url}).cookies == cookies
        named = trust(**BETTER_AUTH | {"better_auth_url": url}, session_cookie="sid")
        assert named.cookies == ("sid",)

    @pytest.mark.parametrize(
        ("secrets", "first"), [("1:a", b"a"), (" 20: b:c ,1:a", b"b:c"), ("0:a,", b"a")]
    )
    def test_signs_with_the_first_of_its_secrets(self, secrets: str, first: bytes) -> None:
        assert trust(**BETTER_AUTH, better_auth_secrets=secrets).secret == first
        assert trust(better_auth_url="http://x", better_auth_secrets=secrets).secret == first

    @pytest.mark.parametrize("secrets", ["a", ":a", "1:", "1: ,2:b", "x:a", "-1:a", ","])
    def test_needs_secrets_with_versions(self, secrets: str) -> None:
        with pytest.raises(ConfigurationError, match="BETTER_AUTH_SECRETS"):
            trust(**BETTER_AUTH, better_auth_secrets=secrets)

    def test_may_have_keys_by_url(self) -> None:
        found = trust(**BETTER_AUTH, jwks_url="http://auth:3000/api/auth/jwks")
        assert found.jwks_url == "http://auth:3000/api/auth/jwks"
        assert found.secret is not None
        alone = trust(better_auth_url="http://x/api/auth", jwks_url="http://x/jwks")
        assert (alone.issuer, alone.secret, alone.cookies) == ("http://x", None, ())


class TestNeon:
    def test_is_known_by_its_url_alone(self) -> None:
        for url in (NEON, f"{NEON}/", f" {NEON}"):
            found = trust(neon_auth_base_url=url)
            origin = "https://ep-x.neonauth.eu.aws.neon.tech"
            assert (found.issuer, found.audiences) == (origin, (origin,))
            assert found.jwks_url == f"{NEON}/.well-known/jwks.json"
            assert (found.secret, found.cookies) == (None, ())
            assert found.origins.trusted == set()

    def test_can_be_changed_by_the_settings_of_an_issuer(self) -> None:
        found = trust(neon_auth_base_url=NEON, jwks_url="http://x/jwks", jwt_audience="a")
        assert (found.jwks_url, found.audiences) == ("http://x/jwks", ("a",))
        assert trust(neon_auth_base_url=NEON, jwt_issuer="x").audiences == ()

    def test_has_no_secret(self) -> None:
        with pytest.raises(ConfigurationError, match="only Neon has"):
            trust(**BETTER_AUTH, neon_auth_base_url=NEON)

    def test_needs_a_usable_url(self) -> None:
        with pytest.raises(ConfigurationError, match="NEON_AUTH_BASE_URL"):
            trust(neon_auth_base_url="neon.tech/auth")


class TestIssuer:
    def test_is_taken_byte_for_byte(self) -> None:
        found = trust(jwt_issuer="https://X.auth0.com/", jwks_url="https://x/jwks.json")
        assert (found.issuer, found.audiences) == ("https://X.auth0.com/", ())
        assert (found.secret, found.cookies) == (None, ())

    def test_may_have_audiences(self) -> None:
        found = trust(jwt_issuer="x", jwks_url="https://x/jwks", jwt_audience="a , b,,")
        assert found.audiences == ("a", "b")

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"better_auth_url": "http://x"},
            {"better_auth_secret": "x"},
            {"better_auth_secret": "", "better_auth_url": "http://x"},
            {"better_auth_secret": "x", "jwt_issuer": "x"},
            {"jwt_issuer": "x"},
            {"jwks_url": "http://x"},
            {"jwt_issuer": "x", "better_auth_url": "http://x"},
        ],
    )
    def test_needs_keys_and_a_name(self, given: dict[str, str]) -> None:
        with pytest.raises(ConfigurationError, match="BETTER_AUTH_URL must be set"):
            trust_of(Settings(**given))

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "x", "ftp://x/y", "data:,x"])
    def test_has_its_keys_at_a_web_address(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="TODO_DB_JWKS_URL"):
            trust(jwt_issuer="x", jwks_url=url)

    @pytest.mark.parametrize("given", [{}, {"better_auth_url": "http://x"}, {"jwt_audience": "x"}])
    def test_is_not_set_by_other_settings(self, given: dict[str, str]) -> None:
        assert not is_set(Settings(**given))


class TestText:
    def test_says_what_is_checked_and_no_secret(self) -> None:
        assert str(trust(**BETTER_AUTH)) == (
            "JWTs of the issuer http://localhost:3000 for http://localhost:3000 with keys from the"
            " table jwks and sessions by the cookie __Secure-better-auth.session_token or"
            " better-auth.session_token or as a bearer"
        )
        assert str(trust(jwt_issuer="x", jwks_url="http://y")) == (
            "JWTs of the issuer x for any audience with keys from http://y"
        )
        shown = trust(jwt_issuer="x", jwks_url="https://u:swordfish@y:1/z?swordfish#swordfish")
        assert str(shown).endswith("with keys from https://y:1/z")
        assert "swordfish" not in repr(shown)
        assert "swordfish" not in repr(trust(**BETTER_AUTH))
