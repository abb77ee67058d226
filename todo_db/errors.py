"""Every error of the package, and what a driver's error becomes.

```
TodoDBError
├── ConfigurationError             settings, URL, role or TLS; before or at open()
├── InvalidInputError (ValueError) .field; before any SQL
│   └── InvalidCursorError
├── NotFoundError                  absent or not yours, never told apart
│   ├── UserNotFoundError
│   └── TaskNotFoundError
├── ConflictError
│   ├── EmailTakenError  UsernameTakenError  UserIdTakenError
│   ├── StaleTaskError             expected_updated_at no longer holds
│   └── IdempotencyKeyReusedError  same key, other payload
├── NotAuthenticatedError          no or no valid credential; says no more
├── ForbiddenOriginError           a page of another origin sent the cookie
├── IsolationError                 a bug or a wrong role, never user input
├── SchemaError                    the database is older than this package
├── TransactionError
│   ├── TransactionAbortedError    an earlier statement failed, nothing was committed
│   └── ConcurrentUseError         one transaction in two tasks
├── UnavailableError               .retry_after; not applied, safe to try again
│   ├── PoolExhaustedError
│   └── CallTimeoutError
└── OutcomeUnknownError            no answer to a change: applied or not
```

A message names fields, constraints and SQLSTATEs, never a value, a statement or a URL.
"""

from collections.abc import Callable, Iterator
from socket import EAI_AGAIN, gaierror
from ssl import SSLCertVerificationError
from typing import ClassVar, Final, override


class TodoDBError(Exception):
    """Something went wrong in the data layer.

    Attributes:
        message: What `str()` returns for an error that was raised without arguments.
        constraint: The name of the constraint that PostgreSQL found broken, if it was one.
    """

    # Not the docstring: `python -OO` removes docstrings.
    message: ClassVar[str] = "The data layer failed."
    constraint: str | None = None

    @override
    def __str__(self) -> str:
        return super().__str__() or self.message


class ConfigurationError(TodoDBError):
    """A setting, the URL, the role or the certificate is missing or wrong."""

    message = "A setting, the URL, the role or the certificate is missing or wrong."


class InvalidInputError(TodoDBError, ValueError):
    """An argument cannot be stored. No SQL was sent. Map it to HTTP 422.

    Attributes:
        field: The parameter's name.
        requirement: What it must be, without the value that was given.
    """

    def __init__(self, field: str, requirement: str) -> None:
        super().__init__(field, requirement)
        self.field = field
        self.requirement = requirement

    @override
    def __str__(self) -> str:
        return f"{self.field}: {self.requirement}"


class InvalidCursorError(InvalidInputError):
    """A page cursor is damaged, or belongs to another sort or filter."""

    def __init__(
        self, field: str = "cursor", requirement: str = "must come from the page before, unchanged"
    ) -> None:
        super().__init__(field, requirement)


class NotFoundError(TodoDBError):
    """There is no such row of this user's. Map it to HTTP 404.

    Another user's row raises the same error with the same message, so that ids cannot be
    probed.
    """

    message = "There is no such row of this user's."


class UserNotFoundError(NotFoundError):
    """There is no such user."""

    message = "There is no such user."


class TaskNotFoundError(NotFoundError):
    """The user has no such task."""

    message = "The user has no such task."


class ConflictError(TodoDBError):
    """The change contradicts what is stored. Map it to HTTP 409."""

    message = "The change contradicts what is stored."


class EmailTakenError(ConflictError):
    """Another user has this e-mail address."""

    message = "Another user has this e-mail address."


class UsernameTakenError(ConflictError):
    """Another user has this username."""

    message = "Another user has this username."


class UserIdTakenError(ConflictError):
    """A user with this id exists."""

    message = "A user with this id exists."


class StaleTaskError(ConflictError):
    """The task was changed since it was read: `expected_updated_at` no longer holds."""

    message = "The task was changed since it was read."


class IdempotencyKeyReusedError(ConflictError):
    """The idempotency key was used before, with another payload."""

    message = "The idempotency key was used before, with another payload."


class NotAuthenticatedError(TodoDBError):
    """The request carries no valid credential. Map it to HTTP 401."""

    message = "The request carries no valid credential."


class ForbiddenOriginError(TodoDBError):
    """A page of another origin sent the user's cookie. Map it to HTTP 403.

    The credential may be valid, so it is not a `NotAuthenticatedError`: signing in again does not
    help.
    """

    message = (
        "The cookie was sent by a page of an origin that is not in BETTER_AUTH_TRUSTED_ORIGINS."
    )


class IsolationError(TodoDBError):
    """The isolation of users was about to be broken: a bug or a wrong role, never user input.

    Let an operator see it. Map it to HTTP 500.
    """

    message = "The isolation of users was about to be broken."


class SchemaError(TodoDBError):
    """The database is not migrated as far as this package needs: run `todo-db migrate`."""

    message = "The database is not migrated as far as this package needs: run `todo-db migrate`."


class TransactionError(TodoDBError):
    """The transaction cannot do this."""

    message = "The transaction cannot do this."


class TransactionAbortedError(TransactionError):
    """An earlier statement failed; PostgreSQL commits nothing of this transaction."""

    message = "An earlier statement failed or was interrupted: nothing is committed."


class ConcurrentUseError(TransactionError):
    """Two tasks used one transaction at the same time. Open one for each."""

    message = "Two tasks used one transaction at the same time."


class UnavailableError(TodoDBError):
    """The database did not take the call. Nothing was applied: it is safe to try again.

    Map it to HTTP 503 with `Retry-After`.

    Attributes:
        retry_after: Seconds worth waiting first.
        transient: Whether the package itself tries again before it raises this.
    """

    message = "The database did not take the call. Nothing was applied."

    def __init__(
        self, message: str = "", *, retry_after: float = 1.0, transient: bool = False
    ) -> None:
        super().__init__(*([message] if message else []))
        self.retry_after = retry_after
        self.transient = transient


class PoolExhaustedError(UnavailableError):
    """No connection became free within `pool_timeout_seconds`."""

    message = "No connection became free within `pool_timeout_seconds`."


class CallTimeoutError(UnavailableError):
    """A lock or a statement took longer than its timeout, and was not applied."""

    message = "A lock or a statement took longer than its timeout, and was not applied."


class OutcomeUnknownError(TodoDBError):
    """No answer came to a change, or to its COMMIT: it may have been applied or not.

    Read before you try again, because a second call may apply it twice. A call with an idempotency
    key may be made again as it is.
    """

    message = "No answer came to a change: it may have been applied or not."


_USUAL: Final = "must be from 0001-01-02 to 9999-12-30 (UTC)"
# Constraint names are API: tests hold this map against the catalogue of the live database.
_BY_CONSTRAINT: Final[dict[str, Callable[[], TodoDBError]]] = {
    "pk_users": UserIdTakenError,
    "uq_users_email": EmailTakenError,
    "uq_users_username": UsernameTakenError,
    "fk_tasks_user_id_users": UserNotFoundError,
    "fk_idempotency_keys_user_id_users": UserNotFoundError,
    # The first call has committed by now: the next try finds its key.
    "pk_idempotency_keys": lambda: UnavailableError(
        "another call with the same idempotency key was under way", transient=True
    ),
    "ck_idempotency_keys_key_length": lambda: InvalidInputError(
        "idempotency_key", "must have 1 to 255 characters"
    ),
    "ck_users_id_length": lambda: InvalidInputError("user_id", "must have 1 to 255 characters"),
    "ck_users_email_lower": lambda: InvalidInputError("email", "must be in lower case"),
    "ck_users_timestamps_range": lambda: InvalidInputError("created_at", _USUAL),
    "ck_tasks_title_not_blank": lambda: InvalidInputError("title", "must not be blank"),
    "ck_tasks_description_length": lambda: InvalidInputError(
        "description", "must have at most 65536 characters"
    ),
    "ck_idempotency_keys_timestamps_range": lambda: InvalidInputError("created_at", _USUAL),
    "ck_tasks_timestamps_range": lambda: InvalidInputError("created_at", _USUAL),
}


def connection_lost() -> UnavailableError:
    """Return what a connection that broke before any COMMIT means: nothing was applied."""
    return UnavailableError("the connection was lost", transient=True)


# https://www.postgresql.org/docs/current/errcodes-appendix.html; two characters are a class.
_BY_SQLSTATE: Final[dict[str, Callable[[], TodoDBError]]] = {
    "08": connection_lost,
    "23503": lambda: ConflictError(
        "a row that is referenced does not exist, or this row is still referenced"
    ),
    "23505": ConflictError,
    "23P01": ConflictError,
    "25006": lambda: TransactionError("a read-only transaction cannot write"),
    "25P02": TransactionAbortedError,
    "25P03": lambda: UnavailableError("the transaction was idle for too long"),
    "25P04": lambda: UnavailableError("the transaction took too long"),
    "28": lambda: ConfigurationError("the database refused the login"),
    "3D000": lambda: ConfigurationError("the database of the URL does not exist"),
    "40001": lambda: UnavailableError("concurrent transactions collided", transient=True),
    "40P01": lambda: UnavailableError("concurrent transactions deadlocked", transient=True),
    "42501": lambda: IsolationError("the database refused what the role may not do"),
    "42703": SchemaError,
    "42P01": SchemaError,
    "53": lambda: UnavailableError("the database is short of resources", retry_after=5.0),
    "53300": lambda: UnavailableError("the database has no connection left", transient=True),
    "55P03": lambda: CallTimeoutError("a lock was not free in time", transient=True),
    "57014": lambda: CallTimeoutError("a statement took too long"),
    "57P": lambda: UnavailableError("the database is starting or stopping", transient=True),
}
# Values that a column or a CHECK constraint refuses; the field is that column or constraint.
_INVALID_VALUES: Final = {
    "22001": "is too long",
    "22003": "is out of range",
    "23502": "must not be NULL",
    "23514": "does not hold",
}


def translated(error: BaseException) -> TodoDBError:
    """Return what a driver's error means, from its SQLSTATE and constraint name alone.

    The server's error may be the cause of the loss of a connection that followed it, so the
    innermost cause is read first.
    """
    return (
        error
        if isinstance(error, TodoDBError)
        else _from_server(error) or _from_client(error) or TodoDBError(_unknown(error))
    )


def translated_if_known(error: BaseException) -> TodoDBError | None:
    """Return what an error of a caller's own statement means, or None.

    None is for what is wrong with the text of the statement (SQLSTATE class 42, syntax errors and
    unknown names): the message of SQLAlchemy's error explains it, and no class of ours does.
    """
    sqlstate = sqlstate_of(error)
    if sqlstate is not None and sqlstate.startswith("42") and sqlstate != "42501":
        return None
    return _from_server(error) or _from_client(error)


def is_server_error(error: BaseException) -> bool:
    """Return whether the server answered with an error, and its session goes on."""
    sqlstate = sqlstate_of(error)
    return sqlstate is not None and not sqlstate.startswith(("08", "57P"))


def _from_client(error: BaseException) -> TodoDBError | None:
    match error:
        case TimeoutError():
            return CallTimeoutError("the database did not answer in time")
        case gaierror() if error.errno != EAI_AGAIN:
            return ConfigurationError("the host of the database URL is unknown")
        case SSLCertVerificationError():
            # An OSError like those below, but it will not go away by itself.
            return ConfigurationError("the server's certificate cannot be verified")
        case OSError():
            return UnavailableError("the database cannot be reached", transient=True)
        case _:
            return None


def _from_server(error: BaseException) -> TodoDBError | None:
    for cause in reversed(list(causes(error))):
        constraint = getattr(cause, "constraint_name", None)
        sqlstate = getattr(cause, "sqlstate", None)
        if constraint in _BY_CONSTRAINT:
            failure = _BY_CONSTRAINT[constraint]()
        elif not isinstance(sqlstate, str):
            continue
        elif requirement := _INVALID_VALUES.get(sqlstate):
            field = getattr(cause, "column_name", None) or constraint or "values"
            failure = InvalidInputError(field, requirement)
        elif make := next(
            (_BY_SQLSTATE[sqlstate[:n]] for n in (5, 3, 2) if sqlstate[:n] in _BY_SQLSTATE), None
        ):
            failure = make()
        else:
            return None
        failure.constraint = constraint
        return failure
    return None


def _unknown(error: BaseException) -> str:
    sqlstate = sqlstate_of(error)
    if sqlstate is None:
        return f"the driver failed with {type(error).__name__}"
    return f"the database refused a statement (SQLSTATE {sqlstate})"


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of the innermost cause that has one."""
    found = None
    for cause in causes(error):
        sqlstate = getattr(cause, "sqlstate", None)
        found = sqlstate if isinstance(sqlstate, str) else found
    return found


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
