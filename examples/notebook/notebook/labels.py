"""The repository of labels, written as todo_db writes its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from notebook.models import Label
from sqlalchemy import BigInteger, Integer, String, bindparam, delete, insert, select, tuple_

from todo_db import ConflictError, NotFoundError, Page, inputs
from todo_db.pagination import decode, page_of
from todo_db.repositories import Executor, Operation, Retry, Row, Statement


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """One label."""

    id: int
    name: str


class LabelNameTakenError(ConflictError):
    """The user has a label of this name."""

    message = "The user has a label of this name."


class LabelRepository:
    """The labels of one user. Each call is one round trip under a login of `todo-db login`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def create(self, user_id: str, name: str) -> LabelRecord:
        user_id = inputs.user_id(user_id)
        values = {"name": inputs.not_blank("name", inputs.text("name", name, 50))}
        errors = {"uq_labels_user_id_name": LabelNameTakenError}
        return await self._executor.perform(
            user_id, Operation(_CREATE, values, _one, errors=errors)
        )

    async def delete(self, user_id: str, label_id: int) -> None:
        user_id = inputs.user_id(user_id)
        values = {"label_id": inputs.bigint("label_id", label_id)}
        await self._executor.perform(
            user_id, Operation(_DELETE, values, _one, Retry.IDEMPOTENT_DELETE)
        )

    async def list(
        self, user_id: str, *, limit: int = 50, cursor: str | None = None
    ) -> Page[LabelRecord]:
        user_id = inputs.user_id(user_id)
        limit = inputs.limit(limit)
        name, label_id = ("", 0) if cursor is None else decode(cursor, _SCOPE, (str, int))

        def page(rows: Sequence[Row]) -> Page[LabelRecord]:
            labels = [LabelRecord(*row) for row in rows]
            return page_of(labels, limit, _SCOPE, lambda label: (label.name, label.id))

        values = {"after_name": name, "after_id": label_id, "limit": limit + 1}
        return await self._executor.perform(
            user_id, Operation(_LIST, values, page, Retry.READ_ONLY)
        )


def _one(rows: Sequence[Row]) -> LabelRecord:
    if not rows:
        raise NotFoundError
    return LabelRecord(*rows[0])


_SCOPE: Final = ("labels", "by name")
_CREATE: Final = Statement(
    lambda owner: (
        insert(Label)
        .values(user_id=owner, name=bindparam("name", type_=String()))
        .returning(Label.id, Label.name)
    )
)
_DELETE: Final = Statement(
    lambda owner: (
        delete(Label)
        .where(Label.user_id == owner, Label.id == bindparam("label_id", type_=BigInteger()))
        .returning(Label.id, Label.name)
    )
)
_LIST: Final = Statement(
    lambda owner: (
        select(Label.id, Label.name)
        .where(
            Label.user_id == owner,
            tuple_(Label.name, Label.id)
            > tuple_(
                bindparam("after_name", type_=String()), bindparam("after_id", type_=BigInteger())
            ),
        )
        .order_by(Label.name, Label.id)
        .limit(bindparam("limit", type_=Integer()))
    )
)
