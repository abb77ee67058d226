"""The folder `.cache`, into which the tests put programs that they install once."""

import fcntl
import json
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


def npm_installed(folder: Path, packages: dict[str, str]) -> None:
    """Install packages from npm into a folder that this process has locked, unless they are there.

    Args:
        folder: Where `node_modules` will be.
        packages: The exact version of each.
    """
    wanted = json.dumps({"private": True, "type": "module", "dependencies": packages})
    complete = folder / "complete"
    if complete.exists() and complete.read_text() == wanted:
        return
    (folder / "package.json").write_text(wanted)
    options = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
    subprocess.run(["npm", "install", *options], check=True, cwd=folder)
    complete.write_text(wanted)
