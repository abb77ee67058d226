"""The proof that an API keeps its users apart: mallory calls each of its operations.

It needs the extra `fastapi`, and httpx.
"""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from itertools import count
from secrets import token_hex
from types import MappingProxyType
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from todo_db.database import Database
from todo_db.testing.answers import Answer, Id, changes, differences, id_of
from todo_db.testing.client import Client, Headers, Unreachable, opened, routes_of
from todo_db.testing.openapi import Document, Operation, plain

if TYPE_CHECKING:
    from fastapi import FastAPI
    from httpx import Response

type MakeId = Callable[[Database, str], Awaitable[Id]]
"""Stores something for a user, and returns its id."""

# So short that a text of ten characters can have a number too.
_MARK_BYTES: Final = 4
_PART: Final = 5


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
    both call it with each parameter that need not be given, and mallory sends alice's id, and a
    part of what alice wrote, in place of each text. What a GET shows mallory must not change when
    alice stores something by each POST operation that answers with an id.

    An id is a parameter of the path, a parameter or member of a body that ends with `_id` or `Id`,
    and a number or UUID that is called like the path of a POST operation, also in lists. What the
    walk does not see: two parameters that leak only together, the second kind of a union, cursors
    and entity tags of alice's (unless `ids` makes them), what is packed or in another database, and
    times.

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
        bodies: Members of the body of an operation whose schema does not say enough, such as
            `{"POST /api/labels": {"color": "#ff0000"}}`. They are sent as they are, ids too.
        skip: Operations that are not called, such as `{"POST /api/webhook"}`, and what is not in
            the document: hidden routes, `"WEBSOCKET /live"`, `"MOUNT /admin"`.

    Raises:
        AssertionError: Each operation that leaks, or that was not reached, and why.
    """
    async with opened(app, headers) as (client, database):
        document = Document(app.openapi(), bodies or {})
        walk = _Walk(client, database, document, (alice, mallory), ids or {})
        seen = {each.name for each in document.operations}
        unseen = set(routes_of(app)) - seen
        failures = [
            f"{name}: there is no such operation"
            for name in {*skip, *(bodies or {})} - seen - unseen
        ]
        failures += [
            f"{name}: not reached: it is not in the OpenAPI document; test it, and name it in skip="
            for name in sorted(unseen - {*skip})
        ]
        failures += [failure async for failure in walk.failures(skip)]
    if failures:
        # An assert statement would be rewritten by pytest, and repeat all of them.
        raise AssertionError("\n".join(dict.fromkeys(failures)))


class _Walk:
    """Calls every operation of one document as alice and as mallory."""

    def __init__(
        self,
        client: Client,
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
        self._mark = token_hex(_MARK_BYTES)
        self._numbers = count(1)
        # Whose ids are being made, the innermost last.
        self._making: list[Operation] = []

    async def failures(self, skip: Collection[str]) -> AsyncGenerator[str]:
        await self._ensure_users()
        called = [each for each in self._document.operations if each.name not in skip]
        self._creators = [each for each in called if await self._creates(each)]
        for operation in called:
            try:
                async for failure in self._try(operation):
                    yield f"{operation.name}: {failure}"
            except Unreachable as reason:
                yield f"{operation.name}: not reached: {reason}"

    async def _try(self, operation: Operation) -> AsyncGenerator[str]:
        # A part finds what alice wrote, and an answer that repeats it does not have the mark.
        words = (self._mark[:_PART], self._alice)
        known = self._document.id_names(operation, self._ids)
        extras = self._document.extras(operation, known, words)
        asked = await self._ask(operation, extras)
        alices = await self._make_ids(operation, self._alice)
        mallorys = await self._make_ids(operation, self._mallory)
        if operation.method == "get":
            if await self._tells_more(operation, mallorys, extras):
                yield "shows mallory that alice stored something"
        elif not alices:
            await self._store()
        before = await self._rows()
        async for failure in self._by_ids(operation, alices, mallorys):
            yield failure
        for ids in (mallorys, alices, asked) if alices else ({},):
            for content, extra in [("", each) for each in extras] + [(word, {}) for word in words]:
                if self._mark in (await self._answer(operation, ids, extra, content)).text:
                    with_extra = "".join(f", with {name}" for name in extra)
                    yield f"shows mallory what belongs to alice{with_extra}"
        if await self._rows() != before:
            yield "lets mallory change what belongs to alice"

    async def _by_ids(
        self, operation: Operation, alices: Mapping[str, Id], mallorys: Mapping[str, Id]
    ) -> AsyncGenerator[str]:
        """Yield what one id of alice's tells, beside ids of mallory's and beside others of hers."""
        for name, value in alices.items():
            missing = [_missing(value, number) for number in (1, 2)]
            for own in (mallorys, alices):
                # The one that exists is in the middle, so that nothing that grows tells it.
                absent, found, other = [
                    await self._answer(operation, {**own, name: each})
                    for each in (missing[0], value, missing[1])
                ]
                if self._mark in found.text:
                    yield f"shows mallory what belongs to alice, by {name}"
                for difference in differences(name, found, absent, other):
                    yield difference

    async def _ask(
        self, operation: Operation, extras: Collection[Mapping[str, object]]
    ) -> dict[str, Id]:
        """Have alice call it in each way, and return the ids that she used last."""
        ids = await self._make_ids(operation, self._alice)
        for extra in extras:
            answer = await self._send(self._alice, operation, ids, extra)
            if answer.is_error and not extra:
                raise Unreachable(
                    f"alice gets {answer.status_code} {answer.text[:200]}; give ids=, bodies= or "
                    "headers=, or name it in skip="
                )
            # What a GET has shown her can be kept, and be shown to mallory; the rest may be gone.
            if operation.method != "get":
                await self._ensure_users()
                ids = await self._make_ids(operation, self._alice)
        return ids

    async def _ensure_users(self) -> None:
        for user in (self._alice, self._mallory):
            await self._database.users.ensure(user, email=f"{user}@example.org", name=user)

    async def _creates(self, operation: Operation) -> bool:
        """Whether it stores something: a POST that answers with an id."""
        if operation.method != "post":
            return False
        try:
            ids = await self._make_ids(operation, self._alice)
            return id_of(await self._send(self._alice, operation, ids)) is not None
        except Unreachable:
            return False

    async def _store(self) -> None:
        """Have alice store something of each kind."""
        for creator in self._creators:
            await self._send(self._alice, creator, await self._make_ids(creator, self._alice))
        for make in self._ids.values():
            await make(self._database, self._alice)

    async def _tells_more(
        self,
        operation: Operation,
        ids: Mapping[str, Id],
        extras: Collection[Mapping[str, object]],
    ) -> bool:
        """Whether mallory gets another answer once alice has stored more, as from a count."""

        async def answers() -> list[Answer]:
            return [await self._answer(operation, ids, each) for each in extras]

        told: set[tuple[int, str]] | None = None
        # Three times, because an answer can have the time in it.
        for _ in range(3):
            first, second = await answers(), await answers()
            await self._store()
            now = {
                (number, place)
                for number, (*before, after) in enumerate(
                    zip(first, second, await answers(), strict=True)
                )
                for place in changes(before, after)
            }
            told = now if told is None else told & now
            if not told:
                return False
        return True

    async def _send(
        self,
        user: str,
        operation: Operation,
        ids: Mapping[str, Id],
        extra: Mapping[str, object] = MappingProxyType({}),
        content: str = "",
    ) -> "Response":
        # Other texts in each request, because names may have to be unique.
        mark = self._mark if user == self._alice else "x"
        content = content or f"{mark}{next(self._numbers):x}"
        return await self._client.send(user, self._document.request(operation, ids, content, extra))

    async def _answer(
        self,
        operation: Operation,
        ids: Mapping[str, Id],
        extra: Mapping[str, object] = MappingProxyType({}),
        content: str = "",
    ) -> Answer:
        return Answer.of(await self._send(self._mallory, operation, ids, extra, content), ids)

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

    async def _make_ids(
        self, operation: Operation, user: str, made: Mapping[str, Id] = MappingProxyType({})
    ) -> dict[str, Id]:
        if operation in self._making:
            circle = self._making[self._making.index(operation) :]
            names = " and ".join(each.name for each in circle)
            raise Unreachable(f"{names} need an id of each other: give ids= for one of them")
        ids = dict(made)
        self._making.append(operation)
        try:
            for name in self._document.id_names(operation, self._ids):
                if name not in ids:
                    ids[name] = await self._make_id(operation, name, user, ids)
        finally:
            self._making.pop()
        return ids

    async def _make_id(self, operation: Operation, name: str, user: str, made: dict[str, Id]) -> Id:
        if name in self._ids:
            return await self._ids[name](self._database, user)
        if plain(name) == "user_id":
            return user
        creator = self._document.creator(operation, name)
        if creator is None:
            raise Unreachable(f"no POST operation returns a {name}: give ids=")
        outer = {key: made[key] for key in re.findall(r"{(\w+)}", creator.path) if key in made}
        answer = await self._send(user, creator, await self._make_ids(creator, user, outer))
        found = id_of(answer, name)
        if found is None:
            raise Unreachable(
                f"{creator.name} returns no {name} ({answer.status_code}): give ids= or bodies="
            )
        return found


def _missing(value: Id, number: int) -> Id:
    if isinstance(value, int):
        return value + 10**9 + number
    try:
        UUID(value)
    except ValueError:
        return f"{value}{token_hex(4)}"
    return str(uuid4())
