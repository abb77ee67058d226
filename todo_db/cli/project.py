"""The files with which an application keeps migrations of its own."""

import tomllib
from contextlib import suppress
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from shutil import copymode
from typing import Any, Final

from todo_db.errors import ConfigurationError
from todo_db.migrations import script_directory

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
prepend_sys_path = ["{path}"]
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
        ConfigurationError: A name cannot be used, Alembic is set up here already, or a file cannot
            be read or written.
    """
    parts = module.split(".")
    if not all(part.isidentifier() and not iskeyword(part) for part in parts):
        raise ConfigurationError("the module must be a dotted name, such as app.models")
    if not folder.isidentifier() or folder == "alembic":
        # A folder with the name of the library would hide it.
        raise ConfigurationError("the folder must be a name such as migrations, and not alembic")
    # Where Python finds the module, or would.
    path = "src" if _found(root / "src" / parts[0]) else "."
    settings = root / "pyproject.toml"
    text = _read(settings) if settings.exists() else ""
    added = _SETTINGS.format(folder=folder, path=path).lstrip("" if text else "\n")
    if "alembic" in _parsed(text).get("tool", {}) or (root / "alembic.ini").exists():
        raise ConfigurationError("Alembic is set up here already: see its settings")
    _parsed(text + added)
    written = {
        root / folder / "env.py": _ENVIRONMENT.format(module=module),
        root / folder / "script.py.mako": (script_directory() / "script.py.mako").read_text(
            "utf-8"
        ),
        root / folder / "versions" / ".gitkeep": "",
    }
    source = root.joinpath(path, *parts)
    if not _found(root / path / parts[0]) and find_spec(parts[0]) is not None:
        raise ConfigurationError(f"{parts[0]} is a library's name: choose another module")
    if not _found(source):
        written[source.with_suffix(".py")] = _MODELS
    written = {file: content for file, content in written.items() if not file.is_file()}
    written[settings] = text + added
    for file, text in written.items():
        _write(file, text)
    return [*written]


def _read(file: Path) -> str:
    try:
        # With the ends of its lines as they are.
        return file.read_text("utf-8", newline="")
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except OSError as error:
        reason = str(error.strerror)
    raise ConfigurationError(f"{file} cannot be read: {reason}")


def _write(file: Path, content: str) -> None:
    """Write the whole file or, for example on a full disk, leave it as it was."""
    draft = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(content, "utf-8", newline="")
        if file.exists():
            copymode(file, draft)
        draft.replace(file.resolve())
    except OSError as error:
        reason = error.strerror
    else:
        return
    with suppress(OSError):
        draft.unlink()
    raise ConfigurationError(f"{file} cannot be written: {reason}")


def _found(module: Path) -> bool:
    return module.is_dir() or module.with_suffix(".py").is_file()


def _parsed(settings: str) -> dict[str, Any]:
    try:
        return tomllib.loads(settings)
    except tomllib.TOMLDecodeError:
        raise ConfigurationError("the settings cannot be added to pyproject.toml") from None
