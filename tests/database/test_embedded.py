import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Final

import asyncpg
import pytest

from todo_db import ConfigurationError
from todo_db.embedded import DATABASE, LOGIN, OWNER, EmbeddedPostgres
from todo_db.server import Server, _account

needs_root: Final = pytest.mark.skipif(
    os.geteuid() != 0, reason="another user is needed, and only root can become one, as CI is"
)

# Longer than the path of a socket may be.
LONG: Final = "x" * 120


class TestStart:
    async def test_keeps_its_data_and_its_database(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder / "new" / "pg")
        with server:
            connection = await asyncpg.connect(server.url())
            assert await connection.fetchval("SHOW fsync") == "on"
            await connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
            await connection.close()
        with server:
            connection = await asyncpg.connect(server.url())
            assert await connection.fetchval("SELECT answer FROM kept") == 42
            await connection.close()

    @pytest.mark.parametrize("programs", [3, pytest.param(100, marks=pytest.mark.fault)])
    def test_at_once_in_a_fresh_folder_is_one_server(self, folder: Path, programs: int) -> None:
        command = [sys.executable, "-c", _MANY, str(folder / "pg"), str(programs)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        assert done.stdout == f"{[0] * programs}\n"
        log = (folder / "pg" / "log").read_text()
        # One initdb, and no server that met another one.
        assert log.count("Success.") == 1
        assert "already" not in log
        assert left_in(folder / "pg") == []

    async def test_makes_good_what_was_interrupted(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder / "pg")
        with server:
            server.drop_database(DATABASE)
        with server:
            connection = await asyncpg.connect(server.url())
            await connection.close()

    async def test_owner_is_like_neons(self, todo_postgres: EmbeddedPostgres) -> None:
        connection = await asyncpg.connect(todo_postgres.url())
        role = await connection.fetchrow("SELECT * FROM pg_roles WHERE rolname = current_user")
        assert role is not None
        assert (role["rolname"], role["rolsuper"], role["rolbypassrls"]) == (OWNER, False, True)
        assert await connection.fetchval("SELECT current_database()") == DATABASE
        await connection.close()

    async def test_listens_on_no_network(self, todo_postgres: EmbeddedPostgres) -> None:
        connection = await asyncpg.connect(todo_postgres.url())
        assert await connection.fetchval("SHOW listen_addresses") == ""
        await connection.close()

    def test_says_which_extra_is_missing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("todo_db.embedded.find_spec", lambda _name: None)
        with pytest.raises(ConfigurationError, match=r"todo-db\[embedded\]"):
            EmbeddedPostgres(folder)

    @pytest.mark.parametrize(
        "name", ["my projects", "it's", '"quoted"', "$HOME `id`", "überall ✓", LONG]
    )
    async def test_works_in_a_folder_of_any_name(
        self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(folder))
        with EmbeddedPostgres(folder / name) as server:
            assert await answer(server) == 1
        assert left_in(folder / name) == []

    def test_refuses_a_file_in_its_place(self, folder: Path) -> None:
        (folder / "pg").write_text("")
        with pytest.raises(ConfigurationError, match=r"cannot use .*/pg: File exists"):
            EmbeddedPostgres(folder / "pg").start()

    @pytest.mark.parametrize("home", ["/" + LONG, "missing"])
    def test_refuses_a_path_that_is_too_long_where_the_home_is_no_shorter(
        self, folder: Path, home: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", home)
        with pytest.raises(ConfigurationError, match="too long for a socket"):
            EmbeddedPostgres(folder / LONG).start()

    def test_says_what_it_cannot_use(self, folder: Path) -> None:
        (folder / "pg" / "users").mkdir(parents=True)
        with pytest.raises(ConfigurationError, match=r"cannot use .*/pg/users: Is a directory"):
            EmbeddedPostgres(folder / "pg").start()

    def test_waits_for_a_server_that_a_killed_program_began_to_start(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with EmbeddedPostgres(folder / "pg"):
            with saying(folder / "pg", "starting"), monkeypatch.context() as patched:
                patched.setattr("todo_db.server._PATIENCE_SECONDS", 0.1)
                with pytest.raises(ConfigurationError, match="did not start in time: see its log"):
                    EmbeddedPostgres(folder / "pg").start()
            with EmbeddedPostgres(folder / "pg"):
                pass

    def test_waits_for_a_server_that_is_stopping(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with (
            EmbeddedPostgres(folder / "pg"),
            saying(folder / "pg", "stopping"),
            monkeypatch.context() as patched,
        ):
            patched.setattr("todo_db.server._PATIENCE_SECONDS", 0.1)
            with pytest.raises(ConfigurationError, match="does not stop"):
                EmbeddedPostgres(folder / "pg").start()

    def test_C3_server_that_takes_too_long_to_start_stops(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with EmbeddedPostgres(folder / "pg"):
            pass
        monkeypatch.setattr("todo_db.server._PATIENCE_SECONDS", 0)
        with pytest.raises(ConfigurationError, match="did not start in time"):
            EmbeddedPostgres(folder / "pg").start()
        assert stops(folder / "pg")

    def test_C3_server_of_a_program_that_is_killed_while_it_starts_stops(
        self, folder: Path
    ) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", _STARTING, folder / "pg"], stdout=subprocess.PIPE, text=True
        ) as user:
            assert user.stdout is not None
            assert user.stdout.readline() == "started\n"
            user.kill()
        assert stops(folder / "pg")

    def test_refuses_data_of_another_version(self, folder: Path) -> None:
        with EmbeddedPostgres(folder / "pg"):
            pass
        (folder / "pg" / "data" / "PG_VERSION").write_text("15\n")
        with pytest.raises(ConfigurationError, match="another version than PostgreSQL 18"):
            EmbeddedPostgres(folder / "pg").start()

    def test_says_so_when_the_server_does_not_start(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder / "pg")
        with server:
            pass
        configuration = folder / "pg" / "data" / "postgresql.auto.conf"
        configuration.write_text("nonsense = true\n")
        with pytest.raises(ConfigurationError, match="does not start") as caught:
            server.start()
        assert caught.value.__cause__ is None

    def test_says_so_when_it_cannot_create_its_data(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        programs = folder / "bin"
        programs.mkdir()
        (programs / "initdb").write_text("#!/bin/sh\nexit 1\n")
        for each in (folder, programs, programs / "initdb"):
            each.chmod(0o755)
        monkeypatch.setattr("todo_db.embedded._programs", lambda: programs)
        with pytest.raises(ConfigurationError, match="cannot create its data"):
            EmbeddedPostgres(folder / "pg").start()

    async def test_removes_what_an_interrupted_initdb_left(self, folder: Path) -> None:
        (folder / "pg" / "new-one").mkdir(parents=True)
        with EmbeddedPostgres(folder / "pg") as server:
            assert await answer(server) == 1
        assert left_in(folder / "pg") == []

    async def test_C1_process_that_has_the_number_of_an_old_server_is_not_touched(
        self, folder: Path
    ) -> None:
        with EmbeddedPostgres(folder / "pg"):
            pass
        with subprocess.Popen(["sleep", "60"]) as stranger:  # noqa: ASYNC220  # does not wait
            for name in ("data/postmaster.pid", ".s.PGSQL.5432.lock"):
                (folder / "pg" / name).write_text(f"{stranger.pid}\n" * 8)
            with EmbeddedPostgres(folder / "pg") as server:
                assert await answer(server) == 1
            assert stranger.poll() is None
            stranger.kill()

    @needs_root
    async def test_program_it_cannot_reach_is_copied(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("todo_db.server._is_reachable", lambda _folder: False)
        # Nothing can be run in a folder in memory.
        with TemporaryDirectory() as cache:
            monkeypatch.setattr("todo_db.server._CACHE", Path(cache))
            opened(Path(cache))
            for _ in range(2):
                with EmbeddedPostgres(folder / "pg") as server:
                    assert await answer(server) == 1
            assert len(os.listdir(cache)) == 1  # noqa: PTH208  # a count


async def answer(server: EmbeddedPostgres) -> object:
    connection = await asyncpg.connect(server.url())
    try:
        return await connection.fetchval("SELECT 1")
    finally:
        await connection.close()


async def backend_of_psql(server: EmbeddedPostgres) -> int:
    """Run a statement, and return the process that ran it."""
    server._psql("SELECT")
    connection = await asyncpg.connect(server.url(user="postgres"))
    pid: int = await connection.fetchval(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'psql'"
        " ORDER BY backend_start DESC LIMIT 1"
    )
    await connection.close()
    return pid


def left_in(folder: Path) -> list[str]:
    """Return what only a running or an interrupted server has in its folder."""
    names = {path.name for path in (*folder.iterdir(), *(folder / "data").iterdir())}
    return [name for name in names if name.startswith(("new-", "postmaster.pid", ".s.PGSQL"))]


def stops(folder: Path) -> bool:
    """Wait until its keeper has stopped a server; return whether it has."""
    for _ in range(6_000):
        server = Server(folder, folder)
        if not server._lives():
            break
        sleep(0.01)
    return left_in(folder) == []


@contextmanager
def saying(folder: Path, state: str) -> Generator[None]:
    """Have a server say of itself that it is in another state."""
    file = folder / "data" / "postmaster.pid"
    said = file.read_text()
    file.write_text(said.replace("ready", state))
    yield
    file.write_text(said)


def opened(folder: Path) -> None:
    """Let every user of the system into a folder of the test."""
    folder.chmod(0o755)


def as_nobody(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, user="nobody", capture_output=True, text=True)


def stopped_by_a_child(server: EmbeddedPostgres) -> int:
    """Stop the server in a fork; return its exit status."""
    child = os.fork()
    if not child:
        server.stop()
        os._exit(0)
    return os.waitpid(child, 0)[1]


# nobody, who may read root's Python.
AS_NOBODY: Final = (
    *("setpriv", "--reuid=nobody", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
# Uses the server until its standard input is closed.
_USER: Final = """
import sys, pathlib
from todo_db.embedded import EmbeddedPostgres
with EmbeddedPostgres(pathlib.Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


# Says when the process of the server is there, and waits before it looks whether it is ready.
_STARTING: Final = """
import pathlib, sys, time
from todo_db.embedded import EmbeddedPostgres
from todo_db.server import Server
def wait(server):
    print("started", flush=True)
    time.sleep(60)
Server._is_ready = wait
EmbeddedPostgres(pathlib.Path(sys.argv[1])).start()
"""


# Programs that start the server at the same time; prints how each of them ended.
_MANY: Final = """
import os, pathlib, sys
from todo_db.embedded import EmbeddedPostgres
folder, programs = pathlib.Path(sys.argv[1]), int(sys.argv[2])
children = []
for _ in range(programs):
    child = os.fork()
    if not child:
        code = 1
        try:
            with EmbeddedPostgres(folder):
                code = 0
        finally:
            os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@contextmanager
def using(folder: Path) -> Generator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _USER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


class TestStop:
    def test_twice_is_once(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder / "pg")
        server.start()
        server.start()
        server.stop()
        server.stop()
        assert left_in(folder / "pg") == []

    async def test_C2_two_servers_of_one_program_are_one(self, folder: Path) -> None:
        with EmbeddedPostgres(folder / "pg") as first:
            with EmbeddedPostgres(folder / "pg") as second:
                assert second.url() == first.url()
            assert await answer(first) == 1
        assert left_in(folder / "pg") == []

    async def test_leaves_it_to_another_process(self, folder: Path) -> None:
        with EmbeddedPostgres(folder / "pg") as server:
            with using(folder / "pg") as other:
                other.communicate()
            assert await answer(server) == 1
        assert left_in(folder / "pg") == []

    def test_C3_server_of_a_killed_program_stops(self, folder: Path) -> None:
        with using(folder / "pg") as user:
            user.kill()
        assert stops(folder / "pg")

    async def test_C3_program_after_a_killed_one_gets_a_server(self, folder: Path) -> None:
        for _ in range(3):
            with using(folder / "pg") as user:
                user.kill()
            with EmbeddedPostgres(folder / "pg") as server:
                assert await answer(server) == 1
        assert left_in(folder / "pg") == []

    async def test_child_of_a_fork_does_not_stop_it(self, folder: Path) -> None:
        with EmbeddedPostgres(folder / "pg") as server:
            assert stopped_by_a_child(server) == 0
            assert await answer(server) == 1

    def test_before_a_start_does_nothing(self, folder: Path) -> None:
        EmbeddedPostgres(folder / "pg").stop()
        assert not (folder / "pg").exists()

    def test_gives_up_on_a_server_that_does_not_stop(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = EmbeddedPostgres(folder / "pg")
        with server:
            with monkeypatch.context() as patched:
                patched.setattr("todo_db.server._PATIENCE_SECONDS", 0)
                patched.setattr(Server, "_interrupt", lambda _self: None)
                with pytest.raises(ConfigurationError, match="does not stop"):
                    server.stop()
            server.start()
        assert left_in(folder / "pg") == []

    def test_sends_no_signal_to_a_server_that_has_ended(self, folder: Path) -> None:
        server = Server(folder, EmbeddedPostgres.program("psql").parent)
        (folder / "data").mkdir()
        (folder / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n")
        server._interrupt()

    def test_after_a_start_that_failed_half_way(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> str:
            raise ConfigurationError

        server = EmbeddedPostgres(folder / "pg")
        with monkeypatch.context() as patched:
            patched.setattr(EmbeddedPostgres, "_psql", refuse)
            with pytest.raises(ConfigurationError):
                server.start()
        assert left_in(folder / "pg") == []

    def test_after_a_start_that_could_run_no_program(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = EmbeddedPostgres(folder / "pg")
        with server:
            pass
        with monkeypatch.context() as patched:
            patched.setattr("todo_db.server._DETACHED", ("/missing",))
            with pytest.raises(ConfigurationError, match="cannot use /missing: No such file"):
                server.start()
        with server:
            assert server.url()
        assert left_in(folder / "pg") == []


class TestPrivacy:
    @needs_root
    async def test_C3_no_other_system_user_can_connect(self, folder: Path) -> None:
        opened(folder)
        with EmbeddedPostgres(folder / "pg") as server:
            url = server.url(user="postgres")
            refused = as_nobody([server.program("psql"), url, "-c", "SELECT 1"])
            assert refused.returncode == 2
            assert "Permission denied" in refused.stderr
            assert await answer(server) == 1

    def test_opens_no_folder_above_its_own(self, folder: Path) -> None:
        private = folder / "private"
        private.mkdir(mode=0o700)
        with EmbeddedPostgres(private / "pg"):
            pass
        assert [path.stat().st_mode & 0o777 for path in (private, private / "pg")] == [0o700] * 2

    @needs_root
    def test_user_who_is_not_root_has_one(self, folder: Path) -> None:
        shutil.chown(folder, "nobody")
        command = (*AS_NOBODY, sys.executable, "-c", _USER, folder / "pg")
        done = subprocess.run(command, check=False, input="", capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
        assert {path.owner() for path in (folder / "pg").iterdir()} == {"nobody"}

    def test_without_root_it_runs_as_the_user_of_the_program(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("todo_db.server.os.geteuid", lambda: 1_000)
        assert _account() is None

    @needs_root
    def test_says_so_when_its_user_cannot_be_made(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("todo_db.server._USER", "not/a name")
        with pytest.raises(ConfigurationError, match="not/a name cannot be created"):
            EmbeddedPostgres(folder / "pg").start()


class TestPsql:
    """Which runs the statements of a server."""

    async def test_is_kept_for_tests(self, todo_postgres: EmbeddedPostgres) -> None:
        assert await backend_of_psql(todo_postgres) == await backend_of_psql(todo_postgres)

    async def test_is_replaced_when_its_connection_was_terminated(
        self, todo_postgres: EmbeddedPostgres
    ) -> None:
        before = await backend_of_psql(todo_postgres)
        connection = await asyncpg.connect(todo_postgres.url(user="postgres"))
        assert await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", before)
        await connection.close()
        assert await backend_of_psql(todo_postgres) != before

    async def test_is_replaced_when_it_was_killed(self, todo_postgres: EmbeddedPostgres) -> None:
        before = await backend_of_psql(todo_postgres)
        assert todo_postgres._kept is not None
        todo_postgres._kept._process.kill()
        todo_postgres._kept._process.wait()
        assert await backend_of_psql(todo_postgres) != before

    async def test_is_replaced_after_a_statement_that_was_refused(
        self, todo_postgres: EmbeddedPostgres
    ) -> None:
        before = await backend_of_psql(todo_postgres)
        with pytest.raises(ConfigurationError, match="refused a statement: see the file log"):
            todo_postgres.drop_database("missing")
        assert await backend_of_psql(todo_postgres) != before

    async def test_keeps_no_lock_of_the_start(self, folder: Path) -> None:
        with EmbeddedPostgres(folder / "pg", durable=False) as server:
            assert server._kept is not None
            connection = await asyncpg.connect(server.url())
            query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            assert await connection.fetchval(query) == 0
            await connection.close()
        assert left_in(folder / "pg") == []

    def test_of_a_durable_server_is_not_kept(self, folder: Path) -> None:
        with EmbeddedPostgres(folder / "pg") as server:
            assert server._kept is None


class TestUrl:
    async def test_of_a_long_folder_stays_the_same(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(folder))
        with EmbeddedPostgres(folder / LONG) as server:
            url = server.url()
        with using(folder / LONG):
            connection = await asyncpg.connect(url)
            await connection.close()

    def test_needs_a_running_server(self, folder: Path) -> None:
        with pytest.raises(ConfigurationError, match="not running"):
            EmbeddedPostgres(folder).url()


class TestLogin:
    def test_before_the_migrations_is_refused(self, todo_postgres: EmbeddedPostgres) -> None:
        with pytest.raises(ConfigurationError, match="refused a statement: see the file log"):
            todo_postgres.create_login("todo_second", role="todo_missing")

    async def test_is_a_member_of_the_role_and_of_nothing_else(
        self, todo_postgres: EmbeddedPostgres
    ) -> None:
        connection = await asyncpg.connect(todo_postgres.url(user=LOGIN))
        memberships = await connection.fetch(
            "SELECT roleid::regrole::text AS role FROM pg_auth_members "
            "WHERE member = current_user::regrole"
        )
        assert [row["role"] for row in memberships] == ["todo_app"]
        await connection.close()
