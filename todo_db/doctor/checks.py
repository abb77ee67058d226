"""The checks of a database: a table of small queries, sent as one."""

from dataclasses import dataclass
from typing import Final

from todo_db.fence import ROLE
from todo_db.models import REVISION


@dataclass(frozen=True, slots=True)
class Check:
    """One possible weakness.

    Attributes:
        problem: As in `Finding`.
        remedy: As in `Finding`, with `{}` for the subject.
        sql: A query that returns the subjects; empty if the catalogue does not contain them.
    """

    problem: str
    remedy: str
    sql: str = ""


# CTEs that the checks share. A superuser has every right, and so has a table's owner on the table:
# each is reported once, and not again for every right that it implies.
_COMMON: Final = """
    WITH role AS (SELECT * FROM pg_roles WHERE rolname = 'todo_app'),
    app AS (SELECT oid FROM role WHERE NOT rolsuper),
    modern AS (SELECT current_setting('server_version_num')::integer >= 160000 AS yes),
    authenticating AS (SELECT session_user::text AS login FROM pg_roles r, pg_roles own, modern
        WHERE r.rolname = 'todo_auth' AND own.rolname = session_user AND NOT own.rolsuper
            AND (pg_has_role(own.oid, r.oid, 'USAGE')
                OR pg_has_role(own.oid, r.oid, CASE WHEN yes THEN 'SET' ELSE 'MEMBER' END))),
    spaces AS (SELECT * FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'),
    relations AS (
        SELECT c.*, c.oid::regclass::text AS name,
            nspname = 'public' AND relname IN ('users', 'tasks', 'idempotency_keys') AS ours,
            nspname = 'public'
                AND relname IN ('sessions', 'accounts', 'verifications', 'jwks') AS auths
        FROM pg_class c JOIN spaces n ON n.oid = relnamespace
        WHERE NOT EXISTS (SELECT FROM pg_depend
            WHERE classid = 'pg_class'::regclass AND objid = c.oid AND deptype = 'e')),
    touched AS (
        SELECT r.* FROM relations r, app
        WHERE relkind IN ('r', 'p', 'f', 'v', 'm') AND NOT pg_has_role(app.oid, relowner, 'MEMBER')
            AND (has_any_column_privilege(app.oid, r.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
                OR has_table_privilege(app.oid, r.oid, 'DELETE, TRUNCATE, TRIGGER'))),
    stored AS (SELECT * FROM touched
        WHERE relkind IN ('r', 'p', 'f') AND name <> 'public.todo_db_version' AND NOT auths),
    policies AS (
        SELECT p.*, format('%I on %s', polname, name) AS policy, ours,
            pg_get_expr(polqual, polrelid) AS qual, pg_get_expr(polwithcheck, polrelid) AS checked,
            polroles && ARRAY(SELECT oid FROM role UNION ALL SELECT 0::oid) AS bind,
            'true' IN (pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
                OR NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_policy'::regclass
                    AND objid = p.oid AND refobjid = polrelid AND refobjsubid > 0) AS constant
        FROM pg_policy p JOIN relations r ON r.oid = polrelid),
    functions AS (
        SELECT p.*, p.oid::regprocedure::text AS name
        FROM pg_proc p JOIN spaces n ON n.oid = pronamespace
        WHERE NOT EXISTS (SELECT FROM pg_depend
            WHERE classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'e'))
"""
# The rule of the migrations, as every version of PostgreSQL prints it.
_RULE: Final = (
    r"^\((user_id|id) = NULLIF\(\( SELECT current_setting\('todo_db.user_id'::text, true\) "
    r"AS current_setting\), ''::text\)\)$"
)

CHECKS: Final[dict[str, Check]] = {
    # Roles
    "role-bypasses": Check(
        "it is a superuser or has BYPASSRLS: row-level security does not bind it",
        "ALTER ROLE {} NOSUPERUSER NOBYPASSRLS",
        "SELECT rolname FROM role WHERE rolsuper OR rolbypassrls",
    ),
    "role-member": Check(
        f"{ROLE} is a member of it: what it may see, bypass or do, transactions can too",
        f"REVOKE {{}} FROM {ROLE}",
        """SELECT r.oid::regrole::text FROM pg_roles r, app
        WHERE r.oid <> app.oid AND pg_has_role(app.oid, r.oid, 'MEMBER')""",
    ),
    "role-owns": Check(
        f"{ROLE} owns it, and can take its row-level security away",
        "ALTER TABLE {} OWNER TO the role that migrates",
        """SELECT name FROM relations, app WHERE relkind IN ('r', 'p', 'f', 'v', 'm')
            AND pg_has_role(app.oid, relowner, 'MEMBER')""",
    ),
    "login-bypasses": Check(
        "transactions are fenced all the same, but injected SQL could step back to this login,"
        " and it bypasses or controls row-level security",
        f"connect as a login of its own: CREATE ROLE todo_login LOGIN PASSWORD … IN ROLE {ROLE}",
        """SELECT session_user::text WHERE EXISTS (
            SELECT FROM pg_roles r WHERE pg_has_role(session_user, r.oid, 'MEMBER')
                AND (r.rolsuper OR r.rolbypassrls OR r.oid IN (
                    SELECT relowner FROM relations WHERE relkind IN ('r', 'p', 'v', 'm')))
                AND (r.rolname = session_user OR NOT EXISTS (
                    SELECT FROM role WHERE pg_has_role(role.oid, r.oid, 'MEMBER'))))""",
    ),
    "login-not-member": Check(
        f"it may not become {ROLE}, so no transaction can begin",
        f"GRANT {ROLE} TO {{}}",
        """SELECT session_user::text FROM role, modern WHERE NOT pg_has_role(
            session_user, role.oid, CASE WHEN yes THEN 'SET' ELSE 'MEMBER' END)""",
    ),
    "login-auth": Check(
        "it is a member of todo_auth: injected SQL could read every user, session and password",
        "REVOKE todo_auth FROM {}; Better Auth connects as a login of its own",
        "SELECT login FROM authenticating",
    ),
    "login-member": Check(
        "the login is a member of it: injected SQL could step over to what it may do",
        "REVOKE {} FROM the login",
        f"""SELECT r.oid::regrole::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
            JOIN pg_roles login ON login.oid = m.member
        WHERE login.rolname = session_user AND r.rolname <> '{ROLE}'
            AND NOT (login.rolsuper OR login.rolbypassrls OR r.rolsuper OR r.rolbypassrls)
            AND NOT EXISTS (SELECT FROM relations WHERE relowner IN (login.oid, r.oid))
            AND NOT (r.rolname = 'todo_auth' AND EXISTS (SELECT FROM authenticating))""",  # noqa: S608  # a constant
    ),
    "owner-blind": Check(
        "its owner neither bypasses nor escapes row-level security: backfills and dumps see no row",
        "ALTER TABLE {} OWNER TO a role with BYPASSRLS that the application does not connect as",
        """SELECT name FROM relations c JOIN pg_roles r ON r.oid = relowner
        WHERE relforcerowsecurity AND NOT (rolsuper OR rolbypassrls) AND rolname <> 'todo_app'""",
    ),
    # Row-level security
    "rls-disabled": Check(
        f"{ROLE} may use it, and it has no row-level security: every user sees every row",
        "ALTER TABLE {} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; add policies",
        "SELECT name FROM stored WHERE NOT relrowsecurity",
    ),
    "rls-not-forced": Check(
        "its row-level security does not bind its owner",
        "ALTER TABLE {} FORCE ROW LEVEL SECURITY",
        "SELECT name FROM stored WHERE relrowsecurity AND NOT relforcerowsecurity",
    ),
    "policy-missing": Check(
        f"no policy lets {ROLE} see a row",
        f"CREATE POLICY … ON {{}} TO {ROLE} USING (…) WITH CHECK (…)",
        """SELECT name FROM stored s WHERE relrowsecurity AND NOT EXISTS (
            SELECT FROM policies p WHERE polrelid = s.oid AND polpermissive AND bind)""",
    ),
    "policy-fence-missing": Check(
        "it has no restrictive policy: any permissive one added later opens it",
        f"CREATE POLICY … ON {{}} AS RESTRICTIVE TO {ROLE} USING (…) WITH CHECK (…)",
        """SELECT name FROM stored s WHERE relrowsecurity AND EXISTS (
            SELECT FROM policies p WHERE polrelid = s.oid AND bind)
            AND NOT EXISTS (
            SELECT FROM policies p WHERE polrelid = s.oid AND NOT polpermissive AND bind)""",
    ),
    "policy-constant": Check(
        "it looks at no column, or is always true: it is the same for every user's row",
        "DROP POLICY {}",
        """SELECT policy FROM policies WHERE constant
            AND polroles <> ARRAY(SELECT oid FROM pg_roles WHERE rolname = 'todo_auth')""",
    ),
    "policy-public": Check(
        f"it binds PUBLIC, not {ROLE} alone: it gives rows to every role with a grant",
        f"ALTER POLICY {{}} TO {ROLE}",
        "SELECT policy FROM policies WHERE 0 = ANY (polroles)",
    ),
    "policy-altered": Check(
        "it is not the rule that the migrations wrote: only the user of the transaction",
        "drop it; if a migration made it, create it again as that does",
        f"""SELECT policy FROM policies WHERE ours AND bind AND NOT constant
            AND NOT (qual ~ $rule${_RULE}$rule$ AND coalesce(checked, qual) = qual)""",  # noqa: S608  # a constant
    ),
    "policy-helper": Check(
        "a policy calls it and it is not STABLE: a plan may keep one user's answer for the next",
        "ALTER FUNCTION {} STABLE",
        """SELECT f.oid::regprocedure::text FROM pg_proc f JOIN pg_depend ON refobjid = f.oid
        WHERE classid = 'pg_policy'::regclass AND refclassid = 'pg_proc'::regclass
            AND provolatile <> 's'""",
    ),
    # Objects that change whose rights apply
    "function-search-path": Check(
        "what its body names is looked up where its caller says",
        "ALTER FUNCTION {} SET search_path = ''",
        """SELECT name FROM functions JOIN pg_language l ON l.oid = prolang
        WHERE lanname NOT IN ('internal', 'c') AND prokind IN ('f', 'p') AND prosqlbody IS NULL
            AND NOT EXISTS (SELECT FROM unnest(proconfig) s WHERE s ^@ 'search_path=')""",
    ),
    "function-definer": Check(
        f"{ROLE} may call it, and it runs with its owner's rights",
        f"REVOKE EXECUTE ON FUNCTION {{}} FROM PUBLIC, {ROLE}; or make it SECURITY INVOKER",
        """SELECT name FROM functions f, app
        WHERE prosecdef AND has_function_privilege(app.oid, f.oid, 'EXECUTE')
            -- Its body is compared as a whole.
            AND name <> 'public.find_credential(text,text)'""",
    ),
    "view-owner-rights": Check(
        f"{ROLE} may use it, and it shows what its owner may see",
        "ALTER VIEW {} SET (security_invoker = true)",
        """SELECT name FROM touched WHERE relkind = 'v' AND NOT EXISTS (
            SELECT FROM pg_options_to_table(reloptions)
            WHERE option_name = 'security_invoker' AND option_value::boolean)""",
    ),
    "view-materialized": Check(
        f"{ROLE} may read it, and it can have no row-level security",
        f"REVOKE ALL ON {{}} FROM PUBLIC, {ROLE}",
        "SELECT name FROM touched WHERE relkind = 'm'",
    ),
    # Grants
    "grant-column": Check(
        f"{ROLE} may write what only the database sets, or what must not change",
        f"REVOKE INSERT, UPDATE ON its table FROM PUBLIC, {ROLE};"
        " grant the columns of its migration again",
        """SELECT format('%s (%I) on %s', way, named, name) FROM touched t, app, (VALUES
            ('INSERT', 'tasks', ARRAY['id', 'created_at', 'updated_at']),
            ('UPDATE', 'tasks', ARRAY['id', 'user_id', 'created_at', 'updated_at']),
            ('INSERT', 'users', ARRAY['email_verified', 'created_at', 'updated_at']),
            ('UPDATE', 'users', ARRAY['id', 'email_verified', 'created_at', 'updated_at']),
            ('INSERT', 'idempotency_keys', ARRAY['created_at']),
            ('UPDATE', 'idempotency_keys',
                ARRAY['user_id', 'key', 'fingerprint', 'task_ids', 'created_at'])
        ) w (way, tabled, columns), unnest(columns) named
        WHERE ours AND relname = tabled AND has_column_privilege(app.oid, t.oid, (SELECT attnum
            FROM pg_attribute WHERE attrelid = t.oid AND attname = named), way)""",
    ),
    "grant-table": Check(
        f"{ROLE} may TRUNCATE it, refer to it or put triggers on it, which no policy stops",
        f"REVOKE TRUNCATE, REFERENCES, TRIGGER ON {{}} FROM PUBLIC, {ROLE}",
        """SELECT name FROM touched t, app WHERE NOT auths AND (
            has_table_privilege(app.oid, t.oid, 'TRUNCATE, TRIGGER')
            OR has_any_column_privilege(app.oid, t.oid, 'REFERENCES'))""",
    ),
    "grant-auth": Check(
        f"{ROLE} may touch it, and sign-ins are only Better Auth's to read",
        f"REVOKE ALL ON {{}} FROM PUBLIC, {ROLE}",
        "SELECT name FROM touched WHERE auths",
    ),
    "grant-sequence": Check(
        f"{ROLE} may read or set it: ids tell how many there are, or come again",
        f"REVOKE ALL ON SEQUENCE {{}} FROM PUBLIC, {ROLE}",
        """SELECT name FROM relations r, app WHERE NOT pg_has_role(app.oid, relowner, 'MEMBER')
            AND CASE WHEN relkind = 'S' THEN
                has_sequence_privilege(app.oid, r.oid, 'USAGE, SELECT, UPDATE') END""",
    ),
    "grant-version": Check(
        f"{ROLE} may change which migrations are said to have run",
        f"REVOKE INSERT, UPDATE, DELETE ON {{}} FROM PUBLIC, {ROLE}",
        """SELECT name FROM touched t, app WHERE name = 'public.todo_db_version' AND
            (has_any_column_privilege(app.oid, t.oid, 'INSERT, UPDATE')
            OR has_table_privilege(app.oid, t.oid, 'DELETE'))""",
    ),
    "grant-temporary": Check(
        f"{ROLE} may make a temporary table that hides a real one from the connection's next user",
        f"REVOKE TEMPORARY ON DATABASE {{}} FROM PUBLIC, {ROLE}",
        """SELECT quote_ident(current_database()) FROM app
        WHERE has_database_privilege(app.oid, current_database(), 'TEMPORARY')""",
    ),
    "grant-create": Check(
        f"{ROLE} may make objects in it",
        f"REVOKE CREATE ON {{}} FROM PUBLIC, {ROLE}",
        """SELECT format('SCHEMA %I', nspname) FROM spaces n, app
        WHERE has_schema_privilege(app.oid, n.oid, 'CREATE')
        UNION ALL SELECT format('DATABASE %I', current_database()) FROM app
        WHERE has_database_privilege(app.oid, current_database(), 'CREATE')""",
    ),
    "grant-default": Check(
        f"every table that this role makes is open to {ROLE} before it has row-level security",
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {{}} REVOKE ALL ON TABLES FROM PUBLIC, {ROLE}",
        """SELECT DISTINCT defaclrole::regrole::text FROM pg_default_acl, aclexplode(defaclacl) a
        WHERE defaclobjtype = 'r' AND a.grantee IN (SELECT oid FROM app UNION ALL SELECT 0)""",
    ),
    # Guarantees of the tables
    "identity-not-always": Check(
        "an id can be given by hand, and be one that exists or existed",
        "ALTER TABLE public.tasks ALTER id SET GENERATED ALWAYS (or ADD, if it has none)",
        """SELECT name || '.id' FROM relations r JOIN pg_attribute ON attrelid = r.oid
        WHERE name = 'public.tasks' AND attname = 'id' AND attidentity <> 'a'""",
    ),
    "sequence-unsteady": Check(
        "it cycles, caches or runs backwards: ids come again, or out of order",
        "ALTER SEQUENCE {} NO CYCLE CACHE 1 INCREMENT 1",
        """SELECT seqrelid::regclass::text FROM pg_sequence
            JOIN pg_depend d ON d.objid = seqrelid JOIN relations r ON r.oid = refobjid
        WHERE ours AND deptype IN ('a', 'i') AND d.classid = 'pg_class'::regclass
            AND (seqcycle OR seqcache <> 1 OR seqincrement < 1)""",
    ),
    "trigger-missing": Check(
        "nothing moves its updated_at: a stale change is not noticed",
        "downgrade to base and upgrade again, or create the trigger of 0001 again",
        """SELECT name FROM relations r WHERE name IN ('public.users', 'public.tasks')
            AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = r.oid
                AND tgname = format('update_%s_updated_at', relname) AND tgtype & 19 = 19)""",
    ),
    "trigger-silenced": Check(
        "it is not origin: no trigger and no foreign key is kept, on any table",
        "ALTER DATABASE … (or the ROLE) RESET {}",
        """SELECT name FROM pg_settings
        WHERE name = 'session_replication_role' AND setting <> 'origin'""",
    ),
    "row-security-off": Check(
        "it is off: every statement on a table with row-level security fails",
        "ALTER DATABASE … (or the ROLE) RESET {}",
        "SELECT name FROM pg_settings WHERE name = 'row_security' AND setting <> 'on'",
    ),
    "trigger-disabled": Check(
        "a trigger of it is disabled: updated_at or the foreign key is not kept",
        "ALTER TABLE {} ENABLE TRIGGER ALL (a superuser, where it is the foreign key's)",
        """SELECT DISTINCT name FROM relations r JOIN pg_trigger ON tgrelid = r.oid
        WHERE ours AND tgenabled NOT IN ('O', 'A')""",
    ),
    "foreign-key-missing": Check(
        "a task may have no user, and outlive its user",
        "ALTER TABLE {} ADD CONSTRAINT fk_tasks_user_id_users FOREIGN KEY (user_id)"
        " REFERENCES public.users ON DELETE CASCADE",
        """SELECT t.name FROM relations t, relations u WHERE t.name = 'public.tasks'
            AND u.name = 'public.users' AND NOT EXISTS (SELECT FROM pg_constraint
            WHERE contype = 'f' AND conrelid = t.oid AND confrelid = u.oid)""",
    ),
    "foreign-key-weak": Check(
        "it is not validated or does not cascade: rows may outlive their user",
        "VALIDATE it, or add it again with ON DELETE CASCADE",
        """SELECT format('%I on %s', conname, conrelid::regclass) FROM pg_constraint
            JOIN relations u ON u.oid = confrelid
        WHERE contype = 'f' AND u.name = 'public.users'
            AND NOT (convalidated AND confdeltype = 'c')""",
    ),
    # Settings and state
    "durability-weakened": Check(
        "it is off: what was committed may be lost, or the whole database with it",
        "ALTER SYSTEM (or the DATABASE, or the ROLE) SET {} = on",
        """SELECT name FROM pg_settings WHERE setting = 'off'
            AND name IN ('fsync', 'full_page_writes', 'synchronous_commit')""",
    ),
    "durability-unlogged": Check(
        "it is unlogged: a crash of the server empties it",
        "ALTER TABLE {} SET LOGGED",
        "SELECT name FROM relations WHERE ours AND relpersistence <> 'p'",
    ),
    "user-preset": Check(
        "its settings name a user: a connection without a user would be that one",
        "ALTER … {} RESET todo_db.user_id",
        """SELECT DISTINCT concat_ws(' ', 'ROLE ' || nullif(setrole, 0)::regrole,
            'DATABASE ' || quote_ident(datname))
        FROM pg_db_role_setting LEFT JOIN pg_database d ON d.oid = setdatabase, unnest(setconfig) s
        WHERE s ^@ 'todo_db.user_id=' AND (datname IS NULL OR datname = current_database())""",
    ),
    "migrations-missing": Check(
        "it is not there: the database is not migrated",
        "todo-db migrate",
        """SELECT wanted FROM unnest(ARRAY['todo_db_version', 'tasks', 'users']) wanted
        WHERE NOT EXISTS (SELECT FROM relations WHERE name = 'public.' || wanted)
        UNION ALL SELECT 'todo_app' WHERE NOT EXISTS (SELECT FROM role)""",
    ),
    "migrations-unreadable": Check(
        f"{ROLE} may not read it, so it cannot tell which migrations have run",
        f"GRANT USAGE ON SCHEMA public TO {ROLE}; GRANT SELECT ON {{}} TO {ROLE}",
        """SELECT name FROM relations r JOIN spaces n ON n.oid = relnamespace, role
        WHERE name = 'public.todo_db_version'
            AND NOT (has_table_privilege(role.oid, r.oid, 'SELECT')
                AND has_schema_privilege(role.oid, n.oid, 'USAGE'))""",
    ),
    "migrations-behind": Check(
        f"it says that migrations before {REVISION} were the last to run",
        "todo-db migrate",
    ),
    "catalogue-missing": Check(
        "a migration made it, and it is gone or altered",
        "make it again as the file in alembic/versions does",
    ),
    "catalogue-extra": Check(
        "no migration made it, so nothing tells what it opens or breaks",
        "drop or revoke it, or have a migration put back what it alters",
    ),
    "statements-untracked": Check(
        "it does not track prepared statements (or pools by session), so todo_db turns them off:"
        " each call costs one round trip more",
        "set max_prepared_statements of PgBouncer above 0 (1.21 or later), or"
        " TODO_DB_PREPARED_STATEMENTS=false; =true if it pools by session",
    ),
    "server-old": Check(
        "it is older than PostgreSQL 15, so nothing else was looked at",
        "upgrade it",
    ),
    "direct-pooled": Check(
        "it names Neon's pooler, which gives each transaction of a migration another session",
        "take -pooler out of its host, or leave it out: it is derived from DATABASE_URL",
    ),
    "clock-skewed": Check(
        "its clock and this machine's differ by more than 5 seconds: tokens expire at other times",
        "synchronise both by NTP",
    ),
    "tls-missing": Check(
        "the server is another machine, and everything goes to it in clear text",
        "use the server's TLS: add sslmode=verify-full to the URL",
    ),
    "tls-unverified": Check(
        "it is encrypted, but another machine could pose as the server: certificate or name are"
        " not checked",
        "add sslmode=verify-full to the URL",
    ),
}
QUERY: Final = _COMMON + " UNION ALL ".join(
    f"SELECT '{code}', subject FROM ({check.sql}) found (subject)"  # noqa: S608  # constants
    for code, check in CHECKS.items()
    if check.sql
)
