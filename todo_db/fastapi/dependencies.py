"""The dependencies of handlers. All of them work for HTTP requests and for WebSockets."""

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Security
from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer
from fastapi.openapi.models import SecurityBase as SecurityModel
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from todo_db import inputs, trust
from todo_db.authenticator import Authenticator, Identity
from todo_db.database import Database
from todo_db.errors import (
    ConfigurationError,
    EmailTakenError,
    ForbiddenOriginError,
    InvalidInputError,
    NotFoundError,
)
from todo_db.fastapi.caching import keep_private
from todo_db.origins import can_change_something
from todo_db.pagination import EPOCH, MICROSECOND
from todo_db.records import TaskRecord, UserRecord
from todo_db.repositories import TaskRepository, UserRepository

_ETAG: Final = re.compile(r'"(-?[0-9]{1,18})"')
# A CHECK constraint refuses it, so no row has it.
_NO_VERSION: Final = datetime(1, 1, 1, tzinfo=UTC)
_MOST_SIGN_INS: Final = 10_000
# Where the scope of a request has the identity. It is not there if `current_user_id` was replaced.
_IDENTITY: Final = "todo_db.identity"
_NO_LIFESPAN: Final = (
    "no Database was opened for this request: give the outermost FastAPI `lifespan=lifespan()` of"
    " todo_db.fastapi, or enter it in the lifespan that it has. httpx.ASGITransport does not run a"
    " lifespan; TestClient runs it in a `with` block"
)

_logger: Final = logging.getLogger(__name__)


class _Scheme(SecurityBase):
    """A security scheme for the documentation; `current_identity` reads the headers itself."""

    def __init__(self, scheme_name: str, model: SecurityModel) -> None:
        self.scheme_name = scheme_name
        self.model = model

    def __call__(self) -> None:
        """Read nothing, so that it fits HTTP requests and WebSockets."""


BEARER: Final = _Scheme("HTTPBearer", HTTPBearer(description="A session token, or a JWT"))
COOKIE: Final = _Scheme(
    "APIKeyCookie",
    APIKey.model_validate(
        {
            "in": APIKeyIn.cookie,
            "name": trust.COOKIE,
            "description": "Better Auth's cookie; with https its name begins with `__Secure-`",
        }
    ),
)


class SignIns:
    """The users of another issuer that this process has seen, so that each is stored once."""

    def __init__(self) -> None:
        self._emails: dict[str, str] = {}

    async def ensure(self, users: UserRepository, identity: Identity) -> None:
        """Store a user who is new, and an e-mail address that has changed."""
        if identity.email is None:
            raise InvalidInputError(
                "email", "must be a claim of the token: let the issuer add the claim `email`"
            )
        email = inputs.email(identity.email)
        if self._emails.get(identity.user_id) == email:
            return
        name = identity.name or ""
        user = await users.ensure(identity.user_id, email=email, name=name)
        if user.email != email:
            try:
                await users.set_email(identity.user_id, email=email)
            except EmailTakenError:
                # The user keeps the access to their own tasks.
                _logger.warning(
                    "a new e-mail address is another user's, so it was not stored",
                    extra={"event": "todo_db.email.taken"},
                )
        if len(self._emails) >= _MOST_SIGN_INS:
            del self._emails[next(iter(self._emails))]
        self._emails[identity.user_id] = email


def current_database(connection: HTTPConnection) -> Database:
    """Return the `Database` that the lifespan opened.

    Raises:
        ConfigurationError: The lifespan did not run.
    """
    database: Database = _opened(connection, "todo_database")
    return database


CurrentDatabase = Annotated[Database, Depends(current_database)]
"""The `Database` that the lifespan opened."""


async def current_identity(
    connection: HTTPConnection,
    _bearer: Annotated[object, Security(BEARER)],  # for the documentation
    _cookie: Annotated[object, Security(COOKIE)],
) -> Identity:
    """Return who sent the request, by a cookie, a session token or a JWT.

    If a cookie is the credential of a request that can change something, or of a WebSocket, the
    page that sent it must be one of those that `Origins` lets pass.

    Raises:
        NotAuthenticatedError: The credential is missing or not valid.
        ForbiddenOriginError: Another page sent the cookie.
        ConfigurationError: The settings do not say whose credentials are accepted.
    """
    authenticator: Authenticator | None = _opened(connection, "todo_authenticator")
    if authenticator is None:
        raise ConfigurationError(trust.NOT_SET)
    headers = connection.headers
    identity = await authenticator.identity(
        cookie="; ".join(headers.getlist("cookie")), authorization=headers.get("authorization")
    )
    if (
        identity.is_from_cookie
        and can_change_something(connection.scope.get("method"))
        and not authenticator.trust.origins.allow(
            origin=", ".join(headers.getlist("origin")) if "origin" in headers else None,
            fetch_site=headers.get("sec-fetch-site"),
            host=headers.get("host"),
        )
    ):
        raise ForbiddenOriginError
    connection.scope[_IDENTITY] = identity
    return identity


async def current_user_id(identity: Annotated[Identity, Depends(current_identity)]) -> str:
    """Return the id of the user who sent the request, by a cookie, a session token or a JWT.

    For another authentication, put a function of your own into `app.dependency_overrides`. Every
    other dependency trusts the id that it returns.

    Raises:
        NotAuthenticatedError: The credential is missing or not valid.
        ForbiddenOriginError: Another page sent the cookie.
        ConfigurationError: The settings do not say whose credentials are accepted.
    """
    return identity.user_id


CurrentUserId = Annotated[str, Depends(current_user_id)]
"""The id of the user who sent the request."""


async def current_user(
    user_id: CurrentUserId, connection: HTTPConnection, database: CurrentDatabase
) -> Identity:
    """Return who sent the request, and store a new user of another issuer in `users` first.

    That is done once for each user in a process. A changed e-mail address is stored too. Better
    Auth stores its users itself, so for its credentials nothing is done. Neither is it if
    `current_user_id` was replaced by a function of your own: the result has the id alone then.

    Raises:
        InvalidInputError: The token has no claim `email`.
        EmailTakenError: The user is new, and another user has the e-mail address.
    """
    identity: Identity | None = connection.scope.get(_IDENTITY)
    if identity is None:
        return Identity(user_id)
    if not _opened(connection, "todo_authenticator").stores_its_users:
        sign_ins: SignIns = _opened(connection, "todo_sign_ins")
        await sign_ins.ensure(database.users, identity)
    return identity


CurrentUser = Annotated[Identity, Depends(current_user)]
"""Who sent the request; the user is stored in `users`."""


def path_user_id(user_id: str, current: CurrentUserId) -> str:
    """Return the `{user_id}` of the path, if it is the user who sent the request.

    Raises:
        NotFoundError: It is another user, or a user that does not exist.
    """
    if user_id != current:
        raise NotFoundError
    return current


PathUserId = Annotated[str, Depends(path_user_id)]
"""The id of the user who sent the request, for paths like `/api/{user_id}/tasks`."""


def repository[R](make: Callable[[Database], R]) -> Callable[[Database], R]:
    """Return a dependency that gives a repository on the database, such as one of your own.

    ```python
    class LabelRepository:
        def __init__(self, executor: Executor) -> None:
            self._executor = executor


    Labels = Annotated[LabelRepository, Depends(repository(LabelRepository))]
    ```
    """

    def on_database(database: CurrentDatabase) -> R:
        return make(database)

    return on_database


Tasks = Annotated[TaskRepository, Depends(repository(TaskRepository))]
"""The repository of tasks; each call is its own transaction."""
Users = Annotated[UserRepository, Depends(repository(UserRepository))]
"""The repository of users; each call is its own transaction."""


def etag(record: TaskRecord | UserRecord) -> str:
    """Return the version of a record, for the header `ETag`."""
    return f'"{(record.updated_at - EPOCH) // MICROSECOND}"'


def _if_match(
    value: Annotated[str | None, Header(alias="If-Match", description="An ETag, or *")] = None,
) -> datetime | None:
    if value is None or value.strip() == "*":
        return None
    version = _ETAG.fullmatch(value.strip())
    if version is not None:
        with suppress(OverflowError):
            return EPOCH + int(version[1]) * MICROSECOND
    # A weak ETag, a list of ETags, or another format. The repository refuses it, and not this
    # function, which may run before the credential is checked.
    return _NO_VERSION


IfMatch = Annotated[datetime | None, Depends(_if_match)]
"""The header `If-Match`, as `expected_updated_at`; None without the header, or for `*`."""


def _idempotency_key(
    value: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description="Unique for this request, such as a UUID"),
    ] = None,
) -> str | None:
    return value


IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
"""The header `Idempotency-Key`, as `idempotency_key`; None without the header."""


def _opened(connection: HTTPConnection, name: str) -> Any:  # noqa: ANN401  # what the lifespan made
    found = connection.scope.get("state", {})
    if name not in found:
        raise ConfigurationError(_NO_LIFESPAN)
    keep_private(connection)
    return found[name]
