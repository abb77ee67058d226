"""The real Better Auth in the forms that people run, and what is accepted and refused in each."""

import asyncio
import re
import subprocess
from collections.abc import AsyncGenerator
from typing import Any, Final
from urllib.parse import unquote

import httpx
import pytest
import pytest_asyncio
from better_auth import BetterAuth, ask
from credentials import (
    SECRET,
    URL,
    Credential,
    Key,
    add_session,
    bearer,
    claims,
    cookie,
    jwt,
    signed,
)
from driver import Connection
from fastapi import FastAPI
from web import client, server

from todo_db import Database, Settings, TaskRecord
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.fastapi import CurrentUser, Tasks, install, lifespan

pytestmark = pytest.mark.node

type Json = dict[str, Any]

SECRETS: Final = ("the newest secret with 32 characters", "an older secret of 32 characters")
UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# The server's arguments, and the settings here apart from its secret and its URL.
FORMS: Final[dict[str, tuple[Json, Json]]] = {
    "plain": ({}, {}),
    "a slash": ({"public_url": "{url}/"}, {}),
    "a path": ({"public_url": "{url}/api/auth"}, {}),
    "ES256": ({"form": {"jwks": {"keyPairConfig": {"alg": "ES256"}}}}, {}),
    "ES512": ({"form": {"jwks": {"keyPairConfig": {"alg": "ES512"}}}}, {}),
    "RS256": ({"form": {"jwks": {"keyPairConfig": {"alg": "RS256"}}}}, {}),
    "PS256": ({"form": {"jwks": {"keyPairConfig": {"alg": "PS256"}}}}, {}),
    "a cookie prefix": (
        {"form": {"advanced": {"cookiePrefix": "shop"}}},
        {"session_cookie": "shop.session_token"},
    ),
    "a cookie of another name": (
        {"form": {"advanced": {"cookies": {"session_token": {"name": "sid"}}}}},
        {"session_cookie": "sid"},
    ),
    "https": ({"public_url": "https://todo.example.org"}, {}),
    "https without secure cookies": (
        {
            "public_url": "https://todo.example.org/api/auth",
            "form": {"advanced": {"useSecureCookies": False}},
        },
        {"session_cookie": "better-auth.session_token"},
    ),
    "rotated secrets": (
        {"secrets": f"2:{SECRETS[0]},1:{SECRETS[1]}"},
        {"better_auth_secrets": f"2:{SECRETS[0]},1:{SECRETS[1]}"},
    ),
}


def service(settings: Settings) -> FastAPI:
    app = FastAPI(lifespan=lifespan(settings))
    install(app)

    @app.post("/tasks")
    async def create(user: CurrentUser, tasks: Tasks, title: str) -> TaskRecord:
        return await tasks.create(user.user_id, title)

    @app.get("/tasks")
    async def titles(user: CurrentUser, tasks: Tasks) -> list[str]:
        return [task.title async for task in tasks.iterate(user.user_id)]

    return app


async def sent(asking: httpx.AsyncClient, credential: Credential) -> httpx.Response:
    return await asking.get("/tasks", headers=credential.headers)


class TestForm:
    @pytest.mark.parametrize("name", FORMS)
    async def test_is_accepted_and_forgeries_are_refused_with_the_same_bytes(
        self, name: str, todo_postgres: EmbeddedPostgres, todo_database_name: str
    ) -> None:
        arguments, given = FORMS[name]
        form: Json = {"form": {}} | arguments
        url = todo_postgres.url(user="postgres", database=todo_database_name)
        async with BetterAuth(url.replace(" ", "%20"), **form) as auth:
            alice = await auth.sign_up("Alice")
            received = next(each for each in alice.cookies.jar if "dont" not in each.name)
            value = unquote(str(received.value))
            # The jar does not send a secure cookie to the http server of this test.
            alice.headers["Cookie"] = f"{received.name}={received.value}"
            token = (await ask(alice, "token"))["token"]
            settings = Settings(
                database_url=todo_postgres.url(user=LOGIN, database=todo_database_name),
                better_auth_secret=BetterAuth.SECRET,
                better_auth_url=auth.public_url,
                **given,
            )
            async with client(service(settings)) as asking:
                good = [
                    cookie(value, received.name),
                    bearer(value),
                    bearer(value.partition(".")[0]),
                    bearer(token),
                ]
                for credential in good:
                    assert (await sent(asking, credential)).json() == []
                refused = await sent(asking, Credential())
                assert refused.status_code == 401
                session = value.partition(".")[0]
                head, body, signature = token.split(".")
                for credential in (
                    cookie(session, received.name),
                    cookie(f"{session}.{value.partition('.')[2][::-1]}", received.name),
                    cookie(signed(session, SECRETS[1]), received.name),
                    cookie(value, f"x{received.name}"),
                    bearer(f"{head}.{body}.{signature[::-1]}"),
                    bearer(jwt({"alg": "EdDSA", "kid": "x"}, claims(), Key().private.sign)),
                    bearer(f"{head}.{body}."),
                ):
                    answer = await sent(asking, credential)
                    assert answer.status_code == 401
                    assert answer.content == refused.content
                if name == "rotated secrets":
                    # Better Auth itself does not accept it either.
                    old = signed(session, BetterAuth.SECRET)
                    answer = await sent(asking, cookie(old, received.name))
                    assert answer.content == refused.content
                    alice.headers["Cookie"] = str(cookie(old, received.name).cookie)
                    assert await ask(alice, "get-session") is None


class TestNode:
    async def test_fetch_with_a_forwarded_cookie_passes_without_an_origin(
        self, url: str, db: Database, owner: Connection
    ) -> None:
        script = """
            const [url, cookie, origin] = process.argv.slice(1);
            const headers = origin ? { cookie, origin } : { cookie };
            const answer = await fetch(url, { method: "POST", headers });
            console.log(answer.status);
        """
        sent_cookie = str(cookie(signed(await add_session(owner, "alice"))).cookie)
        settings = Settings(database_url=url, better_auth_secret=SECRET, better_auth_url=URL)

        async def status(*origin: str) -> str:
            done = await asyncio.to_thread(
                subprocess.run,
                [
                    "node",
                    "--input-type=module",
                    "-e",
                    script,
                    f"{at}/tasks?title=x",
                    sent_cookie,
                    *origin,
                ],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            return done.stdout.strip()

        async with server(service(settings)) as at:
            assert await status() == "200"
            assert await status("http://localhost:3001") == "403"
        assert await db.tasks.count("alice") == 1


@pytest_asyncio.fixture
async def neon(todo_postgres: EmbeddedPostgres) -> AsyncGenerator[BetterAuth]:
    """A Better Auth in Neon Auth's form, on a database of its own."""
    name = "neon_auth"
    todo_postgres.create_database(name, template="todo_template")
    url = todo_postgres.url(user="postgres", database=name).replace(" ", "%20")
    form = {
        "basePath": "/todo/auth",
        "jwks": {"jwksPath": "/.well-known/jwks.json"},
        "advanced": {"database": {"generateId": "uuid"}},
    }
    async with BetterAuth(url, form=form) as server:
        yield server
    todo_postgres.drop_database(name)


class TestNeonAuth:
    async def test_leads_from_sign_up_to_own_tasks_without_a_secret(
        self, neon: BetterAuth, todo_postgres: EmbeddedPostgres, todo_database_name: str
    ) -> None:
        settings = Settings(
            database_url=todo_postgres.url(user=LOGIN, database=todo_database_name),
            better_auth_secret=None,
            better_auth_url=None,
            neon_auth_base_url=f"{neon.url}{neon.path}",
        )
        async with client(service(settings)) as asking:
            refused = await sent(asking, Credential())
            tokens = {}
            for name in ("Alice", "Bob"):
                browser = await neon.sign_up(name)
                tokens[name] = (await ask(browser, "token", base=neon.path))["token"]
                session = next(iter(browser.cookies.jar))
                # Only Neon can verify a session.
                answer = await sent(asking, cookie(unquote(str(session.value)), session.name))
                assert (answer.status_code, answer.content) == (401, refused.content)
            for name, token in tokens.items():
                headers = bearer(token).headers
                created = await asking.post(f"/tasks?title=of+{name}", headers=headers)
                assert UUID.fullmatch(created.json()["user_id"])
                assert (await sent(asking, bearer(token))).json() == [f"of {name}"]
            forged = f"{tokens['Alice'].rpartition('.')[0]}.{tokens['Bob'].rpartition('.')[2]}"
            assert (await sent(asking, bearer(forged))).content == refused.content
