"""Alembic's environment for the tables of the package."""

from collections.abc import Iterable

from alembic import context
from alembic.operations import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.schema import SchemaItem

from todo_db.environment import run
from todo_db.errors import ConfigurationError
from todo_db.models import VERSION_TABLE, Base


def _number(
    migrations: MigrationContext,
    _revision: str | Iterable[str | None] | Iterable[str],
    directives: list[MigrationScript],
) -> None:
    """Give a new revision the next number, with four digits, unless `--rev-id` gave one."""
    if migrations.opts["revision_context"].command_args["rev_id"]:
        return  # pragma: no cover  # test_cli runs a copy of this file
    head = ScriptDirectory.from_config(context.config).get_current_head()
    for script in directives:
        script.rev_id = f"{int(head or 0) + 1:04}"


def _include(
    _item: SchemaItem,
    _name: str | None,
    _kind: str,
    reflected: bool,  # noqa: FBT001  # Alembic's own signature
    model: SchemaItem | None,
) -> bool:
    """Ignore what an application or a plugin of Better Auth added, instead of dropping it."""
    return not reflected or model is not None


def _prepare(_connection: Connection) -> None:
    script = ScriptDirectory.from_config(context.config)
    known = {revision.revision for revision in script.walk_revisions()}
    if not known.issuperset(context.get_context().get_current_heads()):
        raise ConfigurationError(
            f"{VERSION_TABLE} names a migration that this package does not have: the database is "
            "newer than this package, or the table belongs to another project"
        )


run(
    Base.metadata,
    _prepare,
    version_table=VERSION_TABLE,
    process_revision_directives=_number,
    include_object=_include,
)
