"""The files with which an application keeps migrations of its own."""

import re
import tomllib
from pathlib import Path
from typing import Final

from todo_db.errors import ConfigurationError
from todo_db.migrations import script_directory

_MODULE: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_ENVIRONMENT: Final = '''"""Alembic's environment for the tables of this application."""

from {module} import Base

from todo_db.migrations import configure

configure(Base.metadata)
'''
_MODELS: Final = '''"""The tables of this application."""

from sqlalchemy import BigInteger, Identity, String
from sqlalchemy.orm import Mapped, mapped_column

from todo_db.models import Base, Owned, Timestamps


class Label(Owned, Timestamps, Base):
    """A label of one user. `user_id` and its foreign key come from `Owned`."""

    __tablename__ = "labels"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
'''
_SETTINGS: Final = """
[tool.alembic]
script_location = "%(here)s/{folder}"
prepend_sys_path = ["."]
"""


def create_project(root: Path, module: str, folder: str) -> list[Path]:
    """Write Alembic's folder of an application, its settings, and models if there are none.

    Args:
        root: The folder of the application.
        module: The module with its `Base`, such as `models` or `app.models`.
        folder: The name of the folder for the migrations.

    Returns:
        The files that were written. A file that exists is not changed, but for the settings at the
        end of `pyproject.toml`.

    Raises:
        ConfigurationError: A name cannot be used, or Alembic is set up here already.
    """
    if not _MODULE.fullmatch(module):
        raise ConfigurationError("the module must be a dotted name, such as app.models")
    if not _MODULE.fullmatch(folder) or folder == "alembic":
        # A folder with the name of the library would hide it.
        raise ConfigurationError("the folder must be a name such as migrations, and not alembic")
    settings = root / "pyproject.toml"
    text = settings.read_text() if settings.exists() else ""
    if "alembic" in tomllib.loads(text).get("tool", {}) or (root / "alembic.ini").exists():
        raise ConfigurationError("Alembic is set up here already: see its settings")
    written = {
        root / folder / "env.py": _ENVIRONMENT.format(module=module),
        root / folder / "script.py.mako": (script_directory() / "script.py.mako").read_text(),
        root / folder / "versions" / ".gitkeep": "",
    }
    source = root / Path(*module.split("."))
    if not source.is_dir() and not source.with_suffix(".py").exists():
        written[source.with_suffix(".py")] = _MODELS
    written = {path: content for path, content in written.items() if not path.exists()}
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    settings.write_text(text + _SETTINGS.format(folder=folder).lstrip("" if text else "\n"))
    return [*written, settings]
