"""Settings come from arguments, the environment and `.env`, and keep their secrets."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from todo_db import ConfigurationError, Database, Settings

URL = "postgresql://alice:swordfish@db.example.org/todo"
VARIABLES = {
    "database_url": "DATABASE_URL",
    "direct_database_url": "DIRECT_DATABASE_URL",
    "better_auth_secret": "BETTER_AUTH_SECRET",
    "better_auth_url": "BETTER_AUTH_URL",
    "better_auth_secrets": "BETTER_AUTH_SECRETS",
    "better_auth_trusted_origins": "BETTER_AUTH_TRUSTED_ORIGINS",
    "neon_auth_base_url": "NEON_AUTH_BASE_URL",
    "jwks_url": "TODO_DB_JWKS_URL",
    "jwt_issuer": "TODO_DB_JWT_ISSUER",
    "jwt_audience": "TODO_DB_JWT_AUDIENCE",
    "jwks_grace_period_seconds": "TODO_DB_JWKS_GRACE_PERIOD_SECONDS",
    "session_cookie": "TODO_DB_SESSION_COOKIE",
    "strict_origin": "TODO_DB_STRICT_ORIGIN",
    "pool_size": "TODO_DB_POOL_SIZE",
    "max_overflow": "TODO_DB_MAX_OVERFLOW",
    "pool_timeout_seconds": "TODO_DB_POOL_TIMEOUT_SECONDS",
    "connect_timeout_seconds": "TODO_DB_CONNECT_TIMEOUT_SECONDS",
    "connect_retry_seconds": "TODO_DB_CONNECT_RETRY_SECONDS",
    "command_timeout_seconds": "TODO_DB_COMMAND_TIMEOUT_SECONDS",
    "statement_timeout_seconds": "TODO_DB_STATEMENT_TIMEOUT_SECONDS",
    "lock_timeout_seconds": "TODO_DB_LOCK_TIMEOUT_SECONDS",
    "idle_in_transaction_timeout_seconds": "TODO_DB_IDLE_IN_TRANSACTION_TIMEOUT_SECONDS",
    "retry_attempts": "TODO_DB_RETRY_ATTEMPTS",
    "retry_timeout_seconds": "TODO_DB_RETRY_TIMEOUT_SECONDS",
    "slow_call_seconds": "TODO_DB_SLOW_CALL_SECONDS",
    "prepared_statements": "TODO_DB_PREPARED_STATEMENTS",
}
DEFAULTS: dict[str, Any] = {
    "database_url": None,
    "direct_database_url": None,
    "better_auth_secret": None,
    "better_auth_url": None,
    "better_auth_secrets": None,
    "better_auth_trusted_origins": (),
    "neon_auth_base_url": None,
    "jwks_url": None,
    "jwt_issuer": None,
    "jwt_audience": (),
    "jwks_grace_period_seconds": 2_592_000,
    "session_cookie": None,
    "strict_origin": False,
    "pool_size": 5,
    "max_overflow": 5,
    "pool_timeout_seconds": 10.0,
    "connect_timeout_seconds": 10.0,
    "connect_retry_seconds": 20.0,
    "command_timeout_seconds": 30.0,
    "statement_timeout_seconds": 5.0,
    "lock_timeout_seconds": 3.0,
    "idle_in_transaction_timeout_seconds": 10.0,
    "retry_attempts": 5,
    "retry_timeout_seconds": 20.0,
    "slow_call_seconds": 1.0,
    "prepared_statements": None,
}


def _other(name: str, default: object) -> Any:  # noqa: ANN401  # any type of a setting
    """Return a value that differs from the default, and from most other values."""
    match default:
        case bool():
            return True
        case tuple():
            return (f"value-{name}", f"other-{name}")
        case int() | float():
            return type(default)(3 - 2 * (default == 3))
        case _:
            return False if name == "prepared_statements" else f"value-{name}"


OTHERS = {name: _other(name, default) for name, default in DEFAULTS.items()}
SECRETS = ("database_url", "direct_database_url", "better_auth_secret", "better_auth_secrets")
SECONDS = tuple(
    name for name in DEFAULTS if name.endswith("_seconds") and name != "jwks_grace_period_seconds"
)
MAY_BE_ZERO = ("connect_retry_seconds", "slow_call_seconds")


def text(value: object) -> str:
    """Return a value as the environment has it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def plain(settings: Settings) -> dict[str, object]:
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in settings.model_dump().items()
    }


def assert_reveals_nothing(error: BaseException) -> None:
    assert isinstance(error, ConfigurationError)
    assert "swordfish" not in f"{error} {error!r} {error.args}"
    assert error.__cause__ is None
    assert error.__context__ is None


class TestSources:
    def test_defaults(self) -> None:
        assert plain(Settings()) == DEFAULTS

    @pytest.mark.parametrize("name", DEFAULTS)
    def test_argument(self, name: str) -> None:
        assert plain(Settings(**{name: OTHERS[name]})) == DEFAULTS | {name: OTHERS[name]}

    @pytest.mark.parametrize("name", DEFAULTS)
    def test_variable(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLES[name], text(OTHERS[name]))
        assert plain(Settings()) == DEFAULTS | {name: OTHERS[name]}

    def test_line_of_the_env_file(self, folder: Path) -> None:
        lines = [f"{variable}={text(OTHERS[name])}" for name, variable in VARIABLES.items()]
        (folder / ".env").write_text("\n".join(lines))
        assert plain(Settings()) == OTHERS

    @pytest.mark.parametrize("name", ["database_url", "better_auth_url", "pool_size"])
    def test_argument_before_variable_before_env_file(
        self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        argument, variable, line = ("11", "12", "13")
        (folder / ".env").write_text(f"{VARIABLES[name]}={line}")
        assert str(plain(Settings())[name]) == line
        monkeypatch.setenv(VARIABLES[name], variable)
        assert str(plain(Settings())[name]) == variable
        assert str(plain(Settings(**{name: argument}))[name]) == argument
        assert str(plain(Settings(**{name: OTHERS[name]}))[name]) == str(OTHERS[name])

    def test_an_empty_variable_is_not_set(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for variable in VARIABLES.values():
            monkeypatch.setenv(variable, "")
        assert plain(Settings()) == DEFAULTS
        (folder / ".env").write_text("TODO_DB_POOL_SIZE=7")
        assert Settings().pool_size == 7

    def test_names_of_variables_without_the_prefix_are_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("POOL_SIZE", "7")
        monkeypatch.setenv("PREPARED_STATEMENTS", "no")
        assert plain(Settings()) == DEFAULTS

    def test_the_url_has_one_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TODO_DB_DATABASE_URL", URL)
        assert Settings().database_url is None

    def test_variables_of_other_programs_are_ignored(self, folder: Path) -> None:
        (folder / ".env").write_text("TODO_DB_NO_SUCH=1\nPORT=3000\nTODO_DB_POOL_SIZE=7\n")
        assert plain(Settings()) == DEFAULTS | {"pool_size": 7}

    def test_a_list_is_separated_by_commas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, items in (("a", ("a",)), (" a ,, b,", ("a", "b")), ('["a"]', ('["a"]',))):
            monkeypatch.setenv("TODO_DB_JWT_AUDIENCE", value)
            assert Settings().jwt_audience == items
            assert Settings(jwt_audience=value).jwt_audience == items
        assert Settings(jwt_audience=["a,b"]).jwt_audience == ("a,b",)

    def test_env_file_can_be_another_one_or_none(self, folder: Path) -> None:
        (folder / ".env").write_text("TODO_DB_POOL_SIZE=6")
        (folder / "other.env").write_text("TODO_DB_POOL_SIZE=7")
        assert Settings(_env_file="other.env").pool_size == 7
        assert Settings(_env_file=None).pool_size == 5

    def test_misspelt_option_of_pydantic_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^unknown settings: _env_fil$"):
            Settings(_env_fil=None)


class TestBounds:
    @pytest.mark.parametrize(
        ("name", "least", "most"),
        [
            ("pool_size", 1, 1_000),
            ("max_overflow", 0, 1_000),
            ("retry_attempts", 1, 5),
            ("jwks_grace_period_seconds", 0, 2_592_000),
        ],
    )
    def test_whole_numbers(self, name: str, least: int, most: int) -> None:
        for value in (least, most):
            assert plain(Settings(**{name: value}))[name] == value
        for wrong in (least - 1, most + 1, -1, 10**30, least + 0.5):
            with pytest.raises(ConfigurationError, match=name):
                Settings(**{name: wrong})

    @pytest.mark.parametrize("name", SECONDS)
    def test_seconds(self, name: str) -> None:
        for value in (0.001, 3_600):
            assert plain(Settings(**{name: value}))[name] == value
        for value in (0, -1, 3_600.001, float("inf"), float("nan")):
            if name in MAY_BE_ZERO and value == 0:
                continue
            with pytest.raises(ConfigurationError, match=name):
                Settings(**{name: value})

    @pytest.mark.parametrize("name", MAY_BE_ZERO)
    def test_zero_turns_off(self, name: str) -> None:
        assert plain(Settings(**{name: 0}))[name] == 0


class TestRefusal:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("database_url", 5),
            ("database_url", b"\xffswordfish"),
            ("database_url", ["swordfish"]),
            ("better_auth_secret", {"swordfish": 1}),
            ("better_auth_url", 5),
            ("jwt_audience", 5),
            ("session_cookie", "a swordfish"),
            ("session_cookie", "swordfish;"),
            ("session_cookie", "swordfish=1"),
            ("strict_origin", "swordfish"),
            ("pool_size", "swordfish"),
            ("pool_size", "5 swordfish"),
            ("pool_size", None),
            ("max_overflow", ["swordfish"]),
            ("pool_timeout_seconds", "swordfish"),
            ("lock_timeout_seconds", "10s swordfish"),
            ("retry_attempts", "swordfish"),
            ("prepared_statements", "swordfish"),
            ("prepared_statements", 2),
        ],
        ids=lambda part: ascii(part)[:24],
    )
    def test_names_the_setting_without_its_value(self, name: str, value: object) -> None:
        with pytest.raises(ConfigurationError, match=name) as caught:
            Settings(**{name: value})
        assert_reveals_nothing(caught.value)

    def test_names_a_variable_without_its_value(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / ".env").write_text(f"TODO_DB_PREPARED_STATEMENTS={URL}")
        monkeypatch.setenv("TODO_DB_POOL_SIZE", URL)
        with pytest.raises(ConfigurationError) as caught:
            Settings()
        assert_reveals_nothing(caught.value)
        sentences = str(caught.value).split("; ")
        assert [sentence.partition(": Input should")[0] for sentence in sentences] == [
            "pool_size",
            "prepared_statements",
        ]

    def test_names_an_unknown_argument_without_its_value(self) -> None:
        with pytest.raises(ConfigurationError, match=r"database_uri, poolsize$") as caught:
            Settings(poolsize=7, database_uri=URL, pool_size=7)
        assert_reveals_nothing(caught.value)

    def test_an_env_file_that_is_no_utf_8(self, folder: Path) -> None:
        (folder / ".env").write_bytes(b"DATABASE_URL=postgresql://alice:\xf6swordfish@db/todo\n")
        with pytest.raises(ConfigurationError) as caught:
            Settings()
        assert_reveals_nothing(caught.value)

    def test_an_env_file_that_cannot_be_read(self, folder: Path) -> None:
        # Root can read every file, but not the first page of its own memory.
        (folder / ".env").symlink_to("/proc/self/mem")
        with pytest.raises(ConfigurationError, match=r"the \.env file cannot be read: Input/out"):
            Settings()

    def test_a_database_without_a_url(self) -> None:
        with pytest.raises(ConfigurationError, match="DATABASE_URL"):
            Database(Settings())

    @pytest.mark.parametrize(
        "url",
        [
            "swordfish",
            "",
            "mysql://alice:swordfish@db/todo",
            "postgresql+psycopg://alice:swordfish@db/todo",
            "postgresql://alice:swordfish@db:port/todo",
            "postgresql://alice:swordfish@db/todo?password=swordfish",
        ],
    )
    def test_a_database_with_a_bad_url(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Database.from_url(url)
        assert_reveals_nothing(caught.value)


class TestFrozen:
    @pytest.mark.parametrize("name", DEFAULTS)
    def test_cannot_be_changed(self, name: str) -> None:
        settings = Settings(**{name: OTHERS[name]})
        with pytest.raises(ConfigurationError):
            setattr(settings, name, DEFAULTS[name])
        with pytest.raises((ConfigurationError, ValidationError)):
            delattr(settings, name)
        assert plain(settings) == DEFAULTS | {name: OTHERS[name]}

    def test_cannot_be_added_to(self) -> None:
        with pytest.raises((ConfigurationError, ValidationError)):
            Settings().poolsize = 7

    def test_L7_a_refused_change_does_not_say_its_value(self) -> None:
        with pytest.raises((ConfigurationError, ValidationError)) as caught:
            Settings().database_url = URL  # type: ignore[assignment]
        assert "swordfish" not in f"{caught.value} {caught.value!r}"

    def test_can_be_compared(self) -> None:
        assert Settings(database_url=URL) == Settings(database_url=URL)
        assert Settings(database_url=URL) != Settings()


class TestSecrets:
    @pytest.mark.parametrize("name", SECRETS)
    def test_L7_print_as_asterisks(self, name: str) -> None:
        settings = Settings(**{name: URL})
        assert plain(settings)[name] == URL
        assert f"{name}=SecretStr('**********')" in repr(settings)
        for shown in (
            str(settings),
            repr(settings),
            f"{settings}",
            str(settings.model_dump()),
            settings.model_dump_json(),
            str(list(settings)),
            ascii(copy.deepcopy(settings)),
        ):
            assert "swordfish" not in shown

    def test_are_kept_by_a_copy(self) -> None:
        settings = Settings(database_url=URL)
        assert copy.copy(settings) == settings
        assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301  # our own bytes
