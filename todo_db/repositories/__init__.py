"""The repositories: the only code that builds SQL statements."""

from todo_db.repositories.statements import Executor, Operation, Retry, Statement
from todo_db.repositories.tasks import TaskRepository
from todo_db.repositories.users import UserRepository

__all__ = ["Executor", "Operation", "Retry", "Statement", "TaskRepository", "UserRepository"]
