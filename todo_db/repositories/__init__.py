"""The only code that builds statements."""

from todo_db.repositories.statements import Call, Executor, Repeat, Statement
from todo_db.repositories.tasks import TaskRepository
from todo_db.repositories.users import UserRepository

__all__ = ["Call", "Executor", "Repeat", "Statement", "TaskRepository", "UserRepository"]
