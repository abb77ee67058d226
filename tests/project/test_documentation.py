"""The security schemes of the OpenAPI document."""

from typing import Annotated, Any, Final

import pytest
from credentials import SECRET
from fastapi import Depends, FastAPI, Header, Security
from fastapi.security import APIKeyHeader, HTTPBasic
from web import client

from todo_db import Settings
from todo_db.fastapi import CurrentUserId, current_user_id, install, lifespan

type Json = dict[str, Any]
BASIC: Final = HTTPBasic()


def app_of(**given: Any) -> FastAPI:  # noqa: ANN401  # Settings checks them
    app = FastAPI(lifespan=lifespan(Settings(**given)))
    install(app)

    @app.get("/me")
    async def me(user_id: CurrentUserId) -> str:
        return user_id

    @app.get("/other")
    async def other(user_id: CurrentUserId, _: Annotated[object, Security(BASIC)]) -> str:
        return user_id

    @app.get("/open")
    async def anyone() -> None:
        pass

    return app


def security(app: FastAPI) -> tuple[Json, Json]:
    """Return the schemes, and what each operation requires."""
    document = app.openapi()
    required = {path: each["get"].get("security") for path, each in document["paths"].items()}
    del required["/health"]
    return document.get("components", {}).get("securitySchemes", {}), required


class TestSecurity:
    def test_is_a_cookie_or_a_bearer(self) -> None:
        schemes, required = security(app_of())
        assert schemes["HTTPBearer"] == {
            "type": "http",
            "scheme": "bearer",
            "description": "A session token, or a JWT",
        }
        assert schemes["APIKeyCookie"]["name"] == "better-auth.session_token"
        both: list[Json] = [{"HTTPBearer": []}, {"APIKeyCookie": []}]
        assert required["/open"] is None
        assert sorted(required["/me"], key=str) == sorted(both, key=str)

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            ({"better_auth_url": "http://x"}, "better-auth.session_token"),
            ({"better_auth_url": "https://x"}, "__Secure-better-auth.session_token"),
            ({"better_auth_url": "https://x", "session_cookie": "sid"}, "sid"),
        ],
    )
    async def test_names_the_cookie_once_the_settings_are_read(
        self, given: Json, name: str, url: str
    ) -> None:
        app = app_of(better_auth_secret=SECRET, database_url=url, **given)
        async with client(app):
            assert security(app)[0]["APIKeyCookie"]["name"] == name

    async def test_has_no_cookie_where_none_is_accepted(self, url: str) -> None:
        app = app_of(database_url=url, neon_auth_base_url="https://x/auth")
        async with client(app):
            schemes, required = security(app)
        assert set(schemes) == {"HTTPBearer", "HTTPBasic"}
        assert required["/me"] == [{"HTTPBearer": []}]
        assert required["/open"] is None

    async def test_of_an_application_without_users_is_none(self, url: str) -> None:
        given: Json = {"better_auth_secret": SECRET, "better_auth_url": "http://x"}
        app = FastAPI(lifespan=lifespan(Settings(database_url=url, **given)))
        install(app)
        async with client(app):
            assert "securitySchemes" not in app.openapi().get("components", {})
        app.dependency_overrides[current_user_id] = lambda: "alice"
        assert "securitySchemes" not in app.openapi().get("components", {})


async def by_header(x_user: Annotated[str, Header()]) -> str:
    return x_user


KEY: Final = APIKeyHeader(name="X-Key", auto_error=False)


async def by_key(key: Annotated[str | None, Security(KEY)]) -> str:
    return str(key)


async def by_key_of_another(user_id: Annotated[str, Depends(by_key)]) -> str:
    return user_id


class TestOverride:
    def test_without_a_scheme_shows_none(self) -> None:
        app = app_of()
        app.dependency_overrides[current_user_id] = by_header
        schemes, required = security(app)
        assert set(schemes) == {"HTTPBasic"}
        assert required == {"/me": None, "/other": [{"HTTPBasic": []}], "/open": None}

    def test_without_a_scheme_leaves_none_if_there_is_no_other(self) -> None:
        app = FastAPI()
        install(app)

        @app.get("/me")
        async def me(user_id: CurrentUserId) -> str:
            return user_id

        assert "securitySchemes" in app.openapi()["components"]
        app.dependency_overrides[current_user_id] = by_header
        assert "securitySchemes" not in app.openapi()["components"]

    @pytest.mark.parametrize("override", [by_key, by_key_of_another, KEY])
    def test_with_a_scheme_shows_that(self, override: Any) -> None:  # noqa: ANN401
        app = app_of()
        app.dependency_overrides[current_user_id] = override
        schemes, required = security(app)
        assert set(schemes) == {"HTTPBasic", "APIKeyHeader"}
        assert schemes["APIKeyHeader"] == {"type": "apiKey", "in": "header", "name": "X-Key"}
        assert required["/me"] == [{"APIKeyHeader": []}]
        assert required["/open"] is None

    def test_is_seen_after_the_document_was_made(self) -> None:
        app = app_of()
        before = security(app)
        app.dependency_overrides[current_user_id] = by_header
        assert set(security(app)[0]) == {"HTTPBasic"}
        del app.dependency_overrides[current_user_id]
        assert security(app) == before
