"""Every shape of SQL that the repositories can send, by name."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, combinations, product
from types import ModuleType
from typing import Final

from todo_db.inputs import TaskChanges, UserChanges
from todo_db.pagination import TaskSort
from todo_db.repositories import Statement, tasks, users

_FLAGS: Final = (False, True)
_OWNER: Final = re.compile(
    r"\b(?:public\.)?(?:tasks\.user_id|users\.id|idempotency_keys\.user_id) = (\$\d+::VARCHAR)"
)
_OWNER_IN_KEY: Final = re.compile(
    r"\((?:public\.)?tasks\.user_id, ((?:public\.)?tasks\.id)\) ([<>]) "
    r"\(\(SELECT \$\d+::VARCHAR AS anon_1\), ([^)]*)\)"
)


def subsets(names: Iterable[str]) -> list[frozenset[str]]:
    listed = sorted(names)
    sizes = range(1, len(listed) + 1)
    return [frozenset(some) for size in sizes for some in combinations(listed, size)]


TASK_CHANGES: Final = subsets(TaskChanges.__annotations__)
USER_CHANGES: Final = subsets(UserChanges.__annotations__)


def _constants(module: ModuleType, subject: str) -> Iterator[tuple[str, Statement]]:
    for name, value in vars(module).items():
        if isinstance(value, Statement):
            yield f"{subject}{name.lower()}", value


def _changing(
    subject: str, factory: Callable[[frozenset[str]], Statement], changes: list[frozenset[str]]
) -> Iterator[tuple[str, Statement]]:
    for columns in changes:
        yield f"{subject}-{'-'.join(sorted(columns))}", factory(columns)


def _pages() -> Iterator[tuple[str, Statement]]:
    for sort, completed, search, after in product(TaskSort, _FLAGS, _FLAGS, _FLAGS):
        given = {"completed": completed, "search": search, "after": after}
        name = "-".join(["tasks_page", sort.value, *(key for key, flag in given.items() if flag)])
        yield name, tasks._page_statement(sort, completed, search, after)


def _counts() -> Iterator[tuple[str, Statement]]:
    for completed, search in product(_FLAGS, _FLAGS):
        given = {"completed": completed, "search": search}
        name = "-".join(["tasks_count", *(key for key, flag in given.items() if flag)])
        yield name, tasks._count_statement(completed, search)


SHAPES: Final[dict[str, Statement]] = dict(
    chain(
        _constants(tasks, "tasks"),
        _pages(),
        _counts(),
        _changing("tasks_update", tasks._update_statement, TASK_CHANGES),
        _changing("tasks_update_if", tasks._update_if_statement, TASK_CHANGES),
        _changing("tasks_update_many", tasks._update_many_statement, TASK_CHANGES),
        _constants(users, "users"),
        _changing("users_update", users._update_statement, USER_CHANGES),
    )
)


def without_owner(sql: str) -> str:
    """Make every predicate on the owner true; keep the parameter, so that it can be bound."""
    return _OWNER.sub(r"\1 IS NOT NULL", _OWNER_IN_KEY.sub(r"\1 \2 \3", sql))


def parameters(statement: Statement) -> tuple[str, ...]:
    return statement.in_transaction.names
