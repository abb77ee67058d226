"""The data layer of a multi-user todo application.

Every method takes a `user_id`. PostgreSQL's row-level security limits even a wrong query to the
rows of that user.
"""

from todo_db.database import Database
from todo_db.errors import (
    CallTimeoutError,
    ConcurrentUseError,
    ConfigurationError,
    ConflictError,
    EmailTakenError,
    ForbiddenOriginError,
    IdempotencyKeyReusedError,
    InvalidCursorError,
    InvalidInputError,
    IsolationError,
    NotAuthenticatedError,
    NotFoundError,
    OutcomeUnknownError,
    PoolExhaustedError,
    SchemaError,
    StaleTaskError,
    TaskNotFoundError,
    TodoDBError,
    TransactionAbortedError,
    TransactionError,
    UnavailableError,
    UserIdTakenError,
    UsernameTakenError,
    UserNotFoundError,
)
from todo_db.inputs import NewTask, TaskChanges, UserChanges
from todo_db.pagination import Page, TaskSort
from todo_db.records import Health, TaskRecord, UserRecord
from todo_db.repositories import TaskRepository, UserRepository
from todo_db.settings import Settings
from todo_db.transaction import Transaction

__all__ = [
    "CallTimeoutError",
    "ConcurrentUseError",
    "ConfigurationError",
    "ConflictError",
    "Database",
    "EmailTakenError",
    "ForbiddenOriginError",
    "Health",
    "IdempotencyKeyReusedError",
    "InvalidCursorError",
    "InvalidInputError",
    "IsolationError",
    "NewTask",
    "NotAuthenticatedError",
    "NotFoundError",
    "OutcomeUnknownError",
    "Page",
    "PoolExhaustedError",
    "SchemaError",
    "Settings",
    "StaleTaskError",
    "TaskChanges",
    "TaskNotFoundError",
    "TaskRecord",
    "TaskRepository",
    "TaskSort",
    "TodoDBError",
    "Transaction",
    "TransactionAbortedError",
    "TransactionError",
    "UnavailableError",
    "UserChanges",
    "UserIdTakenError",
    "UserNotFoundError",
    "UserRecord",
    "UserRepository",
    "UsernameTakenError",
]
