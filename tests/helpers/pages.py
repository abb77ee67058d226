"""The files of the repository, and the blocks of code in its pages."""

import re
import subprocess
from pathlib import Path

from cache import ROOT


def tracked() -> list[str]:
    """Return the names of the files that a clone of this folder has, if all of it is committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return fenced(page.read_text(), language)


def commands(block: str) -> list[str]:
    """Return the lines that are typed, without their prompt and without what is printed."""
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
