"""The proof that an API keeps its users apart: mallory calls each of its operations.

It needs the extra `fastapi`, and httpx.
"""

import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID, uuid4

from sqlalchemy import text

from todo_db.database import Database
from todo_db.errors import ConfigurationError
from todo_db.testing.openapi import Document, Id, Operation, Request

if TYPE_CHECKING:
    from fastapi import FastAPI
    from httpx import AsyncClient, Response

type MakeId = Callable[[Database, str], Awaitable[Id]]
"""Stores something for a user, and returns its id."""
type Headers = Callable[[str], Mapping[str, str]]
"""Returns the headers with which a user signs in."""

_USER: Final = "x-todo-db-user"
# They differ between two equal answers, or follow from the body.
_VOLATILE: Final = frozenset({"date", "content-length"})
_LONGEST_MARK: Final = 10


async def assert_isolated(  # noqa: PLR0913  # what an API may need
    app: "FastAPI",
    *,
    alice: str = "alice",
    mallory: str = "mallory",
    headers: Headers | None = None,
    ids: Mapping[str, MakeId] | None = None,
    bodies: Mapping[str, object] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Prove that no operation of an API shows or changes what belongs to another user.

    Walks the OpenAPI document. alice calls each operation first, with ids that POST operations
    return, and must succeed. Then mallory calls it with her ids, and with ids that do not exist:
    both answers must be equal in status, headers and body, and what alice has must not change. Then
    mallory sends alice's id in place of each text of the body. What a GET without ids shows mallory
    must not change when alice stores something by each POST operation that answers with an id.

    ```python
    app = FastAPI(lifespan=lifespan())
    install(app)


    @app.get("/count")
    async def count(user_id: CurrentUserId, tasks: Tasks) -> int:
        return await tasks.count(user_id)


    await assert_isolated(app)
    ```

    Args:
        app: The application, with the lifespan of `todo_db.fastapi`. It is started and stopped.
        alice: The id of a user, who is stored.
        mallory: The id of another one.
        headers: How a user signs in. By default `current_user_id` is overridden.
        ids: How to make an id of a parameter that no POST operation returns, such as
            `{"task_id": make}`.
        bodies: The body of an operation whose schema does not say enough, such as
            `{"POST /api/labels": {"name": "home"}}`.
        skip: Operations that are not called, such as `{"POST /api/webhook"}`.

    Raises:
        AssertionError: Each operation that leaks, or that was not reached, and why.
    """
    async with _client(app, headers) as (client, database):
        for user in (alice, mallory):
            await database.users.ensure(user, email=f"{user}@example.org", name=user)
        document = Document(app.openapi(), bodies or {})
        walk = _Walk(client, database, document, (alice, mallory), ids or {})
        failures = [
            f"{name}: there is no such operation"
            for name in {*skip, *(bodies or {})} - {each.name for each in document.operations}
        ]
        failures += [failure async for failure in walk.failures(skip)]
    if failures:
        # An assert statement would be rewritten by pytest, and repeat all of them.
        raise AssertionError("\n".join(failures))


@asynccontextmanager
async def _client(
    app: "FastAPI", headers: Headers | None
) -> AsyncGenerator[tuple["_Client", Database]]:
    from fastapi import Request  # noqa: PLC0415  # an optional extra
    from httpx import ASGITransport, AsyncClient  # noqa: PLC0415  # likewise

    from todo_db.fastapi import current_user_id  # noqa: PLC0415  # likewise

    def named(request: Request) -> str:
        return request.headers[_USER]

    overrides = app.dependency_overrides
    if headers is None:
        app.dependency_overrides = {**overrides, current_user_id: named}
    try:
        async with app.router.lifespan_context(app) as state:
            database = dict(state or {}).get("todo_database")
            if not isinstance(database, Database):
                raise ConfigurationError("the application does not use todo_db.fastapi.lifespan")

            async def with_state(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401  # ASGI
                await app({**scope, "state": dict(state or {})}, receive, send)

            transport = ASGITransport(with_state, raise_app_exceptions=False)
            async with AsyncClient(transport=transport, base_url="http://testserver") as client:
                yield _Client(client, headers or (lambda user: {_USER: user})), database
    finally:
        app.dependency_overrides = overrides


@dataclass(frozen=True)
class _Client:
    """Sends requests as one user or another."""

    http: "AsyncClient"
    headers: Headers

    async def send(self, user: str, request: "Request") -> "Response":
        return await self.http.request(
            request.method,
            request.path,
            params=request.query,
            json=request.body,
            headers={**request.headers, **self.headers(user)},
        )


class _Unreachable(Exception):  # noqa: N818  # a reason, not a fault of the program
    """Why an operation could not be called."""


class _Walk:
    """Calls every operation of one document as alice and as mallory."""

    def __init__(
        self,
        client: _Client,
        database: Database,
        document: Document,
        users: tuple[str, str],
        ids: Mapping[str, MakeId],
    ) -> None:
        self._client = client
        self._database = database
        self._document = document
        self._alice, self._mallory = users
        self._ids = ids
        # In every text that alice stores, so that it is found in what mallory gets.
        self._mark = token_hex(_LONGEST_MARK // 2)
        self._numbers = count(1)

    async def failures(self, skip: Collection[str]) -> AsyncGenerator[str]:
        called = [each for each in self._document.operations if each.name not in skip]
        self._creators = [each for each in called if await self._creates(each)]
        for operation in called:
            try:
                async for failure in self._try(operation):
                    yield f"{operation.name}: {failure}"
            except _Unreachable as reason:
                yield f"{operation.name}: not reached: {reason}"

    async def _try(self, operation: Operation) -> AsyncGenerator[str]:
        await self._reach(operation)
        # Made anew, because the call may have deleted something.
        alices = await self._make_ids(operation, self._alice)
        mallorys = await self._make_ids(operation, self._mallory)
        if not alices:
            await self._store()
            if operation.method == "get" and await self._tells_more(operation):
                yield "shows mallory that alice stored something"
        before = await self._rows()
        for name, value in alices.items():
            absent = [{name: _missing(value, number)} for number in (1, 2)]
            for own in (mallorys, alices):
                variants = [own | {name: value}, own | absent[0], own | absent[1]]
                for failure in self._compare(
                    name, *[await self._answer(operation, ids) for ids in variants]
                ):
                    yield failure
        if self._mark in (await self._answer(operation, mallorys)).text:
            yield "shows mallory what belongs to alice"
        await self._send(self._mallory, operation, mallorys, self._alice)
        if await self._rows() != before:
            yield "lets mallory change what belongs to alice"

    async def _creates(self, operation: Operation) -> bool:
        """Whether it stores something: a POST that answers with an id."""
        if operation.method != "post":
            return False
        try:
            ids = await self._make_ids(operation, self._alice)
        except _Unreachable:
            return False
        return _id_of(await self._send(self._alice, operation, ids)) is not None

    async def _store(self) -> None:
        """Have alice store something of each kind."""
        for creator in self._creators:
            await self._send(self._alice, creator, await self._make_ids(creator, self._alice))

    async def _tells_more(self, operation: Operation) -> bool:
        """Whether mallory gets another answer once alice has stored more, as from a count."""
        # Twice, because an answer can have the time in it.
        for _ in range(2):
            before = [(await self._answer(operation, {})).text for _ in range(2)]
            await self._store()
            if before[0] != before[1] or (await self._answer(operation, {})).text == before[0]:
                return False
        return True

    async def _reach(self, operation: Operation) -> None:
        ids = await self._make_ids(operation, self._alice)
        answer = await self._send(self._alice, operation, ids)
        if answer.is_error:
            raise _Unreachable(
                f"alice gets {answer.status_code} {answer.text[:200]}; give ids= or bodies="
            )

    async def _send(
        self, user: str, operation: Operation, ids: Mapping[str, Id], content: str = ""
    ) -> "Response":
        # Other texts in each request, because names may have to be unique.
        mark = self._mark if user == self._alice else "x"
        content = content or f"{mark}{next(self._numbers)}"
        return await self._client.send(user, self._document.request(operation, ids, content))

    async def _answer(self, operation: Operation, ids: Mapping[str, Id]) -> "_Answer":
        return _Answer.of(await self._send(self._mallory, operation, ids), ids)

    def _compare(
        self, name: str, found: "_Answer", absent: "_Answer", other: "_Answer"
    ) -> Iterator[str]:
        if self._mark in found.text:
            yield f"shows mallory what belongs to alice, by {name}"
        if (absent.status, absent.body) != (other.status, other.body):
            yield f"answers differently to two values of {name} that do not exist"
        elif found.status != absent.status:
            yield (
                f"answers {found.status} to alice's {name}, and {absent.status} to one that does "
                "not exist"
            )
        elif found.body != absent.body:
            yield f"has another body for alice's {name} than for one that does not exist"
        for header in found.headers.keys() | absent.headers.keys():
            values = [each.headers.get(header) for each in (found, absent, other)]
            if values[1] == values[2] != values[0]:
                yield f"has another header {header} for alice's {name} than for a missing one"

    async def _rows(self) -> dict[str, list[str]]:
        """Return every row of alice's in the fenced tables."""
        tables = text(
            "SELECT DISTINCT polrelid::regclass::text FROM pg_policy WHERE NOT polpermissive"
            " AND has_any_column_privilege(polrelid, 'SELECT')"
        )
        async with self._database.transaction(self._alice, read_only=True) as tx:
            names = [row[0] for row in await tx.execute(tables)]
            return {
                name: sorted(
                    row[0]
                    for row in await tx.execute(text(f"SELECT t::text FROM {name} t"))  # noqa: S608  # quoted by the server
                )
                for name in names
            }

    async def _make_ids(self, operation: Operation, user: str) -> dict[str, Id]:
        made: dict[str, Id] = {}
        for name in self._document.id_names(operation, self._ids):
            made[name] = await self._make_id(operation, name, user, made)
        return made

    async def _make_id(self, operation: Operation, name: str, user: str, made: dict[str, Id]) -> Id:
        if name in self._ids:
            return await self._ids[name](self._database, user)
        if name == "user_id":
            return user
        creator = self._document.creator(operation, name)
        if creator is None:
            raise _Unreachable(f"no POST operation returns a {name}: give ids=")
        outer = {key: made[key] for key in re.findall(r"{(\w+)}", creator.path) if key in made}
        ids = outer or await self._make_ids(creator, user)
        answer = await self._send(user, creator, ids)
        found = _id_of(answer, name)
        if found is None:
            raise _Unreachable(f"{creator.name} returns no {name} ({answer.status_code})")
        return found


@dataclass(frozen=True)
class _Answer:
    """What two answers are compared by; `text` is the body as it came."""

    status: int
    headers: dict[str, str]
    body: str
    text: str

    @classmethod
    def of(cls, answer: "Response", ids: Mapping[str, Id]) -> "_Answer":
        # What was stored has a new number each time.
        body = re.sub(r"\d+", "0", answer.text) if answer.is_success else answer.text
        headers = json.dumps(
            {key: value for key, value in answer.headers.items() if key not in _VOLATILE}
        )
        for value in sorted(map(str, ids.values()), key=len, reverse=True):
            body, headers = body.replace(value, "{id}"), headers.replace(value, "{id}")
        return cls(answer.status_code, json.loads(headers), body, answer.text)


def _id_of(answer: "Response", name: str = "id") -> Id | None:
    """Return the id of what a POST stored, by `id` or by its own name."""
    try:
        body = answer.json() if answer.is_success else None
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    members = cast("dict[str, Id]", body)
    return members.get("id", members.get(name))


def _missing(value: Id, number: int) -> Id:
    if isinstance(value, int):
        return value + 10**9 + number
    try:
        UUID(value)
    except ValueError:
        return f"{value}{token_hex(4)}"
    return str(uuid4())
