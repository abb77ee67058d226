"""The repositories: the only code that reads and writes the rows of users.

An application writes repositories of its own in the same way (`docs/how-to/own-tables.md`).
"""

from todo_db.repositories.statements import Executor, Operation, Retry, Row, Statement
from todo_db.repositories.tasks import TaskRepository
from todo_db.repositories.users import UserRepository

__all__ = ["Executor", "Operation", "Retry", "Row", "Statement", "TaskRepository", "UserRepository"]
