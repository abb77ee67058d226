"""Everything that can be set, from arguments, the environment or `.env`, in this order."""

from inspect import signature
from typing import Annotated, Any, ClassVar, Final, override

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from todo_db.errors import ConfigurationError

_Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


def _separated(value: object) -> object:
    """Split a text at its commas; leave any other value to pydantic."""
    if not isinstance(value, str):
        return value
    return tuple(part for item in value.split(",") if (part := item.strip()))


# A comma-separated list, not JSON.
_List = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_separated)]


# What pydantic-settings takes besides the fields, such as `_env_file`.
_OPTIONS: Final = {
    name
    for name in signature(BaseSettings.__init__).parameters
    if name.startswith("_") and not name.startswith("__")
}


class Settings(BaseSettings):
    """Frozen settings. URLs and secrets print as asterisks.

    Each field is read from the variable of its name, `TODO_DB_` in front unless another name is
    given below. Durations are in seconds. `Settings(_env_file=None)` reads no `.env`, and
    `_env_file="test.env"` another file.

    ```python
    settings = Settings(database_url="postgresql://todo_login@localhost/todo", pool_size=10)
    ```

    Raises:
        ConfigurationError: A value cannot be used. Names the field, not the value.

    Attributes:
        database_url: `DATABASE_URL`. What `Database` connects to; Neon's pooled URL, say.
        direct_database_url: `DIRECT_DATABASE_URL`. What migrations connect to, where that
            differs.
        better_auth_secret: `BETTER_AUTH_SECRET`, as on the Better Auth server.
        better_auth_secrets: `BETTER_AUTH_SECRETS`, as on the Better Auth server. Its first entry
            signs the cookies, and `BETTER_AUTH_SECRET` does not any more.
        better_auth_url: `BETTER_AUTH_URL`, as on the Better Auth server. Only its origin counts.
        better_auth_trusted_origins: `BETTER_AUTH_TRUSTED_ORIGINS`, as on the Better Auth server, a
            comma-separated list. Pages of these origins may send requests with the cookie.
        neon_auth_base_url: `NEON_AUTH_BASE_URL`, from Neon's console. Sets the next three.
        jwks_url: Where the public keys of the JWTs are. By default the table `jwks`.
        jwt_issuer: The claim `iss` of the JWTs, byte for byte. By default the origin of
            `better_auth_url`.
        jwt_audience: One of these must be in the claim `aud`; a comma-separated list. By default
            the origin of `better_auth_url`; with `jwt_issuer` the claim is not checked.
        jwks_grace_period_seconds: How long a key of the table is used after it expired, as
            `gracePeriod` on the Better Auth server. At most 30 days.
        session_cookie: The whole name of the session's cookie, if Better Auth has `cookiePrefix`,
            `cookies` or `useSecureCookies` in its options.
        strict_origin: Also refuse a cookie if the request says nothing about the page that sent
            it. Browsers always do with https.
        pool_size: Connections kept open by each process.
        max_overflow: Connections opened beyond that under load, and closed after it.
        pool_timeout_seconds: How long a call waits for a connection.
        connect_timeout_seconds: How long one attempt to connect may take.
        connect_retry_seconds: How long all attempts to connect may take together. The default
            outlasts the 15 s for which PgBouncer repeats a failure; 0 makes an attempt to
            connect part of a try of the call.
        command_timeout_seconds: How long the client waits for any answer. The only defence
            against a peer that vanished; keep it above `statement_timeout_seconds`.
        statement_timeout_seconds: After this time the server cancels a statement.
        lock_timeout_seconds: After this time the server stops waiting for a lock.
        idle_in_transaction_timeout_seconds: After this time the server ends a transaction that
            sends nothing.
        retry_attempts: Tries of a call that is known not to have been applied, the first
            included. 1 turns all retries off, those of connecting as well.
        retry_timeout_seconds: How long after the first try failed another one may begin.
        slow_call_seconds: A call or transaction that takes longer is logged as a warning; 0 turns
            that off.
        prepared_statements: Keep prepared statements on each connection. By default `open` finds
            out whether a pooler tracks them (PgBouncer 1.21 or later, with
            `max_prepared_statements` above 0), and turns them off if not. Off costs one round trip
            more for each statement.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="TODO_DB_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("database_url", "DATABASE_URL")
    )
    direct_database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("direct_database_url", "DIRECT_DATABASE_URL")
    )
    better_auth_secret: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("better_auth_secret", "BETTER_AUTH_SECRET")
    )
    better_auth_url: str | None = Field(
        default=None, validation_alias=AliasChoices("better_auth_url", "BETTER_AUTH_URL")
    )
    better_auth_secrets: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("better_auth_secrets", "BETTER_AUTH_SECRETS")
    )
    better_auth_trusted_origins: _List = Field(
        default=(),
        validation_alias=AliasChoices("better_auth_trusted_origins", "BETTER_AUTH_TRUSTED_ORIGINS"),
    )
    neon_auth_base_url: str | None = Field(
        default=None, validation_alias=AliasChoices("neon_auth_base_url", "NEON_AUTH_BASE_URL")
    )
    jwks_url: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: _List = ()
    jwks_grace_period_seconds: int = Field(default=2_592_000, ge=0, le=2_592_000)
    session_cookie: str | None = Field(default=None, pattern=r"^[\w!#$%&'*+.^`|~-]+$")
    strict_origin: bool = False
    pool_size: int = Field(default=5, ge=1, le=1000)
    max_overflow: int = Field(default=5, ge=0, le=1000)
    pool_timeout_seconds: _Seconds = 10.0
    connect_timeout_seconds: _Seconds = 10.0
    connect_retry_seconds: float = Field(default=20.0, ge=0, le=3600, allow_inf_nan=False)
    command_timeout_seconds: _Seconds = 30.0
    statement_timeout_seconds: _Seconds = 5.0
    lock_timeout_seconds: _Seconds = 3.0
    idle_in_transaction_timeout_seconds: _Seconds = 10.0
    retry_attempts: int = Field(default=5, ge=1, le=5)
    retry_timeout_seconds: _Seconds = 20.0
    slow_call_seconds: float = Field(default=1.0, ge=0, le=3600, allow_inf_nan=False)
    prepared_statements: bool | None = None

    def __init__(self, **values: Any) -> None:  # noqa: ANN401  # pydantic checks each value
        # `.env` may hold other programs' variables, so pydantic has to ignore what it does not
        # know; a misspelt argument is a mistake.
        if unknown := sorted(values.keys() - type(self).model_fields.keys() - _OPTIONS):
            raise ConfigurationError(f"unknown settings: {', '.join(unknown)}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            failure = ConfigurationError(_explained(error))
        except UnicodeDecodeError:
            failure = ConfigurationError("the .env file is not UTF-8")
        except OSError as error:
            failure = ConfigurationError(f"the .env file cannot be read: {error.strerror}")
        else:
            return
        raise failure

    @override
    def __setattr__(self, name: str, value: object) -> None:
        # pydantic's own refusal prints the value, whatever `hide_input_in_errors` says.
        raise ConfigurationError("settings are frozen")


def _explained(error: ValidationError) -> str:
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        for problem in problems
    )
