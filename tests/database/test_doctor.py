"""Creates each weakness in a sound database; the doctor must report it, and nothing else."""

import asyncio
import re
import ssl
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, Final

import own_tables
import pytest
import pytest_asyncio
from cluster import OTHER_VERSIONS, OWNER, Cluster
from credentials import add_key
from driver import Connection
from pgbouncer import PASSWORD, TRIXIE, PgBouncer

from todo_db import doctor
from todo_db.doctor import FURTHER, RULES, Report, examine
from todo_db.embedded import LOGIN, EmbeddedPostgres
from todo_db.engine import Pool
from todo_db.errors import ConfigurationError, SchemaError, TodoDBError, UnavailableError
from todo_db.migrations import downgrade, upgrade
from todo_db.models import REVISION
from todo_db.settings import Settings

type Found = set[tuple[str, str]]

TEMPLATE = "todo_template"
OWN_TEMPLATE = "todo_template_own"
DATABASE = "todo_planted"
MARKER = "hunter2"
NEON = f"postgresql://alice:{MARKER}@ep-cool-1234-pooler.eu-central-1.aws.neon.tech/todo"

# For the arguments of the rules.
TYPED = "WHERE $1::text[] IS NOT NULL AND $2::text IS NOT NULL"

# Findings of every test server: it runs with fsync off, and is sound otherwise.
SOUND: Found = {("durability-weakened", "fsync")}

MINE = "user_id = nullif((SELECT current_setting('todo_db.user_id', true)), '')"
NOTES = f"""
    CREATE TABLE notes (user_id text NOT NULL REFERENCES users ON DELETE CASCADE);
    ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY own ON notes TO todo_app USING ({MINE});
    CREATE POLICY fence ON notes AS RESTRICTIVE TO todo_app USING ({MINE});
    GRANT SELECT, INSERT ON notes TO todo_app;
"""
INDEX = (
    "public.tasks: index CREATE UNIQUE INDEX idx_tasks_user_id ON public.tasks"
    " USING btree (user_id, id)"
)
UNKEYED = "ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id_users"
KEYED = f"""{UNKEYED}, ADD CONSTRAINT fk_tasks_user_id_users
    FOREIGN KEY (user_id) REFERENCES users"""


@dataclass(frozen=True)
class Weakness:
    """A weakness that the owner of the tables creates, and the doctor's finding.

    Attributes:
        undo: For a change outside the database; then a superuser makes and undoes the change.
        login: The login that runs the doctor.
    """

    code: str
    subject: str
    sql: str
    undo: str = ""
    login: str = LOGIN


PLANTS = (
    # A2 A3 A4: roles
    Weakness(
        "role-bypasses",
        "todo_app",
        "ALTER ROLE todo_app BYPASSRLS",
        "ALTER ROLE todo_app NOBYPASSRLS",
    ),
    Weakness(
        "role-bypasses",
        "todo_app",
        "ALTER ROLE todo_app SUPERUSER",
        "ALTER ROLE todo_app NOSUPERUSER",
    ),
    Weakness(
        "role-member",
        "boss",
        "CREATE ROLE boss BYPASSRLS; GRANT boss TO todo_app",
        "DROP ROLE boss",
    ),
    Weakness(
        "role-bypasses",
        "todo_app",
        "ALTER ROLE todo_app REPLICATION",
        "ALTER ROLE todo_app NOREPLICATION",
    ),
    Weakness("role-member", "boss", "CREATE ROLE boss; GRANT boss TO todo_app", "DROP ROLE boss"),
    Weakness(
        "role-owns",
        "public.tasks",
        "ALTER TABLE tasks OWNER TO todo_app",
        f"ALTER TABLE tasks OWNER TO {OWNER}",
    ),
    Weakness(
        "login-bypasses", LOGIN, f"ALTER ROLE {LOGIN} BYPASSRLS", f"ALTER ROLE {LOGIN} NOBYPASSRLS"
    ),
    Weakness(
        "login-bypasses",
        LOGIN,
        f"ALTER ROLE {LOGIN} REPLICATION",
        f"ALTER ROLE {LOGIN} NOREPLICATION",
    ),
    Weakness("login-bypasses", LOGIN, f"GRANT {OWNER} TO {LOGIN}", f"REVOKE {OWNER} FROM {LOGIN}"),
    *(
        Weakness("login-bypasses", LOGIN, f"{sql} TO {LOGIN}", f"{undo}; DROP ROLE boss")
        for sql, undo in (
            ("CREATE ROLE boss BYPASSRLS; GRANT boss", f"REVOKE boss FROM {LOGIN}"),
            ("CREATE ROLE boss SUPERUSER; GRANT boss", f"REVOKE boss FROM {LOGIN}"),
            ("CREATE ROLE boss REPLICATION; GRANT boss", f"REVOKE boss FROM {LOGIN}"),
            (
                "CREATE ROLE boss; CREATE TABLE his (); ALTER TABLE his OWNER TO boss; GRANT boss",
                "DROP TABLE his",
            ),
        )
    ),
    Weakness(
        "login-bypasses",
        LOGIN,
        f"ALTER ROLE {LOGIN} BYPASSRLS; GRANT pg_monitor TO {LOGIN}",
        f"ALTER ROLE {LOGIN} NOBYPASSRLS; REVOKE pg_monitor FROM {LOGIN}",
    ),
    Weakness(
        "login-bypasses",
        "erin",
        """CREATE ROLE erin SUPERUSER LOGIN IN ROLE todo_app, pg_monitor;
        GRANT SET ON PARAMETER log_statement TO todo_auth""",
        "REVOKE ALL ON PARAMETER log_statement FROM todo_auth; DROP ROLE erin",
        login="erin",
    ),
    Weakness(
        "login-not-member", LOGIN, f"REVOKE todo_app FROM {LOGIN}", f"GRANT todo_app TO {LOGIN}"
    ),
    Weakness(
        "login-member",
        "pg_execute_server_program",
        f"GRANT pg_execute_server_program TO {LOGIN}",
        f"REVOKE pg_execute_server_program FROM {LOGIN}",
    ),
    Weakness(
        "login-member",
        "todo_auth",
        f"GRANT todo_auth TO {LOGIN} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE",
        f"REVOKE todo_auth FROM {LOGIN}",
    ),
    Weakness("login-auth", LOGIN, f"GRANT todo_auth TO {LOGIN}", f"REVOKE todo_auth FROM {LOGIN}"),
    Weakness(
        "login-auth",
        "erin",
        """CREATE ROLE erin LOGIN NOINHERIT;
        GRANT todo_app, todo_auth TO erin""",
        "DROP ROLE erin",
        login="erin",
    ),
    Weakness(
        "login-auth",
        "erin",
        """CREATE ROLE erin LOGIN IN ROLE todo_app;
        GRANT todo_auth TO erin WITH INHERIT TRUE, SET FALSE""",
        "DROP ROLE erin",
        login="erin",
    ),
    Weakness(
        "login-granted",
        "function pg_read_file(text)",
        f"GRANT EXECUTE ON FUNCTION pg_read_file(text) TO {LOGIN}",
        f"REVOKE EXECUTE ON FUNCTION pg_read_file(text) FROM {LOGIN}",
    ),
    Weakness(
        "catalogue-missing",
        "todo_app: role NOSUPERUSER NOBYPASSRLS NOLOGIN NOCREATEROLE NOCREATEDB NOREPLICATION",
        "ALTER ROLE todo_app LOGIN",
        "ALTER ROLE todo_app NOLOGIN",
        login="todo_app",
    ),
    Weakness(
        "login-granted",
        "schema his",
        f"CREATE SCHEMA his AUTHORIZATION {LOGIN}",
        "DROP SCHEMA his",
    ),
    *(
        Weakness("login-granted", subject, f"GRANT {right} TO {LOGIN}")
        for subject, right in (
            ("table public.tasks", "ALL ON tasks"),
            ("column id of table public.jwks", "SELECT (id) ON jwks"),
            ("sequence public.tasks_id_seq", "USAGE ON SEQUENCE tasks_id_seq"),
            ("schema public", "CREATE ON SCHEMA public"),
            (f"database {DATABASE}", f"ALL ON DATABASE {DATABASE}"),
        )
    ),
    Weakness(
        "owner-blind",
        "public.users",
        "CREATE ROLE carol; ALTER TABLE users OWNER TO carol",
        "ALTER TABLE users OWNER TO postgres; DROP ROLE carol",
    ),
    # A1 A9: row-level security
    Weakness("rls-disabled", "public.tasks", "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY"),
    Weakness("rls-not-forced", "public.users", "ALTER TABLE users NO FORCE ROW LEVEL SECURITY"),
    # B1 B2 B3 B4: policies
    Weakness("policy-missing", "public.tasks", "DROP POLICY tasks_own ON tasks"),
    Weakness(
        "policy-missing",
        "public.tasks",
        "DROP POLICY tasks_own ON tasks; CREATE POLICY other ON tasks TO todo_auth USING (true)",
    ),
    Weakness("policy-fence-missing", "public.users", "DROP POLICY users_fence ON users"),
    Weakness(
        "policy-fence-missing",
        "public.idempotency_keys",
        "DROP POLICY idempotency_keys_fence ON idempotency_keys",
    ),
    Weakness(
        "policy-open",
        "extra on public.tasks",
        "CREATE POLICY extra ON tasks TO todo_app USING (true)",
    ),
    Weakness(
        "policy-open",
        "extra on public.tasks",
        "CREATE POLICY extra ON tasks FOR SELECT TO todo_app USING (1 = 1)",
    ),
    Weakness(
        "policy-open",
        "tasks_own on public.tasks",
        "ALTER POLICY tasks_own ON tasks WITH CHECK (true)",
    ),
    Weakness(
        "policy-public", "tasks_own on public.tasks", "ALTER POLICY tasks_own ON tasks TO PUBLIC"
    ),
    Weakness(
        "policy-open",
        "tasks_own on public.tasks",
        f"ALTER POLICY tasks_own ON tasks USING ({MINE} OR current_setting('x', true) IS NULL)",
    ),
    Weakness(
        "policy-open",
        "tasks_own on public.tasks",
        """ALTER POLICY tasks_own ON tasks USING
        (user_id = (SELECT current_setting('todo_db.user_id', true)))""",
    ),
    Weakness(
        "policy-open",
        "idempotency_keys_own on public.idempotency_keys",
        "ALTER POLICY idempotency_keys_own ON idempotency_keys USING (user_id = 'x')",
    ),
    # C1 C2 C3: objects that change whose rights apply
    Weakness(
        "function-definer",
        "public.everything()",
        """CREATE FUNCTION everything() RETURNS bigint LANGUAGE sql SECURITY DEFINER
        RETURN (SELECT count(*) FROM tasks)""",
    ),
    Weakness(
        "function-definer",
        "public.find_credential(text)",
        """CREATE FUNCTION find_credential(text) RETURNS bigint LANGUAGE sql SECURITY DEFINER
        RETURN (SELECT count(*) FROM sessions)""",
    ),
    Weakness(
        "function-definer",
        "other.find_credential(text,text)",
        """CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO todo_app;
        CREATE FUNCTION other.find_credential(text, text) RETURNS bigint
        LANGUAGE sql SECURITY DEFINER RETURN (SELECT count(*) FROM accounts)""",
    ),
    Weakness(
        "view-owner-rights",
        "public.everything",
        "CREATE VIEW everything AS SELECT * FROM tasks; GRANT SELECT ON everything TO todo_app",
    ),
    Weakness(
        "view-materialized",
        "public.everything",
        """CREATE MATERIALIZED VIEW everything AS SELECT * FROM tasks;
        GRANT SELECT (title) ON everything TO todo_app""",
    ),
    # A7 A8 D2: grants
    *(
        Weakness(
            "grant-column",
            f"{way} ({column}) on public.{table}",
            f"GRANT {way} ({column}) ON {table} TO todo_app",
        )
        for way, table, column in (
            ("INSERT", "tasks", "id"),
            ("UPDATE", "tasks", "user_id"),
            ("UPDATE", "users", "id"),
            ("UPDATE", "idempotency_keys", "key"),
        )
    ),
    *(
        Weakness(
            "catalogue-extra",
            f"public.{table}: grant {way} ({column}) to todo_app",
            f"GRANT {way} ({column}) ON {table} TO todo_app",
        )
        for way, table, column in (
            ("INSERT", "users", "created_at"),
            ("UPDATE", "tasks", "updated_at"),
            ("UPDATE", "users", "email_verified"),
            ("INSERT", "idempotency_keys", "created_at"),
            ("UPDATE", "idempotency_keys", "fingerprint"),
        )
    ),
    Weakness("grant-option", "public.tasks", "GRANT SELECT ON tasks TO todo_app WITH GRANT OPTION"),
    Weakness("grant-public", "public.tasks", "GRANT SELECT (title) ON tasks TO PUBLIC"),
    Weakness(
        "grant-parameter",
        "session_replication_role",
        "GRANT SET ON PARAMETER session_replication_role TO todo_app",
        "REVOKE ALL ON PARAMETER session_replication_role FROM todo_app",
    ),
    Weakness(
        "grant-parameter",
        "log_statement",
        f"GRANT ALTER SYSTEM ON PARAMETER log_statement TO {LOGIN}",
        f"REVOKE ALL ON PARAMETER log_statement FROM {LOGIN}",
    ),
    *(
        Weakness("grant-system", subject, f"GRANT {right} TO {whom}", f"REVOKE {right} FROM {whom}")
        for subject, right, whom in (
            ("pg_authid", "SELECT ON pg_authid", "todo_app"),
            ("rolpassword on pg_authid", "SELECT (rolpassword) ON pg_authid", "PUBLIC"),
            ("pg_read_file(text)", "EXECUTE ON FUNCTION pg_read_file(text)", "todo_app"),
            ("pg_read_file(text)", "EXECUTE ON FUNCTION pg_read_file(text)", "PUBLIC"),
        )
    ),
    *(
        Weakness("grant-auth", f"public.{table}", f"GRANT {right} ON {table} TO {whom}")
        for table, right, whom in (
            ("sessions", "SELECT", "todo_app"),
            ("sessions", "SELECT (token)", "PUBLIC"),
            ("accounts", "INSERT (password)", "todo_app"),
            ("verifications", "DELETE", "todo_app"),
            ("jwks", "TRUNCATE", "todo_app"),
            ("jwks", "TRIGGER", "todo_app"),
            ("jwks", "REFERENCES (id)", "todo_app"),
        )
    ),
    *(
        Weakness("grant-table", "public.tasks", f"GRANT {way} ON tasks TO todo_app")
        for way in ("TRUNCATE", "TRIGGER", "REFERENCES", "REFERENCES (id)")
    ),
    Weakness(
        "grant-sequence",
        "public.tasks_id_seq",
        "GRANT SELECT ON SEQUENCE tasks_id_seq TO todo_app",
    ),
    *(
        Weakness("grant-large-objects", DATABASE, f"SELECT lo_from_bytea(4711, ''); {sql}", undo)
        for sql, undo in (
            ("GRANT SELECT ON LARGE OBJECT 4711 TO todo_app", ""),
            ("GRANT SELECT ON LARGE OBJECT 4711 TO PUBLIC", ""),
            ("ALTER LARGE OBJECT 4711 OWNER TO todo_app", "SELECT lo_unlink(4711)"),
            (
                f"ALTER DATABASE {DATABASE} SET lo_compat_privileges = on",
                f"ALTER DATABASE {DATABASE} RESET lo_compat_privileges",
            ),
        )
    ),
    *(
        Weakness(
            "grant-version", "public.todo_db_version", f"GRANT {right} ON todo_db_version TO PUBLIC"
        )
        for right in ("DELETE", "UPDATE", "INSERT (version_num)")
    ),
    Weakness("grant-temporary", DATABASE, f"GRANT TEMPORARY ON DATABASE {DATABASE} TO PUBLIC"),
    Weakness(
        "grant-create", f"DATABASE {DATABASE}", f"GRANT CREATE ON DATABASE {DATABASE} TO todo_app"
    ),
    Weakness("grant-create", "SCHEMA public", "GRANT CREATE ON SCHEMA public TO PUBLIC"),
    Weakness("grant-default", OWNER, "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO todo_app"),
    # Guarantees of the tables
    Weakness(
        "catalogue-missing",
        "public.tasks: column id bigint NOT NULL GENERATED ALWAYS AS IDENTITY",
        "ALTER TABLE tasks ALTER id SET GENERATED BY DEFAULT",
    ),
    *(
        Weakness(
            "catalogue-missing",
            "public.tasks_id_seq: values bigint START 1 INCREMENT 1 MIN 1 MAX 9223372036854775807"
            " CACHE 1 NO CYCLE",
            f"ALTER SEQUENCE tasks_id_seq {how}",
        )
        for how in ("CYCLE", "CACHE 50", "INCREMENT -1 START -1 MINVALUE -9 MAXVALUE 1")
    ),
    *(
        Weakness(
            "column-required",
            f"priority on public.{table}",
            f"ALTER TABLE {table} ADD priority int NOT NULL",
        )
        for table in ("tasks", "idempotency_keys")
    ),
    Weakness(
        "column-required",
        "priority on public.users",
        """ALTER TABLE users ADD priority int NOT NULL;
        GRANT INSERT (priority) ON users TO todo_app""",
    ),
    Weakness(
        "unique-crossing", "extra on public.tasks", "CREATE UNIQUE INDEX extra ON tasks (title)"
    ),
    Weakness(
        "unique-crossing",
        "one_of_each on public.tasks",
        "ALTER TABLE tasks ADD CONSTRAINT one_of_each UNIQUE (title)",
    ),
    Weakness(
        "credential-owner",
        "public.find_credential(text,text)",
        "ALTER FUNCTION find_credential(text, text) OWNER TO postgres",
        f"ALTER FUNCTION find_credential(text, text) OWNER TO {OWNER}",
    ),
    Weakness(
        "credential-owner",
        "public.find_credential(text,text)",
        "CREATE ROLE carol; ALTER FUNCTION find_credential(text, text) OWNER TO carol",
        f"ALTER FUNCTION find_credential(text, text) OWNER TO {OWNER}; DROP ROLE carol",
    ),
    *(
        Weakness(
            "credential-owner",
            "public.find_credential(text,text)",
            f"ALTER TABLE {table} OWNER TO postgres",
            f"ALTER TABLE {table} OWNER TO {OWNER}",
        )
        for table in ("sessions", "jwks")
    ),
    *(
        Weakness(
            "rule-rewrites",
            f"gone on public.{table}",
            f"CREATE RULE gone AS ON DELETE TO {table} DO INSTEAD NOTHING",
        )
        for table in ("tasks", "sessions")
    ),
    Weakness("trigger-missing", "public.users", "DROP TRIGGER update_users_updated_at ON users"),
    Weakness("trigger-disabled", "public.tasks", "ALTER TABLE tasks DISABLE TRIGGER USER"),
    Weakness(
        "trigger-disabled",
        "public.sessions",
        "ALTER TABLE sessions DISABLE TRIGGER ALL",
        "ALTER TABLE sessions ENABLE TRIGGER ALL",
    ),
    Weakness(
        "row-security-off",
        "row_security",
        f"ALTER DATABASE {DATABASE} SET row_security = off",
        f"ALTER DATABASE {DATABASE} RESET row_security",
    ),
    Weakness(
        "trigger-silenced",
        "session_replication_role",
        f"ALTER DATABASE {DATABASE} SET session_replication_role = replica",
        f"ALTER DATABASE {DATABASE} RESET session_replication_role",
    ),
    Weakness(
        "trigger-disabled",
        "public.tasks",
        "ALTER TABLE tasks ENABLE REPLICA TRIGGER update_tasks_updated_at",
    ),
    Weakness("foreign-key-missing", "public.tasks", UNKEYED),
    Weakness("foreign-key-weak", "fk_tasks_user_id_users on public.tasks", KEYED),
    Weakness(
        "foreign-key-weak",
        "fk_tasks_user_id_users on public.tasks",
        f"{KEYED} ON DELETE CASCADE NOT VALID",
    ),
    # Settings and state
    Weakness(
        "durability-weakened",
        "synchronous_commit",
        f"ALTER DATABASE {DATABASE} SET synchronous_commit = off",
    ),
    Weakness(
        "user-preset",
        f"DATABASE {DATABASE}",
        f"ALTER DATABASE {DATABASE} SET todo_db.user_id = '{MARKER}'",
        f"ALTER DATABASE {DATABASE} RESET todo_db.user_id",
    ),
    Weakness(
        "user-preset",
        f"ROLE {LOGIN}",
        f"ALTER ROLE {LOGIN} SET todo_db.user_id = '{MARKER}'",
        f"ALTER ROLE {LOGIN} RESET todo_db.user_id",
    ),
    # Everything else that the migrations created
    Weakness("catalogue-missing", INDEX, "DROP INDEX idx_tasks_user_id"),
    Weakness(
        "catalogue-missing",
        "public.sessions: table ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE sessions DISABLE ROW LEVEL SECURITY",
    ),
    Weakness(
        "catalogue-missing",
        "public.find_credential(text,text): grant EXECUTE to todo_app",
        "REVOKE EXECUTE ON FUNCTION find_credential(text, text) FROM todo_app",
    ),
    Weakness(
        "catalogue-missing",
        "public.accounts: permissive policy accounts_auth ALL TO todo_auth USING true"
        " WITH CHECK true",
        "DROP POLICY accounts_auth ON accounts",
    ),
    Weakness(
        "catalogue-extra",
        "public.find_credential(text,text): grant EXECUTE to PUBLIC",
        "GRANT EXECUTE ON FUNCTION find_credential(text, text) TO PUBLIC",
    ),
    Weakness(
        "catalogue-extra",
        "public.tasks: grant SELECT to todo_auth",
        "GRANT SELECT ON tasks TO todo_auth",
    ),
    Weakness(
        "catalogue-extra",
        "todo_auth: member of pg_monitor",
        "GRANT pg_monitor TO todo_auth",
        "REVOKE pg_monitor FROM todo_auth",
    ),
    Weakness("migrations-missing", "todo_db_version", "DROP TABLE todo_db_version"),
    Weakness(
        "migrations-unreadable",
        "public.todo_db_version",
        "REVOKE SELECT ON todo_db_version FROM todo_app",
    ),
    Weakness(
        "migrations-unreadable",
        "public.todo_db_version",
        "REVOKE USAGE ON SCHEMA public FROM PUBLIC, todo_app",
    ),
    Weakness("migrations-behind", "public.todo_db_version", "DELETE FROM todo_db_version"),
    Weakness(
        "migrations-behind",
        "public.todo_db_version",
        "UPDATE todo_db_version SET version_num = '0001'",
    ),
)
# Mistakes with the tables of an application.
MISTAKES = (
    Weakness("rls-disabled", "public.labels", "ALTER TABLE labels DISABLE ROW LEVEL SECURITY"),
    Weakness("rls-not-forced", "public.labels", "ALTER TABLE labels NO FORCE ROW LEVEL SECURITY"),
    Weakness(
        "rls-not-forced",
        "public.labels",
        """CREATE ROLE carol; ALTER TABLE labels OWNER TO carol;
        ALTER TABLE labels NO FORCE ROW LEVEL SECURITY""",
        f"ALTER TABLE labels OWNER TO {OWNER}; DROP ROLE carol",
    ),
    Weakness(
        "rls-not-forced", 'app."Notes"', 'ALTER TABLE app."Notes" NO FORCE ROW LEVEL SECURITY'
    ),
    Weakness(
        "rls-not-forced", "public.currencies", "ALTER TABLE currencies NO FORCE ROW LEVEL SECURITY"
    ),
    Weakness(
        "rls-disabled",
        "public.rates",
        """CREATE TABLE rates (user_id text NOT NULL REFERENCES users ON DELETE CASCADE);
        GRANT DELETE ON rates TO todo_app""",
    ),
    Weakness(
        "rls-disabled",
        "public.rates",
        """CREATE TABLE rates (user_id text NOT NULL REFERENCES users ON DELETE CASCADE)
            PARTITION BY HASH (user_id);
        GRANT SELECT ON rates TO todo_app""",
    ),
    Weakness("owner-column", "public.labels", "ALTER TABLE labels ALTER user_id DROP NOT NULL"),
    Weakness(
        "owner-column",
        "public.rates",
        """CREATE TABLE rates (code text);
        ALTER TABLE rates ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY own ON rates TO todo_app USING (code <> '');
        GRANT SELECT ON rates TO todo_app""",
    ),
    Weakness(
        "owner-column",
        "public.rates",
        f"""CREATE COLLATION loose (locale = 'C');
        UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'loose';
        CREATE TABLE rates (user_id text COLLATE loose NOT NULL);
        ALTER TABLE rates ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY own ON rates TO todo_app USING ({MINE});
        CREATE POLICY fence ON rates AS RESTRICTIVE TO todo_app USING ({MINE});
        ALTER TABLE rates OWNER TO todo_owner; GRANT SELECT ON rates TO todo_app""",
        "DROP TABLE rates",
    ),
    Weakness(
        "rls-disabled",
        "public.labels",
        "ALTER TABLE labels DISABLE ROW LEVEL SECURITY; DROP POLICY fence ON labels",
    ),
    Weakness(
        "rls-disabled",
        "public.rates",
        """CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;
        CREATE FOREIGN TABLE rates (user_id text NOT NULL) SERVER s;
        GRANT SELECT ON rates TO todo_app""",
        "DROP FOREIGN DATA WRAPPER w CASCADE",
    ),
    # What names nobody has no rules about its keys.
    Weakness(
        "owner-column",
        "public.labels",
        """ALTER TABLE labels ALTER user_id DROP NOT NULL; CREATE UNIQUE INDEX ON labels (name);
        ALTER TABLE labels ADD task_id bigint REFERENCES tasks;
        GRANT INSERT (task_id) ON labels TO todo_app""",
    ),
    Weakness("policy-missing", "public.labels", "DROP POLICY own ON labels"),
    Weakness(
        "policy-missing",
        "public.labels",
        """DROP POLICY own ON labels; DROP POLICY fence ON labels;
        CREATE POLICY other ON labels TO todo_auth USING (true)""",
    ),
    Weakness(
        "policy-missing",
        "public.labels",
        "DROP POLICY own ON labels; DROP POLICY fence ON labels",
    ),
    # Policies that open the table, were it not for the fence
    *(
        Weakness(
            "policy-open", "own on public.labels", f"ALTER POLICY own ON labels USING ({rule})"
        )
        for rule in (
            "true",
            "user_id IS NOT NULL",
            "name = nullif((SELECT current_setting('todo_db.user_id', true)), '')",
            f"{MINE} OR name = ''",
            f"({MINE} AND name = '') OR true",
            f"({MINE}) IS NOT FALSE",
        )
    ),
    Weakness("policy-open", "own on public.labels", "ALTER POLICY own ON labels WITH CHECK (true)"),
    Weakness(
        "policy-open",
        "more on public.labels",
        "CREATE POLICY more ON labels FOR INSERT TO todo_app WITH CHECK (name <> '')",
    ),
    Weakness("policy-public", "own on public.labels", "ALTER POLICY own ON labels TO PUBLIC"),
    # Fences that are none
    Weakness("policy-fence-missing", "public.labels", "DROP POLICY fence ON labels"),
    *(
        Weakness(
            "policy-fence-missing",
            "public.labels",
            f"DROP POLICY fence ON labels; CREATE POLICY fence ON labels {fence}",
        )
        for fence in (
            f"AS RESTRICTIVE FOR INSERT TO todo_app WITH CHECK ({MINE})",
            f"AS RESTRICTIVE FOR SELECT TO todo_app USING ({MINE})",
            f"AS RESTRICTIVE TO todo_app USING ({MINE}) WITH CHECK (true)",
            "AS RESTRICTIVE TO todo_app USING (user_id IS NOT NULL)",
            "AS RESTRICTIVE TO todo_app USING (name <> '')",
            f"AS RESTRICTIVE TO todo_auth USING ({MINE})",
            f"TO todo_app USING ({MINE})",
            """AS RESTRICTIVE TO todo_app
            USING (user_id = (SELECT current_setting('todo_db.user_id', true)))""",
        )
    ),
    *(
        Weakness(
            "policy-helper",
            "more on public.labels",
            f"""CREATE FUNCTION me() RETURNS text LANGUAGE sql {volatility}
                RETURN current_setting('todo_db.user_id', true);
            CREATE POLICY more ON labels AS RESTRICTIVE TO todo_app USING (user_id = me())""",
        )
        for volatility in ("IMMUTABLE", "STABLE", "VOLATILE")
    ),
    Weakness(
        "policy-helper",
        "more on public.labels",
        """CREATE FUNCTION same(text, text) RETURNS boolean LANGUAGE sql RETURN $1 = $2;
        CREATE OPERATOR === (FUNCTION = same, LEFTARG = text, RIGHTARG = text);
        CREATE POLICY more ON labels AS RESTRICTIVE TO todo_app USING (name === user_id)""",
    ),
    # Foreign keys
    Weakness(
        "foreign-key-crossing",
        "crossing on public.labels",
        """ALTER TABLE labels ADD task_id bigint CONSTRAINT crossing REFERENCES tasks;
        GRANT INSERT (task_id) ON labels TO todo_app""",
    ),
    Weakness(
        "foreign-key-crossing",
        "crossing on public.labels",
        """ALTER TABLE labels ADD friend text CONSTRAINT crossing REFERENCES users;
        GRANT UPDATE (friend) ON labels TO todo_app""",
    ),
    Weakness(
        "foreign-key-crossing",
        "crossing on public.tasks",
        "ALTER TABLE tasks ADD CONSTRAINT crossing FOREIGN KEY (project) REFERENCES labels",
    ),
    Weakness(
        "foreign-key-crossing",
        "crossing on public.labels",
        """ALTER TABLE labels ADD event int CONSTRAINT crossing REFERENCES audit;
        GRANT INSERT (event) ON labels TO todo_app""",
    ),
    Weakness(
        "foreign-key-weak",
        "labels_user_id_fkey on public.labels",
        """ALTER TABLE labels DROP CONSTRAINT fk_labels_user_id_users,
        ADD FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE NOT VALID""",
    ),
    Weakness(
        "foreign-key-weak",
        "labels_user_id_fkey on public.labels",
        """ALTER TABLE labels DROP CONSTRAINT fk_labels_user_id_users,
        ADD FOREIGN KEY (user_id) REFERENCES users""",
    ),
    # Once, and not again for each partition.
    Weakness(
        "foreign-key-crossing",
        "crossing on public.labels",
        """CREATE TABLE events (id int PRIMARY KEY) PARTITION BY HASH (id);
        CREATE TABLE events_0 PARTITION OF events FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        ALTER TABLE labels ADD event int CONSTRAINT crossing REFERENCES events;
        GRANT INSERT (event) ON labels TO todo_app""",
    ),
    *(
        Weakness(
            "foreign-key-weak",
            "taking on public.labels",
            f"""ALTER TABLE labels ADD CONSTRAINT taking FOREIGN KEY (user_id, parent_id)
            REFERENCES labels (user_id, id) ON DELETE SET {what}""",
        )
        for what in ("NULL", "DEFAULT")
    ),
    Weakness(
        "foreign-key-missing",
        "public.labels",
        "ALTER TABLE labels DROP CONSTRAINT fk_labels_user_id_users",
    ),
    *(
        Weakness(
            "foreign-key-missing",
            "public.notes",
            f"""{NOTES} ALTER TABLE notes DROP CONSTRAINT notes_user_id_fkey;
            ALTER TABLE notes ADD label_id bigint, ADD friend text, {key};
            REVOKE INSERT ON notes FROM todo_app""",
        )
        for key in (
            "ADD FOREIGN KEY (user_id, label_id) REFERENCES labels (user_id, id) ON DELETE CASCADE",
            """ALTER label_id SET NOT NULL,
            ADD FOREIGN KEY (user_id, label_id) REFERENCES labels (user_id, id)""",
            "ADD FOREIGN KEY (friend) REFERENCES users ON DELETE CASCADE",
        )
    ),
    # Unique keys
    *(
        Weakness("unique-crossing", "crossing on public.labels", sql)
        for sql in (
            "ALTER TABLE labels ADD CONSTRAINT crossing UNIQUE (name)",
            "CREATE UNIQUE INDEX crossing ON labels (name)",
            """ALTER TABLE labels ADD code text CONSTRAINT crossing UNIQUE;
            GRANT UPDATE (code) ON labels TO todo_app""",
            "CREATE UNIQUE INDEX crossing ON labels (name) INCLUDE (user_id)",
            "CREATE UNIQUE INDEX crossing ON labels (lower(name))",
            "CREATE UNIQUE INDEX crossing ON labels (name) WHERE name <> ''",
            "ALTER TABLE labels ADD CONSTRAINT crossing EXCLUDE (name WITH =)",
            "ALTER TABLE labels ADD CONSTRAINT crossing EXCLUDE (name WITH =) WHERE (name <> '')",
        )
    ),
    # Grants
    *(
        Weakness(
            "grant-column", f"{right} on public.labels", f"GRANT {right} ON labels TO todo_app"
        )
        for right in ("UPDATE (user_id)", "UPDATE (id)", "INSERT (id)", "INSERT (number)")
    ),
    Weakness(
        "grant-column",
        "UPDATE (label_id) on public.task_labels",
        "GRANT UPDATE (label_id) ON task_labels TO todo_app",
    ),
    *(
        Weakness("grant-table", "public.labels", f"GRANT {right} ON labels TO todo_app")
        for right in ("TRUNCATE", "TRIGGER", "REFERENCES", "REFERENCES (id)", "MAINTAIN")
    ),
    *(
        Weakness("grant-shared", "public.currencies", f"GRANT {right} ON currencies TO todo_app")
        for right in ("INSERT", "UPDATE (code)", "DELETE")
    ),
    *(
        Weakness("grant-public", subject, f"GRANT {right} TO PUBLIC")
        for subject, right in (
            ("public.labels", "SELECT ON labels"),
            ("public.labels", "INSERT (name) ON labels"),
            ("public.currencies", "SELECT ON currencies"),
            ("public.my_labels", "SELECT ON my_labels"),
        )
    ),
    *(
        Weakness("grant-option", subject, f"GRANT {right} TO todo_app WITH GRANT OPTION")
        for subject, right in (
            ("public.labels", "SELECT ON labels"),
            ("name on public.labels", "INSERT (name) ON labels"),
            ("public.shout(text)", "EXECUTE ON FUNCTION shout"),
            ("SCHEMA app", "USAGE ON SCHEMA app"),
        )
    ),
    Weakness(
        "grant-sequence",
        "public.labels_id_seq",
        "GRANT USAGE ON SEQUENCE labels_id_seq TO todo_app WITH GRANT OPTION",
    ),
    *(
        Weakness(
            "grant-sequence",
            "public.labels_serial_seq",
            f"""ALTER TABLE labels ADD serial serial;
            GRANT {right} ON SEQUENCE labels_serial_seq TO todo_app""",
        )
        for right in ("USAGE", "UPDATE")
    ),
    Weakness("grant-create", "SCHEMA app", "GRANT CREATE ON SCHEMA app TO todo_app"),
    # Owners, views, functions, rules, triggers
    Weakness(
        "role-owns",
        'app."Notes"',
        'ALTER TABLE app."Notes" OWNER TO todo_app',
        f'ALTER TABLE app."Notes" OWNER TO {OWNER}',
    ),
    Weakness(
        "role-owns",
        "public.audit",
        "ALTER TABLE audit OWNER TO todo_app",
        f"ALTER TABLE audit OWNER TO {OWNER}",
    ),
    Weakness(
        "role-owns",
        "public.part",
        """CREATE TABLE whole (id int) PARTITION BY HASH (id);
        CREATE TABLE part PARTITION OF whole FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        ALTER TABLE part OWNER TO todo_app""",
        "DROP TABLE whole",
    ),
    Weakness(
        "role-owns",
        "public.numbers",
        "CREATE SEQUENCE numbers; ALTER SEQUENCE numbers OWNER TO todo_app",
        "DROP SEQUENCE numbers",
    ),
    Weakness(
        "role-owns",
        "public.shout(text)",
        "ALTER FUNCTION shout OWNER TO todo_app",
        f"ALTER FUNCTION shout OWNER TO {OWNER}",
    ),
    Weakness(
        "view-owner-rights", "public.my_labels", "ALTER VIEW my_labels RESET (security_invoker)"
    ),
    Weakness(
        "view-owner-rights",
        "public.my_labels",
        "ALTER VIEW my_labels SET (security_invoker = false, security_barrier = true)",
    ),
    Weakness(
        "view-owner-rights",
        "public.my_labels",
        """ALTER VIEW my_labels RESET (security_invoker);
        ALTER VIEW my_labels SET (security_barrier = true)""",
    ),
    # Nobody can name what is in this schema, but expressions call it.
    *(
        Weakness("function-definer", "hidden.count_all()", sql)
        for sql in (
            """CREATE VIEW all_counts WITH (security_invoker) AS SELECT hidden.count_all();
            GRANT SELECT ON all_counts TO todo_app""",
            "ALTER TABLE labels ADD CHECK (hidden.count_all() > 0) NOT VALID",
            "ALTER TABLE labels ALTER currency SET DEFAULT hidden.count_all()::text",
            "CREATE DOMAIN counted AS bigint DEFAULT hidden.count_all()",
            "CREATE FUNCTION count_it() RETURNS bigint LANGUAGE sql RETURN hidden.count_all()",
        )
    ),
    *(
        Weakness(
            "function-definer",
            "hidden.peek(text,text)",
            f"""CREATE FUNCTION hidden.peek(text, text) RETURNS text LANGUAGE sql SECURITY DEFINER
                AS 'SELECT max(title) FROM public.tasks'; {sql}""",
        )
        for sql in (
            "CREATE OPERATOR === (FUNCTION = hidden.peek, LEFTARG = text, RIGHTARG = text)",
            # Its owner calls it.
            """REVOKE ALL ON FUNCTION hidden.peek FROM PUBLIC;
            CREATE AGGREGATE peeks (text) (SFUNC = hidden.peek, STYPE = text)""",
        )
    ),
    Weakness(
        "function-definer",
        "public.count_all()",
        "GRANT EXECUTE ON FUNCTION count_all() TO todo_app",
    ),
    Weakness("function-definer", "hidden.count_all()", "GRANT USAGE ON SCHEMA hidden TO todo_app"),
    Weakness("function-definer", "public.keep()", "ALTER FUNCTION keep() SECURITY DEFINER"),
    Weakness(
        "function-definer",
        "public.spy()",
        """CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER spy AFTER INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION spy()""",
    ),
    Weakness(
        "function-leakproof",
        "public.shout(text)",
        "ALTER FUNCTION shout(text) LEAKPROOF",
        "ALTER FUNCTION shout(text) NOT LEAKPROOF",
    ),
    Weakness(
        "rule-rewrites",
        "copy on public.labels",
        "CREATE RULE copy AS ON INSERT TO labels DO ALSO INSERT INTO audit DEFAULT VALUES",
    ),
    Weakness(
        "rule-rewrites",
        "copy on public.my_labels",
        "CREATE RULE copy AS ON INSERT TO my_labels DO INSTEAD INSERT INTO audit DEFAULT VALUES",
    ),
    Weakness("trigger-disabled", "public.labels", "ALTER TABLE labels DISABLE TRIGGER touch"),
    Weakness("trigger-missing", "public.labels", "DROP TRIGGER touch ON labels"),
    *(
        Weakness(
            "trigger-missing",
            "public.labels",
            f"DROP TRIGGER touch ON labels; CREATE TRIGGER touch {when}",
        )
        for when in (
            "AFTER UPDATE ON labels FOR EACH ROW EXECUTE FUNCTION set_updated_at()",
            "BEFORE UPDATE OF name ON labels FOR EACH ROW EXECUTE FUNCTION set_updated_at()",
            "BEFORE UPDATE ON labels FOR EACH ROW EXECUTE FUNCTION keep()",
        )
    ),
    Weakness(
        "function-definer",
        "public.keep()",
        """CREATE TABLE more_labels () INHERITS (labels); ALTER FUNCTION keep() SECURITY DEFINER;
        DROP TRIGGER keep ON labels;
        CREATE TRIGGER keep AFTER UPDATE ON more_labels FOR EACH ROW EXECUTE FUNCTION keep()""",
    ),
    Weakness(
        "column-required",
        "priority on public.tasks",
        """CREATE DOMAIN needed AS int NOT NULL; ALTER TABLE tasks DROP priority;
        ALTER TABLE tasks ADD priority needed""",
    ),
    Weakness(
        "sequence-unusable",
        "public.labels_serial_seq",
        "ALTER TABLE labels ADD serial serial",
    ),
    Weakness(
        "owner-blind",
        "public.labels",
        "CREATE ROLE carol; ALTER TABLE labels OWNER TO carol",
        f"ALTER TABLE labels OWNER TO {OWNER}; DROP ROLE carol",
    ),
)
# Tests of their own have these.
ELSEWHERE = {
    "clock-skewed",
    "credentials-unusable",
    "direct-pooled",
    "jwks-algorithm",
    "server-old",
    "statements-untracked",
    "tls-missing",
    "tls-unverified",
}


@pytest.fixture(scope="module")
def cluster(
    todo_postgres: EmbeddedPostgres,  # noqa: ARG001  # makes the wheel's files readable for all
) -> Generator[Cluster]:
    with Cluster(18) as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def template(cluster: Cluster) -> str:
    """A migrated database to copy."""
    await migrate(cluster, TEMPLATE)
    return TEMPLATE


async def migrate(cluster: Cluster, name: str) -> None:
    """Create a migrated database, and the recommended login."""
    await upgrade(await cluster.create_database(name))
    await cluster.execute(f"CREATE ROLE {LOGIN} LOGIN IN ROLE todo_app")


@pytest_asyncio.fixture(scope="module")
async def own_template(cluster: Cluster, template: str) -> str:
    """The same with tables of an application."""
    await add_own_tables(cluster, template)
    return OWN_TEMPLATE


async def add_own_tables(cluster: Cluster, template: str) -> None:
    await cluster.execute(f"CREATE DATABASE {OWN_TEMPLATE} TEMPLATE {template} OWNER {OWNER}")
    connection = await cluster.connect(OWNER, OWN_TEMPLATE)
    await own_tables.create_tables(connection)
    await connection.close()


@asynccontextmanager
async def copied(cluster: Cluster, template: str) -> AsyncGenerator[Cluster]:
    await cluster.execute(
        f"CREATE DATABASE {DATABASE} TEMPLATE {template} STRATEGY FILE_COPY OWNER {OWNER}",
        f"REVOKE TEMPORARY ON DATABASE {DATABASE} FROM PUBLIC",
    )
    yield cluster
    await cluster.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


@pytest_asyncio.fixture
async def place(cluster: Cluster, template: str) -> AsyncGenerator[Cluster]:
    """The server, with a sound database."""
    async with copied(cluster, template):
        yield cluster


@pytest_asyncio.fixture
async def own_place(cluster: Cluster, own_template: str) -> AsyncGenerator[Cluster]:
    """The server, with a sound database that has tables of an application."""
    async with copied(cluster, own_template):
        yield cluster


async def report(place: Cluster, login: str = LOGIN, direct: str | None = None) -> Report:
    url = place.url(login, DATABASE)
    return await examine(Settings(database_url=url, direct_database_url=direct))


async def found(place: Cluster, login: str = LOGIN, direct: str | None = None) -> Found:
    """Return the findings, without those of every test server."""
    findings = (await report(place, login, direct)).findings
    assert findings == tuple(sorted(findings))
    seen = {(finding.code, finding.subject) for finding in findings}
    assert len(seen) == len(findings)
    assert seen >= SOUND
    assert MARKER not in str(findings)
    return seen - SOUND


async def fetchval(place: Cluster, query: str) -> object:
    connection = await place.connect(OWNER, DATABASE)
    value = await connection.fetchval(query)
    await connection.close()
    return value


@asynccontextmanager
async def with_weakness(place: Cluster, plant: Weakness) -> AsyncGenerator[None]:
    connection = await place.connect("postgres" if plant.undo else OWNER, DATABASE)
    await connection.execute(plant.sql)
    try:
        yield
    finally:
        if plant.undo:
            await connection.execute(plant.undo)
        await connection.close()


def named(plant: Weakness) -> str:
    return f"{plant.code}: {' '.join(plant.sql.replace(MINE, 'mine').split())[-150:]}"


class TestExamine:
    async def test_finds_nothing_as_the_recommended_login(self, place: Cluster) -> None:
        assert await found(place) == set()

    async def test_finds_nothing_as_a_login_that_does_not_inherit(self, place: Cluster) -> None:
        plant = Weakness(
            "",
            "",
            "CREATE ROLE dora LOGIN NOINHERIT IN ROLE todo_app",
            "DROP ROLE dora",
        )
        async with with_weakness(place, plant):
            assert await found(place, "dora") == set()

    @pytest.mark.parametrize("login", [OWNER, "postgres"])
    async def test_A5_finds_only_the_login_where_it_bypasses(
        self, place: Cluster, login: str
    ) -> None:
        assert await found(place, login) == {("login-bypasses", login)}

    async def test_finds_what_is_off_in_the_embedded_server_of_the_tests(
        self, todo_postgres: EmbeddedPostgres, todo_database_name: str
    ) -> None:
        url = todo_postgres.url(user=LOGIN, database=todo_database_name)
        assert [
            (finding.code, finding.subject)
            for finding in (await examine(Settings(database_url=url))).findings
        ] == [
            ("durability-weakened", "fsync"),
            ("durability-weakened", "full_page_writes"),
            ("durability-weakened", "synchronous_commit"),
        ]

    @pytest.mark.parametrize("plant", PLANTS, ids=named)
    async def test_finds(self, place: Cluster, plant: Weakness) -> None:
        async with with_weakness(place, plant):
            assert await found(place, plant.login) == {(plant.code, plant.subject)}

    @pytest.mark.parametrize(
        ("harmless", "undo"),
        [
            (NOTES, ""),
            # Better Auth's plugins, and its login
            ("ALTER TABLE users ADD banned boolean, ADD phone text UNIQUE", ""),
            (
                """CREATE TABLE passkeys (id text PRIMARY KEY,
                    user_id text NOT NULL REFERENCES users ON DELETE CASCADE);
                GRANT ALL ON passkeys TO todo_auth""",
                "",
            ),
            ("CREATE ROLE erin LOGIN IN ROLE todo_auth", "DROP ROLE erin"),
            ("ALTER ROLE todo_auth LOGIN", "ALTER ROLE todo_auth NOLOGIN"),
            ("CREATE INDEX own ON tasks (title); ALTER TABLE tasks SET (fillfactor = 50)", ""),
            ("REVOKE EXECUTE ON FUNCTION set_updated_at() FROM PUBLIC", ""),
            ("ALTER TABLE tasks ADD number bigint GENERATED ALWAYS AS IDENTITY", ""),
            # Nobody can call it by hand.
            (
                """CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
                    AS 'BEGIN RETURN NEW; END';
                CREATE FUNCTION watch() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER
                    AS 'BEGIN END'""",
                "",
            ),
            (
                f"""GRANT CONNECT ON DATABASE {DATABASE} TO {LOGIN};
                SELECT lo_from_bytea(4711, ''); GRANT SELECT ON LARGE OBJECT 4711 TO todo_auth""",
                "",
            ),
            # From PostgreSQL 16 on it grants only the roles that it created.
            (f"ALTER ROLE {LOGIN} CREATEROLE", f"ALTER ROLE {LOGIN} NOCREATEROLE"),
            (
                "GRANT EXECUTE ON FUNCTION pg_catalog.upper(text) TO todo_auth",
                "REVOKE EXECUTE ON FUNCTION pg_catalog.upper(text) FROM todo_auth",
            ),
            # A superuser sees every row, and find_credential does not read each table.
            (
                "CREATE ROLE carol SUPERUSER; ALTER TABLE tasks OWNER TO carol",
                f"ALTER TABLE tasks OWNER TO {OWNER}; DROP ROLE carol",
            ),
            ("ALTER TABLE accounts OWNER TO postgres", f"ALTER TABLE accounts OWNER TO {OWNER}"),
            ("CREATE SCHEMA more; CREATE TABLE more.sessions ()", "DROP SCHEMA more CASCADE"),
            # An extension judges its own objects.
            *(
                (f"CREATE {sql}; ALTER EXTENSION plpgsql ADD {kind} everything", "SELECT")
                for kind, sql in (
                    (
                        "VIEW",
                        """VIEW everything AS SELECT * FROM tasks;
                        GRANT SELECT ON everything TO PUBLIC""",
                    ),
                    (
                        "FUNCTION",
                        """FUNCTION everything() RETURNS bigint LANGUAGE sql SECURITY DEFINER
                        AS 'SELECT count(*) FROM tasks'""",
                    ),
                )
            ),
            (
                "ALTER DATABASE postgres SET todo_db.user_id = 'x'",
                "ALTER DATABASE postgres RESET todo_db.user_id",
            ),
            # What every user may set, and what another role may.
            (
                """GRANT SET ON PARAMETER work_mem TO todo_app;
                GRANT SET ON PARAMETER log_statement TO todo_auth""",
                """REVOKE ALL ON PARAMETER work_mem FROM todo_app;
                REVOKE ALL ON PARAMETER log_statement FROM todo_auth""",
            ),
            (
                """ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO todo_auth;
                ALTER DEFAULT PRIVILEGES GRANT USAGE ON TYPES TO todo_app""",
                "",
            ),
            ("CREATE TABLE secrets (); CREATE MATERIALIZED VIEW counts AS SELECT 1", ""),
            (
                """CREATE VIEW mine WITH (security_invoker = yes) AS SELECT * FROM tasks;
                GRANT SELECT ON mine TO todo_app""",
                "",
            ),
            (
                """CREATE FUNCTION own() RETURNS bigint LANGUAGE sql SECURITY DEFINER
                    RETURN (SELECT count(*) FROM tasks);
                REVOKE EXECUTE ON FUNCTION own() FROM PUBLIC""",
                "",
            ),
            ("ALTER TABLE tasks ENABLE ALWAYS TRIGGER update_tasks_updated_at", ""),
            # The expected catalogue of a newer revision is not known.
            (
                "UPDATE todo_db_version SET version_num = '9999'; DROP INDEX idx_tasks_user_id",
                "",
            ),
            (
                f"""ALTER ROLE {LOGIN} SET quote_all_identifiers = on;
                ALTER ROLE {LOGIN} SET TimeZone = 'Asia/Kathmandu'""",
                f"ALTER ROLE {LOGIN} RESET ALL",
            ),
            (
                f"ALTER ROLE {LOGIN} SET search_path = nowhere",
                f"ALTER ROLE {LOGIN} RESET search_path",
            ),
        ],
    )
    async def test_ignores_what_is_harmless(self, place: Cluster, harmless: str, undo: str) -> None:
        async with with_weakness(place, Weakness("", "", harmless, undo)):
            assert await found(place) == set()

    async def test_reports_several_weaknesses(self, place: Cluster) -> None:
        several = (
            "CREATE TABLE notes (); GRANT ALL ON notes TO PUBLIC; DROP POLICY tasks_own ON tasks"
        )
        async with with_weakness(place, Weakness("", "", several)):
            assert await found(place) == {
                ("grant-public", "public.notes"),
                ("grant-table", "public.notes"),
                ("owner-column", "public.notes"),
                ("policy-missing", "public.tasks"),
                ("rls-disabled", "public.notes"),
            }

    async def test_reports_a_login_beside_a_role_that_bypasses(self, place: Cluster) -> None:
        plant = Weakness(
            "",
            "",
            f"ALTER ROLE todo_app SUPERUSER; ALTER ROLE {LOGIN} BYPASSRLS",
            f"ALTER ROLE todo_app NOSUPERUSER; ALTER ROLE {LOGIN} NOBYPASSRLS",
        )
        async with with_weakness(place, plant):
            assert await found(place) == {("login-bypasses", LOGIN), ("role-bypasses", "todo_app")}

    async def test_ignores_what_the_login_may_do_in_another_database(self, place: Cluster) -> None:
        rights = ("ALL ON SCHEMA public", "ALL ON DATABASE postgres")
        await place.execute(*(f"GRANT {each} TO {LOGIN}" for each in rights))
        assert await found(place) == set()
        await place.execute(*(f"REVOKE {each} FROM {LOGIN}" for each in rights))

    async def test_reports_a_role_beside_that_of_better_auth(self, place: Cluster) -> None:
        roles = "todo_auth, pg_monitor"
        plant = Weakness("", "", f"GRANT {roles} TO {LOGIN}", f"REVOKE {roles} FROM {LOGIN}")
        async with with_weakness(place, plant):
            assert await found(place) == {("login-auth", LOGIN), ("login-member", "pg_monitor")}

    async def test_reports_no_difference_that_another_finding_of_the_object_explains(
        self, place: Cluster
    ) -> None:
        plant = "DROP INDEX idx_tasks_user_id; GRANT TRUNCATE ON tasks TO todo_app"
        async with with_weakness(place, Weakness("", "", plant)):
            assert await found(place) == {("grant-table", "public.tasks")}

    async def test_reports_a_difference_next_to_findings_of_other_objects(
        self, place: Cluster
    ) -> None:
        plant = "DROP INDEX idx_tasks_user_id; GRANT TRUNCATE ON users TO todo_app"
        async with with_weakness(place, Weakness("", "", plant)):
            assert await found(place) == {
                ("grant-table", "public.users"),
                ("catalogue-missing", INDEX),
            }

    @pytest.mark.parametrize("login", [LOGIN, OWNER])
    async def test_reports_a_difference_next_to_findings_outside_the_schema(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch, login: str
    ) -> None:
        monkeypatch.setattr(doctor, "time", lambda: time.time() + 6)
        monkeypatch.setattr(doctor, "_line", lambda _transport: "TLS, not verified")
        plant = Weakness(
            "",
            "",
            f"""ALTER DATABASE {DATABASE} SET todo_db.user_id = 'x';
            ALTER DATABASE {DATABASE} SET synchronous_commit = off;
            GRANT todo_auth TO {LOGIN}; DROP INDEX idx_tasks_user_id""",
            f"ALTER DATABASE {DATABASE} RESET ALL; REVOKE todo_auth FROM {LOGIN}",
        )
        async with with_weakness(place, plant):
            codes = {code for code, _ in await found(place, login, NEON)}
        assert codes == {
            "catalogue-missing",
            "clock-skewed",
            "direct-pooled",
            "durability-weakened",
            "login-auth" if login == LOGIN else "login-bypasses",
            "tls-unverified",
            "user-preset",
        }

    async def test_reports_what_is_missing_in_a_database_without_our_tables(
        self, place: Cluster
    ) -> None:
        await downgrade(place.url(OWNER, DATABASE), "base")
        assert await found(place) == {
            ("grant-temporary", DATABASE),
            ("migrations-missing", "tasks"),
            ("migrations-missing", "users"),
            ("migrations-unreadable", "public.todo_db_version"),
        }

    async def test_reports_what_is_missing_in_a_cluster_without_our_role(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # as for `cluster`
    ) -> None:
        with Cluster(16) as server:
            await server.create_database(DATABASE)
            assert await found(server, "postgres") == {
                ("login-bypasses", "postgres"),
                *(("migrations-missing", name) for name in ("todo_db_version", "tasks", "users")),
                ("migrations-missing", "todo_app"),
            }

    @pytest.mark.matrix
    @pytest.mark.parametrize("version", OTHER_VERSIONS)
    async def test_sees_the_same_on_another_version(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # as for `cluster`
        version: int,
    ) -> None:
        with Cluster(version) as server:
            await migrate(server, DATABASE)
            assert await found(server) == set()
            await server.execute(f"GRANT todo_auth TO {LOGIN}")
            plant = "DROP INDEX ix_sessions_user_id; GRANT SELECT (id) ON tasks TO todo_auth"
            await server.execute(plant, database=DATABASE)
            assert {code for code, _ in await found(server)} == {
                "catalogue-extra",
                "catalogue-missing",
                "login-auth",
            }
            assert (await report(server)).server_version.startswith(f"{version}.")

    @pytest.mark.matrix
    async def test_sees_what_only_an_older_version_or_an_extension_has(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # as for `cluster`
    ) -> None:
        with Cluster(15) as server:
            await migrate(server, TEMPLATE)
            for plant, findings in (
                # It could grant itself any role.
                (f"ALTER ROLE {LOGIN} CREATEROLE", {("login-bypasses", LOGIN)}),
                (f"ALTER ROLE {LOGIN} NOCREATEROLE; CREATE EXTENSION pg_stat_statements", set()),
                (
                    """CREATE EXTENSION dblink;
                    GRANT EXECUTE ON FUNCTION dblink_connect_u(text) TO todo_app""",
                    {("grant-system", "public.dblink_connect_u(text)")},
                ),
            ):
                async with copied(server, TEMPLATE):
                    await server.execute(plant, database=DATABASE)
                    assert await found(server) == findings

    async def test_remedy_is_sql_with_the_name_in_it(self, place: Cluster) -> None:
        (plant,) = (plant for plant in PLANTS if plant.code == "rls-not-forced")
        async with with_weakness(place, plant):
            findings = (await report(place)).findings
        (finding,) = (f for f in findings if f.code == plant.code)
        assert finding.remedy == "ALTER TABLE public.users FORCE ROW LEVEL SECURITY"
        connection: Connection = await place.connect(OWNER, DATABASE)
        await connection.execute(finding.remedy)
        await connection.close()
        assert await found(place) == set()

    async def test_changes_nothing(self, place: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "RULES", f"DELETE FROM public.tasks {TYPED} RETURNING ''")
        with pytest.raises(TodoDBError):
            await found(place)

    @pytest.mark.parametrize("drift", [-6.0, 6.0])
    async def test_finds_a_clock_that_is_off(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch, drift: float
    ) -> None:
        monkeypatch.setattr(doctor, "time", lambda: time.time() + drift)
        assert await found(place) == {("clock-skewed", "the server")}

    @pytest.mark.parametrize("drift", [-4.0, 4.0])
    async def test_allows_a_clock_that_is_a_little_off(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch, drift: float
    ) -> None:
        monkeypatch.setattr(doctor, "time", lambda: time.time() + drift)
        assert await found(place) == set()

    async def test_checks_its_own_connection(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[object] = []

        def judge(transport: asyncio.BaseTransport) -> str:
            seen.append(transport.get_extra_info("socket").family.name)
            return "clear text"

        monkeypatch.setattr(doctor, "_line", judge)
        assert await found(place) == {("tls-missing", "the connection")}
        assert seen == ["AF_UNIX"]

    async def test_failure_is_of_our_tree_without_a_value(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "RULES", f"SELECT '{MARKER}' FROM nowhere {TYPED}")
        with pytest.raises(SchemaError) as failed:
            await found(place)
        assert failed.value.__cause__ is failed.value.__context__ is None
        assert MARKER not in str(failed.value)

    async def test_unreachable_database_is_unavailable(self) -> None:
        url = f"postgresql://alice:{MARKER}@127.0.0.1:1/todo"
        with pytest.raises(UnavailableError) as failed:
            await examine(Settings(database_url=url, connect_retry_seconds=0))
        assert MARKER not in str(failed.value)

    async def test_without_a_url_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DATABASE_URL", raising=False)
        with pytest.raises(ConfigurationError):
            await examine(Settings())


class TestOwnTables:
    """Tables that an application declared by `Owned` and `Shared`."""

    async def test_are_silent_where_they_are_sound(self, own_place: Cluster) -> None:
        assert await found(own_place) == set()

    @pytest.mark.parametrize(
        "harmless",
        [
            # Columns that no user may write let nobody try values.
            "ALTER TABLE labels ADD task_id bigint REFERENCES tasks",
            "ALTER TABLE labels ADD code text UNIQUE",
            # The user is deleted with what it refers to.
            f"""{NOTES} ALTER TABLE notes DROP CONSTRAINT notes_user_id_fkey, ADD body text,
            ADD label_id bigint NOT NULL, ADD FOREIGN KEY (user_id, label_id)
            REFERENCES labels (user_id, id) ON DELETE CASCADE""",
            # No user changes it, or the statement that does sets updated_at.
            "DROP TRIGGER touch ON labels; REVOKE UPDATE ON labels FROM todo_app",
            "DROP TRIGGER touch ON labels; GRANT UPDATE (updated_at) ON labels TO todo_app",
            "ALTER TABLE labels ADD serial serial; REVOKE INSERT ON labels FROM todo_app",
            # Of tables that todo_app cannot touch.
            "CREATE RULE gone AS ON DELETE TO audit DO INSTEAD NOTHING",
            """CREATE TRIGGER keep AFTER INSERT ON audit FOR EACH ROW EXECUTE FUNCTION keep();
            ALTER TABLE audit DISABLE TRIGGER keep""",
            """CREATE TABLE more_audit () INHERITS (audit);
            CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
                AS 'BEGIN RETURN NEW; END';
            CREATE TRIGGER spy AFTER INSERT ON more_audit FOR EACH ROW EXECUTE FUNCTION spy()""",
            # PostgreSQL refuses the call to todo_app, which has no EXECUTE.
            "CREATE FUNCTION count_it() RETURNS bigint LANGUAGE sql RETURN count_all()",
            "ALTER VIEW counts SET (security_invoker); GRANT SELECT ON counts TO todo_app",
            "ALTER TABLE labels ALTER currency SET DEFAULT count_all()::text",
            """CREATE FUNCTION peek(text, text) RETURNS text LANGUAGE sql SECURITY DEFINER
                AS 'SELECT max(title) FROM tasks';
            REVOKE ALL ON FUNCTION peek FROM PUBLIC;
            CREATE AGGREGATE peeks (text) (SFUNC = peek, STYPE = text);
            REVOKE ALL ON FUNCTION peeks FROM PUBLIC""",
            # Only those in the schema public are todo_db's and Better Auth's.
            'ALTER TABLE app."Notes" RENAME TO tasks',
            'ALTER TABLE app."Notes" RENAME TO sessions',
        ],
    )
    async def test_are_silent_about_what_is_harmless(
        self, own_place: Cluster, harmless: str
    ) -> None:
        async with with_weakness(own_place, Weakness("", "", harmless)):
            assert await found(own_place) == set()

    @pytest.mark.parametrize("plant", MISTAKES, ids=named)
    async def test_mistake_is_named(self, own_place: Cluster, plant: Weakness) -> None:
        async with with_weakness(own_place, plant):
            assert await found(own_place) == {(plant.code, plant.subject)}

    @pytest.mark.parametrize(
        ("plant", "remedy"),
        [
            ("ALTER TABLE labels DISABLE ROW LEVEL SECURITY", 'op.fence("labels") '),
            (
                'ALTER TABLE app."Notes" DISABLE ROW LEVEL SECURITY',
                'op.fence("Notes", schema="app") ',
            ),
            ("DROP POLICY fence ON labels", 'op.fence("labels") '),
            ("DROP TRIGGER touch ON labels", "touch=True"),
            (
                """ALTER TABLE labels ADD task_id bigint REFERENCES tasks;
                GRANT INSERT (task_id) ON labels TO todo_app""",
                "owned_reference(…)",
            ),
            (
                """ALTER TABLE labels ADD event int REFERENCES audit;
                GRANT INSERT (event) ON labels TO todo_app""",
                "owned_reference(…)",
            ),
            (
                """CREATE TABLE colours (name text PRIMARY KEY);
                ALTER TABLE labels ADD colour text REFERENCES colours;
                GRANT INSERT (colour) ON labels TO todo_app""",
                'op.share("colours")',
            ),
            ("CREATE UNIQUE INDEX ON labels (name)", "UNIQUE (user_id, …)"),
            ("ALTER TABLE labels ADD serial serial", "Identity(always=True)"),
            ("GRANT UPDATE (id) ON labels TO todo_app", "op.fence"),
        ],
    )
    async def test_remedy_is_the_line_that_mends_it(
        self, own_place: Cluster, plant: str, remedy: str
    ) -> None:
        async with with_weakness(own_place, Weakness("", "", plant)):
            (finding,) = (
                each for each in (await report(own_place)).findings if each.subject != "fsync"
            )
        assert remedy in finding.remedy

    @pytest.mark.parametrize(
        ("policy", "binds"),
        [
            ("todo_db_shared ON currencies TO todo_app USING (true)", True),
            ("todo_db_shared ON currencies FOR SELECT TO todo_app USING (code <> '')", True),
            ("other ON currencies FOR SELECT TO todo_app USING (true)", True),
            ("todo_db_shared ON currencies FOR SELECT TO todo_auth USING (true)", False),
            (
                "todo_db_shared ON currencies AS RESTRICTIVE FOR SELECT TO todo_app USING (true)",
                False,
            ),
        ],
    )
    async def test_other_policy_shares_nothing(
        self,
        own_place: Cluster,
        policy: str,
        binds: bool,  # noqa: FBT001
    ) -> None:
        plant = f"DROP POLICY todo_db_shared ON currencies; CREATE POLICY {policy}"
        missing = set() if binds else {("policy-missing", "public.currencies")}
        async with with_weakness(own_place, Weakness("", "", plant)):
            assert await found(own_place) == missing | {
                ("foreign-key-crossing", "labels_currency_fkey on public.labels"),
                ("owner-column", "public.currencies"),
            }

    async def test_owner_of_another_type_is_named(self, own_place: Cluster) -> None:
        plant = NOTES.replace("user_id text", "user_id varchar")
        async with with_weakness(own_place, Weakness("", "", plant)):
            assert ("owner-column", "public.notes") in await found(own_place)

    async def test_table_with_a_fenced_child_cannot_be_shared(self, own_place: Cluster) -> None:
        shared = """ALTER TABLE {0} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
            CREATE POLICY todo_db_shared ON {0} FOR SELECT TO todo_app USING (true);
            GRANT SELECT ON {0} TO todo_app;"""
        plant = f"""CREATE TABLE things (user_id text NOT NULL REFERENCES users ON DELETE CASCADE);
            CREATE TABLE more_things () INHERITS (things);
            {shared.format("things")} {shared.format("more_things")}"""
        async with with_weakness(own_place, Weakness("", "", plant)):
            assert await found(own_place) == set()
        fenced = "ALTER TABLE labels INHERIT things"
        async with with_weakness(own_place, Weakness("", "", fenced)):
            assert await found(own_place) == {
                ("policy-fence-missing", "public.things"),
                ("policy-open", "todo_db_shared on public.things"),
            }

    async def test_our_table_cannot_be_shared(self, own_place: Cluster) -> None:
        plant = "CREATE POLICY todo_db_shared ON tasks FOR SELECT TO todo_app USING (true)"
        async with with_weakness(own_place, Weakness("", "", plant)):
            assert await found(own_place) == {("policy-open", "todo_db_shared on public.tasks")}

    @pytest.mark.parametrize(
        ("plant", "query"),
        [
            (
                "CREATE OPERATOR === (FUNCTION = hidden.peek, LEFTARG = text, RIGHTARG = text)",
                "SELECT ''::text === ''::text",
            ),
            (
                """CREATE AGGREGATE peeks (text) (SFUNC = hidden.peek, STYPE = text);
                REVOKE ALL ON FUNCTION hidden.peek FROM PUBLIC""",
                "SELECT peeks('')",
            ),
            (
                """CREATE VIEW peeks WITH (security_invoker) AS SELECT hidden.peek('', '') AS title;
                GRANT SELECT ON peeks TO todo_app""",
                "SELECT title FROM peeks",
            ),
        ],
    )
    async def test_function_shows_another_users_row_through_what_calls_it(
        self, own_place: Cluster, plant: str, query: str
    ) -> None:
        weakness = Weakness(
            "",
            "",
            f"""INSERT INTO users (id, email) VALUES ('alice', 'alice@example.org');
            INSERT INTO tasks (user_id, title) VALUES ('alice', '{MARKER}');
            CREATE FUNCTION hidden.peek(text, text) RETURNS text LANGUAGE sql SECURITY DEFINER
                AS 'SELECT max(title) FROM public.tasks'; {plant}""",
        )
        async with with_weakness(own_place, weakness):
            mallory = await own_place.connect(LOGIN, DATABASE)
            await mallory.execute("SET ROLE todo_app")
            assert await mallory.fetchval(query) == MARKER
            await mallory.close()
            assert await found(own_place) == {("function-definer", "hidden.peek(text,text)")}

    async def test_partition_reaches_a_function_as_its_parent_does(
        self, own_place: Cluster
    ) -> None:
        plant = f"""
            CREATE TABLE notes (user_id text NOT NULL REFERENCES users ON DELETE CASCADE)
                PARTITION BY HASH (user_id);
            CREATE TABLE notes_0 PARTITION OF notes FOR VALUES WITH (MODULUS 1, REMAINDER 0);
            ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
            CREATE POLICY own ON notes TO todo_app USING ({MINE});
            CREATE POLICY fence ON notes AS RESTRICTIVE TO todo_app USING ({MINE});
            GRANT SELECT, INSERT ON notes TO todo_app"""
        async with with_weakness(own_place, Weakness("", "", plant)):
            assert await found(own_place) == set()
        granted = "GRANT SELECT ON notes_0 TO todo_app"
        async with with_weakness(own_place, Weakness("", "", granted)):
            assert await found(own_place) == {("rls-disabled", "public.notes_0")}
        spy = """REVOKE ALL ON notes_0 FROM todo_app;
            CREATE TRIGGER spy AFTER INSERT ON notes_0 FOR EACH ROW EXECUTE FUNCTION keep();
            ALTER FUNCTION keep() SECURITY DEFINER"""
        async with with_weakness(own_place, Weakness("", "", spy)):
            assert await found(own_place) == {("function-definer", "public.keep()")}

    @pytest.mark.matrix
    @pytest.mark.parametrize("version", OTHER_VERSIONS)
    async def test_are_judged_the_same_by_another_version(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # as for `cluster`
        version: int,
    ) -> None:
        with Cluster(version) as server:
            await migrate(server, TEMPLATE)
            await add_own_tables(server, TEMPLATE)
            async with copied(server, OWN_TEMPLATE):
                assert await found(server) == set()
            for plant in MISTAKES:
                if version >= 17 or "MAINTAIN" not in plant.sql:
                    async with copied(server, OWN_TEMPLATE), with_weakness(server, plant):
                        assert await found(server) == {(plant.code, plant.subject)}, plant

    @pytest.mark.matrix
    async def test_exclusion_must_compare_users_by_equality(
        self,
        todo_postgres: EmbeddedPostgres,  # noqa: ARG002  # as for `cluster`
    ) -> None:
        # The wheel has no btree_gist.
        with Cluster(15) as server:
            await migrate(server, TEMPLATE)
            await add_own_tables(server, TEMPLATE)
            for operator, findings in (
                ("=", set()),
                ("<>", {("unique-crossing", "apart on public.labels")}),
            ):
                plant = f"""CREATE EXTENSION btree_gist; ALTER TABLE labels
                    ADD CONSTRAINT apart EXCLUDE USING gist (user_id WITH {operator}, name WITH =),
                    ADD CONSTRAINT sound EXCLUDE USING gist (user_id WITH =, currency WITH =)"""
                async with (
                    copied(server, OWN_TEMPLATE),
                    with_weakness(server, Weakness("", "", plant)),
                ):
                    assert await found(server) == findings


class TestReport:
    async def test_has_what_was_examined(self, place: Cluster) -> None:
        seen = await report(place)
        version = await fetchval(place, "SHOW server_version")
        assert (seen.server_version, seen.revision) == (version, REVISION)
        assert (seen.endpoint, seen.line) == ("direct", "unix socket")

    async def test_cannot_be_changed(self, place: Cluster) -> None:
        seen = await report(place)
        with pytest.raises(FrozenInstanceError):
            seen.findings = ()  # type: ignore[misc]
        assert not hasattr(seen, "__dict__")

    @pytest.mark.parametrize(
        ("plant", "revision"),
        [
            ("UPDATE todo_db_version SET version_num = '0001'", "0001"),
            ("UPDATE todo_db_version SET version_num = '9999'", "9999"),
            ("DELETE FROM todo_db_version", None),
            ("DROP TABLE todo_db_version", None),
            ("REVOKE SELECT ON todo_db_version FROM todo_app", None),
        ],
    )
    async def test_has_the_last_migration(
        self, place: Cluster, plant: str, revision: str | None
    ) -> None:
        async with with_weakness(place, Weakness("", "", plant)):
            assert (await report(place)).revision == revision

    async def test_has_only_the_version_of_a_server_that_is_too_old(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "_OLDEST", 990_000)
        monkeypatch.setattr(doctor, "RULES", "SELECT what it does not know")
        seen = await report(place)
        assert [(finding.code, finding.subject) for finding in seen.findings] == [
            ("server-old", "the server")
        ]
        assert seen.server_version == await fetchval(place, "SHOW server_version")
        assert seen.revision is None

    async def test_finds_a_direct_url_that_is_pooled(self, place: Cluster) -> None:
        assert await found(place, direct=NEON) == {("direct-pooled", "DIRECT_DATABASE_URL")}
        assert await found(place, direct=NEON.replace("-pooler", "")) == set()
        assert await found(place, direct=place.url(OWNER, DATABASE)) == set()

    async def test_refuses_an_invalid_direct_url(self, place: Cluster) -> None:
        with pytest.raises(ConfigurationError):
            await report(place, direct=f"mysql://alice:{MARKER}@localhost/todo")

    @pytest.mark.parametrize(
        ("url", "endpoint"), [(NEON, "pooled"), (NEON.replace("-pooler", ""), "direct")]
    )
    async def test_knows_neons_endpoints_by_their_names(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch, url: str, endpoint: str
    ) -> None:
        is_pooled, neon = Pool.is_pooled, Pool(Settings(database_url=url))
        monkeypatch.setattr(Pool, "is_pooled", lambda _pool, **pids: is_pooled(neon, **pids))
        # Neon has a proxy in front of both endpoints.
        monkeypatch.setattr(doctor, "_SERVER", doctor._SERVER.replace("pg_backend_pid()", "0"))
        assert (await report(place)).endpoint == endpoint

    @pytest.mark.pooler
    async def test_knows_another_pooler_by_its_process(self, place: Cluster) -> None:
        await place.execute(f"ALTER ROLE {LOGIN} PASSWORD '{PASSWORD}'")
        async with PgBouncer(
            TRIXIE, place.url("postgres", DATABASE), max_prepared_statements=1000
        ) as pooler:
            url = pooler.url(LOGIN, DATABASE)
            assert (await examine(Settings(database_url=url))).endpoint == "pooled"


class TestCredentials:
    """What the settings accept, compared with the table `jwks`."""

    BETTER_AUTH: Final[dict[str, Any]] = {
        "better_auth_secret": MARKER,
        "better_auth_url": "http://localhost:3000",
    }

    @staticmethod
    async def examined(place: Cluster, login: str = LOGIN, **settings: Any) -> tuple[Found, str]:  # noqa: ANN401  # Settings checks them
        seen = await examine(Settings(database_url=place.url(login, DATABASE), **settings))
        assert MARKER not in repr(seen)
        return {(each.code, each.subject) for each in seen.findings} - SOUND, seen.credentials

    async def test_are_none_without_a_setting(self, place: Cluster) -> None:
        assert await self.examined(place) == (set(), "none: the settings name no issuer")

    async def test_of_settings_that_contradict_each_other_are_found(self, place: Cluster) -> None:
        findings, said = await self.examined(
            place, **self.BETTER_AUTH, neon_auth_base_url="https://neon.example.org/todo/auth"
        )
        assert findings == {("credentials-unusable", "the settings")}
        assert said.startswith("none: NEON_AUTH_BASE_URL and BETTER_AUTH_SECRET contradict")

    async def test_of_another_issuer_have_no_secret_and_no_table(self, place: Cluster) -> None:
        findings, said = await self.examined(
            place,
            jwks_url="https://issuer.example.org/jwks",
            jwt_issuer="https://issuer.example.org",
        )
        assert findings == set()
        assert said.endswith("with keys from https://issuer.example.org/jwks")

    async def test_are_no_jwts_before_there_is_a_key(self, place: Cluster) -> None:
        findings, said = await self.examined(place, **self.BETTER_AUTH)
        assert findings == set()
        assert "whether the secret is Better Auth's, only its first cookie shows" in said
        assert said.endswith("no JWT is accepted before Better Auth's plugin jwt makes a key")
        await self.add_key(place, "EdDSA")
        findings, said = await self.examined(place, **self.BETTER_AUTH)
        assert (findings, "jwks is empty" in said) == (set(), False)

    @staticmethod
    async def add_key(place: Cluster, algorithm: str | None, days: int | None = None) -> None:
        connection = await place.connect(OWNER, DATABASE)
        await add_key(connection, f"{algorithm}", "{}", algorithm=algorithm, expires_days=days)
        await connection.close()

    async def test_by_another_algorithm_are_found_by_who_may_read_them(
        self, place: Cluster
    ) -> None:
        for algorithm in (None, "EdDSA", "ES256", "ES512", "RS256", "PS256"):
            await self.add_key(place, algorithm)
        await self.add_key(place, "HS256", days=-1)
        owners = ("login-bypasses", OWNER)
        assert (await self.examined(place, OWNER, **self.BETTER_AUTH))[0] == {owners}
        await self.add_key(place, "ECDH-ES", days=1)
        found, _ = await self.examined(place, OWNER, **self.BETTER_AUTH)
        assert found == {owners, ("jwks-algorithm", "public.jwks")}
        assert (await self.examined(place, **self.BETTER_AUTH))[0] == set()
        # Keys from a URL: the table does not matter.
        issuer = {"jwks_url": "https://issuer.example.org/jwks", "jwt_issuer": "https://x.org"}
        assert (await self.examined(place, OWNER, **issuer))[0] == {owners}

    async def test_are_none_without_the_table(self, place: Cluster) -> None:
        connection = await place.connect(OWNER, DATABASE)
        await connection.execute("DROP TABLE jwks")
        await connection.close()
        _, said = await self.examined(place, **self.BETTER_AUTH)
        assert said.endswith("only its first cookie shows")


class TestLine:
    REMOTE = ("203.0.113.7", 5432)

    @staticmethod
    def line(peer: object, context: ssl.SSLContext | None = None) -> str:
        tls = context and context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="db")
        return doctor._line(asyncio.BaseTransport({"peername": peer, "ssl_object": tls}))

    @pytest.mark.parametrize("peer", ["", "/run/.s.PGSQL.5432", None])
    def test_unix_socket(self, peer: object) -> None:
        assert self.line(peer) == "unix socket"

    @pytest.mark.parametrize("peer", [("127.0.0.9", 1), ("::1", 1, 0, 0)])
    def test_this_machine(self, peer: object) -> None:
        assert self.line(peer) == "this machine"

    @pytest.mark.parametrize("peer", [REMOTE, ("10.0.0.1", 5432), ("2001:db8::1", 5432, 0, 0)])
    def test_T1_clear_text_to_another_machine(self, peer: object) -> None:
        assert self.line(peer) == "clear text"

    def test_T2_verified_certificate(self) -> None:
        assert self.line(self.REMOTE, ssl.create_default_context()) == "TLS, verified"

    def test_T1_certificate_of_any_host(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        assert self.line(self.REMOTE, context) == "TLS, not verified"

    def test_T1_certificate_of_any_authority(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        assert self.line(self.REMOTE, context) == "TLS, not verified"

    @pytest.mark.parametrize(
        ("line", "findings"),
        [
            ("unix socket", set()),
            ("this machine", set()),
            ("TLS, verified", set()),
            ("TLS, not verified", {("tls-unverified", "the connection")}),
            ("clear text", {("tls-missing", "the connection")}),
        ],
    )
    async def test_is_reported_and_checked(
        self, place: Cluster, monkeypatch: pytest.MonkeyPatch, line: str, findings: Found
    ) -> None:
        monkeypatch.setattr(doctor, "_line", lambda _transport: line)
        assert await found(place) == findings
        assert (await report(place)).line == line


class TestCodes:
    CODES: Final = {
        *re.findall(r"SELECT (?:DISTINCT )?'([a-z]+(?:-[a-z]+)+)',", RULES),
        *FURTHER,
    }

    def test_each_is_tested(self) -> None:
        assert {plant.code for plant in (*PLANTS, *MISTAKES)} | ELSEWHERE == self.CODES

    def test_the_page_has_each_once(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"
        _, table = page.read_text("utf-8").split("| Code | Meaning |")
        rows = re.findall(r"^\| (`.*`) \|", table, re.MULTILINE)
        assert sorted(", ".join(rows).split(", ")) == sorted(f"`{code}`" for code in self.CODES)
