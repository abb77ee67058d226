"""The folder `.cache`, into which the tests put programs that they install once."""

import fcntl
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


@contextmanager
def locked(name: str) -> Generator[Path]:
    """Yield a folder of this name, while no other process fills it."""
    folder = ROOT / ".cache" / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


@contextmanager
def packages(name: str, wanted: str) -> Generator[Path]:
    """Yield a locked folder with this package.json, whose packages npm installs on first use."""
    with locked(name) as folder:
        complete = folder / "complete"
        if not complete.exists() or complete.read_text() != wanted:
            (folder / "package.json").write_text(wanted)
            npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
            subprocess.run(npm, check=True, cwd=folder)
            complete.write_text(wanted)
        yield folder
