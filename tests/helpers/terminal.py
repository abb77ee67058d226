"""A terminal: it types the lines of a page's console blocks, as a reader does."""

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Final

_SECONDS: Final = 600
# What a line leaves in its shell, and so to the lines after it.
_LASTING: Final = ("export ", "source ")
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A shell in a folder, without a virtual environment or a database in its variables.

    Args:
        folder: The current folder.
        programs: A folder of programs that the shell finds first.
        variables: Further variables of the environment.
    """

    def __init__(self, folder: Path, programs: Path | None = None, **variables: str) -> None:
        self.folder = folder
        self._begin: list[str] = []
        absent = {"DATABASE_URL", "DIRECT_DATABASE_URL", "UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV"}
        self._environment = {
            name: value for name, value in os.environ.items() if name not in absent
        } | variables
        if programs is not None:
            self._environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def write(self, name: str, text: str) -> None:
        """Store a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _shell(self, line: str) -> list[str]:
        return ["bash", "-c", "\n".join(("set -e", *self._begin, line))]

    def type(self, line: str, *, status: int = 0) -> str:
        """Run a line to its end, which must have this exit status; return what it prints."""
        done = subprocess.run(
            self._shell(line),
            check=False,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
        )
        assert done.returncode == status, f"{line}\n{done.stdout}"
        if line.startswith(_LASTING):
            self._begin.append(line)
        return done.stdout

    @contextmanager
    def keep(self, line: str, shown: str) -> Generator[str]:
        """Keep a line running until Ctrl-C; yield what this pattern's group finds."""
        with subprocess.Popen(
            self._shell(line),
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        ) as process:
            late = Timer(_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
            late.start()
            try:
                assert process.stdout is not None
                printed = ""
                while not (found := re.search(shown, printed, re.MULTILINE)):
                    more = process.stdout.readline()
                    assert more, f"{line}\n{printed}"
                    printed += more
                late.cancel()
                yield found[1]
            finally:
                late.cancel()
                # A terminal sends it to every process of the line.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)

    def paste(self, line: str, sources: Sequence[str]) -> str:
        """Paste code into the prompt of Python that a line starts; return what is printed."""
        pid, screen = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            shell = self._shell(line)
            os.execvpe(shell[0], shell, self._environment | {"TERM": "xterm"})  # noqa: S606
        printed = _until(screen, r">>> import asyncio.*>>> ")
        for source in sources:
            # In the form of a terminal's paste. What is typed is printed too, 42 only by Python.
            typed = f"{source}\nprint('pasted', 6 * 7)\n".replace("\n", "\r")
            os.write(screen, f"\x1b[200~{typed}\x1b[201~\r".encode())
            printed += _until(screen, r"pasted 42.*>>> ")
        os.write(screen, b"\x04")
        os.waitpid(pid, 0)
        os.close(screen)
        return printed


def _until(screen: int, shown: str) -> str:
    """Return what a program prints, once this pattern finds something in it."""
    printed, end = "", time.monotonic() + _SECONDS
    while not re.search(shown, printed, re.DOTALL):
        assert time.monotonic() < end, printed
        if select.select([screen], [], [], 1)[0]:
            printed = _CONTROL.sub("", printed + os.read(screen, 1 << 16).decode())
    return printed
