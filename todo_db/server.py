"""The PostgreSQL process of one folder: who uses it, whether it lives, and when it stops.

Three files in the folder are locked by `flock`, which the kernel releases with the process:

- `starting`, exclusive, while a program starts or stops the server;
- `users`, shared, while a program uses the server;
- `server`, exclusive, by the server itself, which inherits the lock from the program that starts
  it. So a free lock says that no process of the server is left, whatever its files say. Who asks
  locks it shared, so that nobody who asks is taken for the server.

A process is never identified by a number alone: after a crash or a restart of a container the
number in `postmaster.pid` may be that of another program.
"""

import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from todo_db.errors import ConfigurationError

_USER: Final = "pgserver"
_CACHE: Final = Path("/var/lib/todo-db")
# The server's own name for its current folder. It has no character that the shell of initdb would
# read, and needs no right on the folders above.
_HERE: Final = Path("/proc/self/cwd")
_LINKS: Final = "~/.cache/todo-db"
_SOCKET: Final = ".s.PGSQL.5432"
# sockaddr_un has 108 bytes, with a NUL at its end.
_LONGEST_FOLDER: Final = 107 - len(f"/{_SOCKET}")
_PATIENCE_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.005
_STATUS_LINE: Final = 7
# Waits until the last user has ended, however it ended, and then stops the server, also one that
# has not written its number yet. Its arguments are postmaster.pid and the descriptors of `server`
# and `users`. While the lock `server` is held by someone, the number in postmaster.pid is the
# server's own.
_KEEPER: Final = """
import fcntl, os, signal, sys, time
for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(each, signal.SIG_IGN)
server, users = int(sys.argv[2]), int(sys.argv[3])
fcntl.flock(users, fcntl.LOCK_EX)
while True:
    try:
        number = int(open(sys.argv[1]).readline())
    except (OSError, ValueError):
        number = None
    try:
        fcntl.flock(server, fcntl.LOCK_SH | fcntl.LOCK_NB)
        break
    except OSError:
        pass
    try:
        if number is not None:
            os.kill(number, signal.SIGINT)
    except OSError:
        pass
    time.sleep(0.1)
"""
# The shell forks and ends, so that the server is a child of init. "$@" is not read again.
_DETACHED: Final = ("/bin/sh", "-c", '"$@" &', "sh")


class Server:
    """One PostgreSQL server, shared by all programs that use its folder.

    It runs as the user of the program; as root, as `pgserver`, which is created. It starts with its
    first user, and stops when no user is left. Only its own user can connect.

    Args:
        folder: Where everything is kept; mode 0700.
        programs: The folder with PostgreSQL's programs.
        options: Settings for the command line of `postgres`.
    """

    def __init__(self, folder: Path, programs: Path, options: Sequence[str] = ()) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._original = programs
        self._options = options
        self._lock: int | None = None
        self._process = 0

    @property
    def is_used(self) -> bool:
        """Whether this program uses the server."""
        # A child of a fork has the descriptor, but the lock is its parent's to release.
        return self._lock is not None and self._process == os.getpid()

    @property
    def programs(self) -> Path:
        """The folder with the programs, where the server's user can reach it."""
        account = _account()
        if account is None or _is_reachable(self._original):
            return self._original
        home = self._original.parent
        # A wheel keeps its libraries in a folder beside the package.
        package = home.parent
        libraries = package.with_name(f"{package.name}.libs")
        stamp = f"{home} {(self._original / 'postgres').stat().st_mtime_ns}"
        copy = _CACHE / blake2b(stamp.encode(), digest_size=8).hexdigest()
        if not copy.exists():
            _CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=_CACHE))
            shutil.copytree(home, draft / package.name / home.name, symlinks=True)
            shutil.copytree(libraries, draft / libraries.name)
            draft.chmod(0o755)
            # Another program may have been faster: a folder that is not empty is not replaced.
            with suppress(OSError):
                draft.rename(copy)
        return copy / package.name / home.name / self._original.name

    def start(self) -> None:
        """Use the server; start it if it does not run, and create its data if there is none.

        Raises:
            ConfigurationError: The folder cannot be used, or the server does not start.
        """
        if self.is_used:
            return
        try:
            self._use()
        except OSError as error:
            failure = ConfigurationError(
                f"the embedded PostgreSQL cannot use {error.filename}: {error.strerror}"
            )
        else:
            return
        raise failure

    def _use(self) -> None:
        self._prepare_folder()
        with self._starting():
            # Waits while the last user, or the keeper, is stopping the server.
            users = self._open("users")
            fcntl.flock(users, fcntl.LOCK_SH)
            try:
                # Somebody else may have told it to stop.
                self._wait_until(
                    lambda: self._state() != "stopping" or not self._lives(), "does not stop"
                )
                if not self._lives():
                    self._begin()
                # Also for one that a killed program began to start.
                self._wait_until(self._is_ready, "did not start in time: see its log")
            except BaseException:
                os.close(users)
                raise
            self._lock, self._process = users, os.getpid()

    def stop(self) -> None:
        """Do not use the server any more, and stop it if nobody else does."""
        if self._lock is None or not self.is_used:
            return
        with self._starting():
            # Making a shared lock exclusive would release it for a moment, too.
            os.close(self._lock)
            self._lock = None
            if self._can_lock("users", fcntl.LOCK_EX):
                self._interrupt()
            if self._can_lock("users", fcntl.LOCK_EX) or not self._can_lock("users", fcntl.LOCK_SH):
                # Nobody uses it, or the keeper was faster and is stopping it.
                self._wait_until(lambda: not self._lives(), "does not stop")

    # Starting

    def _prepare_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        _give(self._folder)
        link = socket_folder(self._folder)
        if not link.is_absolute() or len(os.fsencode(link)) > _LONGEST_FOLDER:
            raise ConfigurationError(
                f"the path of the folder is too long for a socket, and that of {_LINKS} is no"
                " shorter one: use another folder"
            )
        if link != self._folder and not link.is_symlink():
            link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Another program may have been faster.
            with suppress(FileExistsError):
                link.symlink_to(self._folder)

    def _begin(self) -> None:
        """Start the server. The caller holds `starting`, and no process of the server is left."""
        version = self._data / "PG_VERSION"
        if not version.exists():
            self._create_data()
        elif version.read_text().strip() != (found := self._version()):
            raise ConfigurationError(
                f"the folder has data of another version than PostgreSQL {found}: use another one"
            )
        # They name a process by its number, and its process has ended.
        for name in (self._data / "postmaster.pid", self._folder / f"{_SOCKET}.lock"):
            name.unlink(missing_ok=True)
        (self._folder / _SOCKET).unlink(missing_ok=True)
        with self._opened("server") as server, (self._folder / "log").open("ab") as log:
            fcntl.flock(server, fcntl.LOCK_EX)
            # Before the server: this program may be killed at any time.
            self._keep()
            self._run(
                *_DETACHED,
                *(self.programs / "postgres", "-D", _seen_from(self._data), "-k", "..", "-h", ""),
                *("-c", "unix_socket_permissions=0700"),
                *(part for option in self._options for part in ("-c", option)),
                folder=self._data,
                output=log.fileno(),
                descriptors=[server],
            )

    def _create_data(self) -> None:
        # An initdb that was interrupted left a folder of another name.
        for draft in self._folder.glob("new-*"):
            shutil.rmtree(draft, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix="new-", dir=self._folder))
        _give(draft)
        options = (
            "--auth=trust",
            "--encoding=UTF8",
            # Upper and lower case of every script, sorted by code point, without the system.
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--no-sync",
            "--username=postgres",
        )
        with (self._folder / "log").open("ab") as log:
            try:
                self._run(
                    *(self.programs / "initdb", "-D", _seen_from(draft), *options),
                    folder=draft,
                    output=log.fileno(),
                )
            except subprocess.CalledProcessError:
                raise ConfigurationError(
                    "the embedded PostgreSQL cannot create its data: see the file log in its folder"
                ) from None
        draft.rename(self._data)

    def _keep(self) -> None:
        with self._opened("users") as users, self._opened("server") as server:
            arguments = [self._data / "postmaster.pid", server, users]
            subprocess.run(  # noqa: S603  # no user input
                [*_DETACHED, sys.executable, "-S", "-E", "-c", _KEEPER, *map(str, arguments)],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[server, users],
                start_new_session=True,
                cwd="/",
            )

    def _run(
        self,
        *command: str | Path,
        folder: Path,
        output: int,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Run a program as the server's user, in a session of its own."""
        account = _account()
        user: dict[str, Any] = {}
        if account is not None:  # pragma: no branch  # CI is root
            user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        subprocess.run(  # noqa: S603  # no shell reads a name
            command,
            check=True,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=descriptors,
            start_new_session=True,
            **user,
        )

    # State

    def _version(self) -> str:
        told = subprocess.run(  # noqa: S603  # no user input
            [self._original / "postgres", "--version"], check=True, capture_output=True, text=True
        )
        return told.stdout.split()[-1].partition(".")[0]

    def _lives(self) -> bool:
        """Whether a process of the server is left: each has inherited the lock."""
        return not self._can_lock("server", fcntl.LOCK_SH)

    def _is_ready(self) -> bool:
        if not self._lives():
            raise ConfigurationError(
                "the embedded PostgreSQL does not start: see the file log in its folder"
            )
        return self._state() == "ready"

    def _state(self) -> str:
        """Return what the server says of itself, such as `starting`, `ready` or `stopping`."""
        return next(iter(self._status()[_STATUS_LINE:]), "")

    def _status(self) -> list[str]:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []
        return [line.strip() for line in lines]

    def _interrupt(self) -> None:
        """Ask the server to stop, if it lives: then the number is its own."""
        number = next(iter(self._status()), "")
        if self._lives() and number.isdigit():
            os.kill(int(number), signal.SIGINT)

    @staticmethod
    def _wait_until(condition: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise ConfigurationError(f"the embedded PostgreSQL {failure}")
            time.sleep(_POLL_SECONDS)

    # Locks

    def _open(self, name: str) -> int:
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def _opened(self, name: str) -> Generator[int]:
        descriptor = self._open(name)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _can_lock(self, name: str, kind: int) -> bool:
        with self._opened(name) as descriptor:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    @contextmanager
    def _starting(self) -> Generator[None]:
        """Let no other program start or stop the server meanwhile."""
        with self._opened("starting") as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield


def socket_folder(folder: Path) -> Path:
    """Return the folder of the socket: its own, or a link to it that has a short path.

    The link stays, so that a URL with it works as long as the server runs.
    """
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return folder
    # In a folder that nobody else may write to: who can change the link can pose as the server.
    links = os.path.expanduser(_LINKS)  # noqa: PTH111  # it raises no error without a home
    return Path(links, blake2b(os.fsencode(folder), digest_size=8).hexdigest())


def _account() -> pwd.struct_passwd | None:
    """Return the account of the server, for root; PostgreSQL does not run as root."""
    if os.geteuid():
        return None
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _USER]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603  # constants
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and the user {_USER} cannot be created"
        ) from None


def _give(folder: Path) -> None:
    """Give a folder to the account of the server."""
    account = _account()
    if account is not None:  # pragma: no branch  # CI is root
        os.chown(folder, account.pw_uid, account.pw_gid)


def _seen_from(folder: Path) -> Path:
    """Return the name of a folder for a program that runs in it."""
    return _HERE if _HERE.exists() else folder


def _is_reachable(folder: Path) -> bool:
    """Whether every user may run the programs of a folder."""
    everyone = stat.S_IROTH | stat.S_IXOTH
    return all(each.stat().st_mode & everyone == everyone for each in (folder, *folder.parents))
