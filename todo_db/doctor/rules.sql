-- What the doctor asks a live database. Each SELECT at the end is one rule, and returns the code,
-- the subject, the problem and the remedy of its findings; a subject is an object, or "a part of it
-- on a table". $1 has the columns of our tables, such as 'public.tasks.id'; $2 is the
-- rule of every fence as PostgreSQL prints it, behind the bracket and the name of the column.
WITH RECURSIVE role AS (SELECT * FROM pg_roles WHERE rolname = 'todo_app'),
-- A superuser has every right, and so has an owner on its table: each is reported once, and not
-- again for every right that it implies.
app AS (SELECT oid FROM role WHERE NOT rolsuper),
modern AS (SELECT current_setting('server_version_num')::integer >= 160000 AS yes),
login AS (SELECT * FROM pg_roles WHERE rolname = session_user),
-- A role with REPLICATION reads every change of every table, and before PostgreSQL 16 one with
-- CREATEROLE becomes any role but a superuser.
privileged AS (
    SELECT oid FROM pg_roles, modern
    WHERE rolsuper OR rolbypassrls OR rolreplication OR rolcreaterole AND NOT yes),
authenticating AS (
    SELECT session_user::text AS login FROM pg_roles r, login own, modern
    WHERE r.rolname = 'todo_auth' AND NOT own.rolsuper
        AND (pg_has_role(own.oid, r.oid, 'USAGE')
            OR pg_has_role(own.oid, r.oid, CASE WHEN yes THEN 'SET' ELSE 'MEMBER' END))),
spaces AS (
    SELECT * FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'),
relations AS (
    SELECT c.*, c.oid::regclass::text AS name, nspname,
        nspname = 'public' AND relname IN ('users', 'tasks', 'idempotency_keys') AS ours,
        nspname = 'public' AND relname IN ('sessions', 'accounts', 'verifications', 'jwks')
            AS auths,
        format('("%s"%s)', relname,
            CASE WHEN nspname <> 'public' THEN format(', schema="%s"', nspname) END) AS named
    FROM pg_class c JOIN spaces n ON n.oid = relnamespace
    WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S') AND NOT EXISTS (SELECT FROM pg_depend
        WHERE classid = 'pg_class'::regclass AND objid = c.oid AND deptype = 'e')),
-- What row-level security does not bind.
unbound AS (SELECT oid FROM privileged UNION ALL SELECT relowner FROM relations),
-- What todo_app can touch.
touched AS (
    SELECT r.* FROM relations r, app
    WHERE NOT pg_has_role(app.oid, relowner, 'MEMBER')
        AND (has_table_privilege(app.oid, r.oid, 'DELETE, TRUNCATE, TRIGGER')
            OR has_any_column_privilege(app.oid, r.oid, 'SELECT, INSERT, UPDATE, REFERENCES'))),
-- And the partitions and children of it.
family AS (
    SELECT oid FROM touched
    UNION SELECT inhrelid FROM pg_inherits JOIN family ON inhparent = oid),
policies AS (
    SELECT p.*, format('%I on %s', polname, name) AS policy, rule, qual, CASE
            WHEN polwithcheck::text = polqual::text THEN qual
            ELSE pg_get_expr(polwithcheck, polrelid) END AS checked,
        polroles && ARRAY[app.oid, 0::oid] AS bind
    FROM touched t JOIN pg_policy p ON polrelid = t.oid, app,
        LATERAL (SELECT pg_get_expr(polqual, polrelid) OFFSET 0) q (qual),
        concat('(', CASE name WHEN 'public.users' THEN 'id ' ELSE 'user_id ' END, $2::text) rule),
stored AS (
    SELECT t.*, NOT ours AND oid IN (SELECT polrelid FROM policies WHERE bind AND polpermissive
            AND polname = 'todo_db_shared' AND polcmd = 'r' AND qual = 'true')
        -- It would show the rows of a child without the child's fence.
        AND NOT EXISTS (SELECT FROM pg_inherits JOIN policies c ON c.polrelid = inhrelid
            WHERE inhparent = t.oid AND NOT polpermissive) AS shared,
        CASE
            WHEN relkind = 'f' THEN 'it is a foreign table, which can have none: REVOKE ALL ON '
                || name || ' FROM todo_app, PUBLIC'
            WHEN ours THEN 'ALTER TABLE ' || name || ' FORCE ROW LEVEL SECURITY'
                || CASE WHEN NOT relrowsecurity THEN ', ENABLE ROW LEVEL SECURITY' ELSE '' END
            ELSE format('op.fence%s with its columns in a migration, or op.share%1$s if every'
                ' user may read every row', named) END AS fence
    FROM touched t
    WHERE relkind IN ('r', 'p', 'f') AND name <> 'public.todo_db_version' AND NOT auths),
owned AS (
    SELECT s.*, attnum AS owner, attname, name = 'public.users' AS of_users,
        attnotnull AND atttypid = 'text'::regtype
            AND (SELECT collisdeterministic FROM pg_collation c WHERE c.oid = attcollation)
            AS named_by_text, pg_index.indkey::int2[] AS primary_key
    FROM stored s LEFT JOIN pg_attribute ON attrelid = s.oid
        AND attname = CASE name WHEN 'public.users' THEN 'id' ELSE 'user_id' END
        LEFT JOIN pg_index ON indrelid = s.oid AND indisprimary
    WHERE NOT shared),
columns AS (
    SELECT o.oid, o.name, ours, a.attnum, a.attname, attidentity <> '' AS numbered,
        a.attnum = owner OR a.attnum = ANY (primary_key) AS fixed,
        (attnotnull OR typnotnull) AND NOT atthasdef AND attidentity = '' AS required
    FROM owned o JOIN pg_attribute a ON attrelid = o.oid AND a.attnum > 0
        JOIN pg_type t ON t.oid = a.atttypid),
keys AS (
    SELECT k.*, format('%I on %s', conname, o.name) AS key, o.name, owner,
        r.name = 'public.users' AS to_users, r.name AS target, r.named,
        confrelid IN (SELECT oid FROM stored WHERE shared) AS to_shared,
        theirs.attnum IS NOT NULL AS to_owned,
        confkey[array_position(conkey, owner)] = theirs.attnum IS TRUE AS carries,
        EXISTS (SELECT FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY (conkey)
            AND NOT attnotnull) AS nullable
    FROM owned o JOIN pg_constraint k ON conrelid = o.oid
        -- A key to a partitioned table has copies for its partitions.
        AND NOT EXISTS (SELECT FROM pg_constraint c
            WHERE c.oid = k.conparentid AND c.conrelid = k.conrelid)
        JOIN relations r ON r.oid = confrelid
        LEFT JOIN pg_attribute theirs ON theirs.attrelid = confrelid AND theirs.attname =
            CASE r.name WHEN 'public.users' THEN 'id' ELSE 'user_id' END
    WHERE named_by_text),
-- Those that do not hold for each user apart.
uniques AS MATERIALIZED (
    SELECT indexrelid, indrelid, name, key
    FROM owned o JOIN pg_index ON indrelid = o.oid AND (indisunique OR indisexclusion),
        LATERAL (SELECT (indkey::int2[])[0:indnkeyatts - 1]) c (key)
    WHERE NOT of_users AND named_by_text AND NOT (owner = ANY (key)
        AND (NOT indisexclusion OR EXISTS (SELECT FROM pg_constraint k JOIN pg_operator e
            ON e.oid = conexclop[array_position(key, owner)]
            WHERE conindid = indexrelid AND oprname = '=')))),
functions AS (
    SELECT p.*, p.oid::regprocedure::text AS name FROM pg_proc p JOIN spaces n ON n.oid = pronamespace
    WHERE NOT EXISTS (SELECT FROM pg_depend
        WHERE classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'e')),
-- Wherever an expression calls a function, PostgreSQL asks for EXECUTE; for USAGE of its schema only
-- where a statement names it, and not where a view, a default, a domain or an operator calls it. It
-- asks nothing for a trigger, and the owner of an aggregate for what that calls.
calls AS (
    SELECT classid, objid, refobjid AS function
    FROM pg_depend WHERE refclassid = 'pg_proc'::regclass),
reached AS (
    SELECT f.* FROM functions f, app
    WHERE prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
            AND has_function_privilege(app.oid, f.oid, 'EXECUTE')
            AND (has_schema_privilege(app.oid, pronamespace, 'USAGE')
                OR f.oid IN (SELECT function FROM calls))
        OR f.oid IN (SELECT function FROM calls JOIN pg_proc a ON a.oid = objid
            WHERE classid = 'pg_proc'::regclass AND prokind = 'a'
                AND has_function_privilege(app.oid, a.oid, 'EXECUTE'))
        OR f.oid IN (SELECT tgfoid FROM pg_trigger WHERE tgrelid IN (
            SELECT oid FROM family UNION ALL SELECT oid FROM relations WHERE auths))),
-- Each right that somebody granted, without those that PostgreSQL grants from the beginning.
granted AS (
    SELECT kind, object, (a).grantee, (a).privilege_type AS privilege, (a).is_grantable, system,
        CASE kind WHEN 'relation' THEN object::regclass::text
            WHEN 'column' THEN format('%I on %s', (SELECT attname FROM pg_attribute
                WHERE attrelid = object AND attnum = part), object::regclass)
            WHEN 'routine' THEN object::regprocedure::text
            ELSE format('SCHEMA %s', object::regnamespace) END AS place
    FROM (SELECT o.*, aclexplode(acl) AS a, space = 'pg_catalog'::regnamespace OR EXISTS (
            SELECT FROM pg_init_privs WHERE privtype = 'e' AND objoid = object AND classoid = class)
            AS system FROM (
        SELECT 'relation', 'pg_class'::regclass, oid, 0, relnamespace, relacl
        FROM pg_class WHERE relkind <> 'S'
        UNION ALL SELECT 'column', 'pg_class'::regclass, attrelid, attnum, relnamespace, attacl
        FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
        UNION ALL SELECT 'routine', 'pg_proc'::regclass, oid, 0, pronamespace, proacl FROM pg_proc
        UNION ALL SELECT 'schema', 'pg_namespace'::regclass, oid, 0, oid, nspacl FROM spaces
    ) o (kind, class, object, part, space, acl)) e
    WHERE (a).grantee IN (SELECT oid FROM app UNION ALL SELECT 0)
        -- A routine without rights of its own is PUBLIC's.
        AND NOT (kind = 'routine' AND (a).grantee = 0 AND object NOT IN (
            SELECT objoid FROM pg_init_privs WHERE classoid = 'pg_proc'::regclass))
        AND (class::oid, object, part, (a).grantee, (a).privilege_type) NOT IN (
            SELECT classoid, objoid, objsubid, i.grantee, i.privilege_type
            FROM pg_init_privs, aclexplode(initprivs) i)),
found (code, subject, problem, remedy) AS (

-- Roles
SELECT 'role-bypasses', rolname::text,
    'it passes row-level security: it is a superuser, or has BYPASSRLS, REPLICATION or CREATEROLE',
    'ALTER ROLE todo_app NOSUPERUSER NOBYPASSRLS NOREPLICATION NOCREATEROLE'
FROM role WHERE oid IN (SELECT oid FROM privileged)

UNION ALL SELECT 'role-member', r.oid::regrole::text,
    'todo_app is a member of it: what it may see, bypass or do, transactions can too',
    format('REVOKE %s FROM todo_app', r.oid::regrole)
FROM pg_roles r, app WHERE r.oid <> app.oid AND pg_has_role(app.oid, r.oid, 'MEMBER')

UNION ALL SELECT 'role-owns', name,
    'todo_app owns it, and can take its row-level security away or change what it does',
    format('ALTER %s %s OWNER TO the role that migrates', kind, name)
FROM (
    SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW'
        WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END, name, relowner FROM relations r
    -- The sequence of a column changes its owner with the table.
    WHERE NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass
        AND objid = r.oid AND deptype IN ('a', 'i') AND relkind = 'S')
    UNION ALL SELECT 'ROUTINE', name, proowner FROM functions
) o (kind, name, owner), app WHERE pg_has_role(app.oid, owner, 'MEMBER')

UNION ALL SELECT 'login-bypasses', session_user::text,
    'transactions are fenced all the same, but injected SQL could step back to this login, and it'
    ' bypasses or controls row-level security',
    'make a login of its own: todo-db login todo_login, and connect with the URL that it prints'
WHERE EXISTS (
    SELECT FROM pg_roles r WHERE pg_has_role(session_user, r.oid, 'MEMBER')
        AND r.oid IN (SELECT oid FROM unbound)
        AND (r.rolname = session_user OR NOT EXISTS (
            SELECT FROM role WHERE pg_has_role(role.oid, r.oid, 'MEMBER'))))

UNION ALL SELECT 'login-not-member', session_user::text,
    'it may not become todo_app, so no transaction can begin',
    format('GRANT todo_app TO %I', session_user)
FROM role, modern WHERE NOT pg_has_role(
    session_user, role.oid, CASE WHEN yes THEN 'SET' ELSE 'MEMBER' END)

UNION ALL SELECT 'login-auth', login,
    'it is a member of todo_auth: injected SQL could read every user, session and password',
    format('REVOKE todo_auth FROM %I; Better Auth connects as a login of its own', login)
FROM authenticating

UNION ALL SELECT 'login-member', r.oid::regrole::text,
    'the login is a member of it: injected SQL could step over to what it may do',
    format('REVOKE %s FROM the login', r.oid::regrole)
FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid JOIN login ON login.oid = m.member
WHERE r.rolname <> 'todo_app'
    AND NOT EXISTS (SELECT FROM unbound WHERE oid IN (login.oid, r.oid))
    AND NOT (r.rolname = 'todo_auth' AND EXISTS (SELECT FROM authenticating))

UNION ALL SELECT DISTINCT 'login-granted', place,
    'the login has a right of its own on it: injected SQL has it too, and a call of one round trip',
    format('REVOKE ALL ON it FROM %I, or ALTER it: todo_app has what the application needs', rolname)
FROM (
    SELECT refobjid, pg_describe_object(classid, objid, objsubid)
    FROM pg_shdepend JOIN pg_database d ON d.oid = dbid
    WHERE datname = current_database() AND refclassid = 'pg_authid'::regclass
    UNION ALL SELECT grantee, format('database %I', datname)
    FROM pg_database, aclexplode(datacl)
    WHERE datname = current_database() AND privilege_type <> 'CONNECT') g (grantee, place)
    JOIN login ON login.oid = grantee
WHERE grantee NOT IN (SELECT oid FROM unbound) AND rolname <> 'todo_app'

UNION ALL SELECT 'owner-blind', name,
    'its owner neither bypasses nor escapes row-level security: backfills and dumps see no row',
    format('ALTER TABLE %s OWNER TO a role with BYPASSRLS that the application does not connect as',
        name)
FROM stored JOIN pg_roles r ON r.oid = relowner
WHERE relforcerowsecurity AND NOT (rolsuper OR rolbypassrls)

-- Row-level security
UNION ALL SELECT 'rls-disabled', name,
    'todo_app may use it, and it has no row-level security: every user sees every row', fence
FROM stored WHERE NOT relrowsecurity

UNION ALL SELECT 'rls-not-forced', name, 'its row-level security does not bind its owner', fence
FROM stored WHERE relrowsecurity AND NOT relforcerowsecurity

UNION ALL SELECT 'owner-column', name,
    CASE WHEN owner IS NULL THEN 'nothing names the user whose row it is: it has no ' || CASE
        WHEN of_users THEN 'id' ELSE 'user_id' END
        ELSE attname || ' is not exactly text NOT NULL with a deterministic collation: a row could'
        ' be nobody''s, or several users'''
    END,
    format('derive its class from Owned, or op.share%s if every user may read every row', named)
FROM owned WHERE named_by_text IS NOT TRUE

UNION ALL SELECT 'policy-missing', name, 'no policy lets todo_app see a row',
    CASE WHEN ours THEN 'create the policy again as the migration does' ELSE fence END
FROM stored WHERE relrowsecurity
    AND oid NOT IN (SELECT polrelid FROM policies WHERE polpermissive AND bind)

UNION ALL SELECT 'policy-fence-missing', name,
    'it has no RESTRICTIVE policy FOR ALL that is exactly the rule: a permissive one opens it',
    CASE WHEN ours THEN 'create the policy again as the migration does' ELSE fence END
FROM owned WHERE relrowsecurity AND owner IS NOT NULL
    AND oid IN (SELECT polrelid FROM policies WHERE polpermissive AND bind)
    AND oid NOT IN (SELECT polrelid FROM policies WHERE NOT polpermissive AND bind
        AND polcmd = '*' AND qual = rule AND coalesce(checked, rule) = rule)

UNION ALL SELECT 'policy-open', policy,
    'it is neither the rule nor the rule AND something else: only the fence keeps other users out',
    format('DROP POLICY %s, and %s', policy, CASE WHEN ours
        THEN 'create it again as the migration does if one made it' ELSE fence END)
FROM owned o JOIN policies p ON polrelid = o.oid, unnest(ARRAY[qual, checked]) given
WHERE polpermissive AND bind AND owner IS NOT NULL
    AND NOT (given = rule OR starts_with(given, '(' || rule || ' AND '))
GROUP BY policy, ours, fence

UNION ALL SELECT 'policy-public', policy,
    'it binds PUBLIC, not todo_app alone: it gives rows to every role with a grant',
    format('ALTER POLICY %s TO todo_app', policy)
FROM policies WHERE polpermissive AND 0 = ANY (polroles)

UNION ALL SELECT 'policy-helper', policy,
    format('it calls %s, which may see every row: PostgreSQL can call it before the fence',
        string_agg(pg_describe_object(refclassid, refobjid, 0), ', ')),
    'ALTER POLICY with what the function says written out, or drop the policy'
FROM policies p JOIN pg_depend ON classid = 'pg_policy'::regclass AND objid = p.oid
WHERE refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass) GROUP BY policy

-- Keys: PostgreSQL checks them without row-level security
UNION ALL SELECT 'foreign-key-crossing', key,
    CASE WHEN to_users THEN 'it tells a user which other users there are'
        ELSE format('it accepts another user''s row of %s, and tells which ids exist', target) END,
    CASE WHEN to_users THEN 'leave the foreign key out'
        WHEN to_owned THEN 'owned_reference(…) in the class: FOREIGN KEY (user_id, …) REFERENCES '
            || target || ' (user_id, …)'
        ELSE format('op.share%s if every user may read it; or leave the foreign key out', named) END
FROM keys WHERE NOT carries AND NOT to_shared AND NOT EXISTS (
    -- Only columns that a user may write let that user try values.
    SELECT FROM unnest(conkey) part, app
    WHERE NOT has_column_privilege(app.oid, conrelid, part, 'INSERT, UPDATE'))

UNION ALL SELECT 'foreign-key-weak', key,
    CASE WHEN NOT convalidated THEN 'it is not validated: rows from before may break it'
        WHEN to_users THEN 'it does not cascade: a user with rows cannot be deleted'
        ELSE 'it would take the user away from the row: the other row cannot be deleted' END,
    CASE WHEN NOT convalidated THEN 'VALIDATE CONSTRAINT'
        WHEN to_users THEN 'add it again with ON DELETE CASCADE'
        ELSE 'add it again with ON DELETE SET NULL (the other column), as owned_reference does' END
FROM keys WHERE NOT convalidated OR to_users AND carries AND confdeltype <> 'c'
    OR confdeltype IN ('n', 'd') AND owner = ANY (coalesce(confdelsetcols, conkey))

UNION ALL SELECT 'foreign-key-missing', name,
    'its rows outlive their user, and belong to the next user with the same id',
    format('ALTER TABLE %s ADD FOREIGN KEY (user_id) REFERENCES public.users ON DELETE CASCADE',
        name)
FROM owned WHERE NOT of_users AND named_by_text AND relkind <> 'f' AND oid NOT IN (
    SELECT conrelid FROM keys WHERE carries AND (to_users OR confdeltype = 'c' AND NOT nullable))

UNION ALL SELECT 'unique-crossing', format('%s on %s', relname, name),
    'it holds for all users together: an error tells a user which values others have',
    'put user_id into the key: UNIQUE (user_id, …), compared by ='
FROM uniques JOIN pg_class i ON i.oid = indexrelid, app
-- A grant on an identity is found below.
WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE attrelid = indrelid AND attnum = ANY (key)
    AND (attidentity <> '' OR NOT has_column_privilege(app.oid, indrelid, attnum, 'INSERT, UPDATE')))

-- Objects that change whose rights apply
UNION ALL SELECT 'function-definer', name,
    'todo_app may call it, or a trigger does, and it runs with its owner''s rights',
    format('REVOKE EXECUTE ON ROUTINE %s FROM PUBLIC, todo_app; or ALTER it to SECURITY INVOKER',
        name)
-- The body of find_credential is compared as a whole.
FROM reached WHERE prosecdef AND name <> 'public.find_credential(text,text)'

UNION ALL SELECT 'function-leakproof', name,
    'PostgreSQL may call it with the rows of every user, before the fence',
    format('ALTER ROUTINE %s NOT LEAKPROOF', name)
FROM reached WHERE proleakproof

UNION ALL SELECT 'credential-owner', f.name,
    CASE WHEN rolsuper THEN 'its owner is a superuser: it runs with every right there is'
        ELSE 'its owner does not own the table sessions or jwks: it finds nobody' END,
    format('ALTER FUNCTION %s OWNER TO the role that migrates, which is no superuser', f.name)
FROM functions f JOIN pg_roles r ON r.oid = proowner
WHERE f.name = 'public.find_credential(text,text)' AND (rolsuper OR EXISTS (
    SELECT FROM relations WHERE auths AND relname IN ('sessions', 'jwks')
        AND NOT pg_has_role(proowner, relowner, 'USAGE')))

UNION ALL SELECT 'view-owner-rights', name, 'todo_app may use it, and it shows what its owner may see',
    format('ALTER VIEW %s SET (security_invoker = true)', name)
FROM touched WHERE relkind = 'v' AND NOT EXISTS (SELECT FROM pg_options_to_table(reloptions)
    WHERE option_name = 'security_invoker' AND option_value::boolean)

UNION ALL SELECT 'view-materialized', name,
    'todo_app may read it, and it can have no row-level security',
    format('REVOKE ALL ON %s FROM PUBLIC, todo_app', name)
FROM touched WHERE relkind = 'm'

UNION ALL SELECT 'rule-rewrites', format('%I on %s', rulename, name),
    'statements become other ones, which run with the rights of its owner',
    format('DROP RULE %I ON %s', rulename, name)
FROM (SELECT oid, name FROM touched UNION SELECT oid, name FROM relations WHERE auths) t
    JOIN pg_rewrite ON ev_class = t.oid WHERE ev_type <> '1'

-- Grants
UNION ALL SELECT 'grant-column', format('%s (%I) on %s', way, attname, name),
    'todo_app may write what says whose row it is, or which one',
    CASE WHEN ours THEN format('REVOKE %s ON its table FROM PUBLIC, todo_app; grant the columns of'
        ' its migration again', way)
        ELSE format('leave it out of the columns of op.fence; REVOKE %s (%I) ON %s FROM todo_app',
            way, attname, name) END
FROM columns c, app, (VALUES ('INSERT'), ('UPDATE')) w (way)
WHERE (numbered OR fixed AND way = 'UPDATE') AND has_column_privilege(app.oid, c.oid, attnum, way)

UNION ALL SELECT 'grant-table', name,
    'todo_app may TRUNCATE it, refer to it, maintain it or put triggers on it, which no policy stops',
    format('REVOKE TRUNCATE, REFERENCES, TRIGGER ON %s FROM PUBLIC, todo_app (MAINTAIN too, from'
        ' PostgreSQL 17 on)', name)
FROM touched t, app WHERE NOT auths AND (has_table_privilege(app.oid, t.oid, 'TRUNCATE, TRIGGER')
    OR has_any_column_privilege(app.oid, t.oid, 'REFERENCES')
    OR EXISTS (SELECT FROM granted WHERE object = t.oid AND privilege = 'MAINTAIN'))

UNION ALL SELECT 'grant-shared', name, 'every user may read it, and todo_app may write it',
    format('REVOKE INSERT, UPDATE, DELETE ON %s FROM PUBLIC, todo_app', name)
FROM stored s, app WHERE shared AND (has_any_column_privilege(app.oid, s.oid, 'INSERT, UPDATE')
    OR has_table_privilege(app.oid, s.oid, 'DELETE'))

UNION ALL SELECT 'grant-public', name, 'it is granted to PUBLIC, which every login is',
    format('REVOKE ALL ON %s FROM PUBLIC; %s', name,
        CASE WHEN ours THEN 'todo_app has its own grants' ELSE fence END)
FROM (SELECT oid, name, ours, fence FROM stored UNION ALL
    SELECT oid, name, false, 'GRANT SELECT ON ' || name || ' TO todo_app' FROM touched
    WHERE relkind = 'v') t
WHERE EXISTS (SELECT FROM granted WHERE object = t.oid AND grantee = 0)

UNION ALL SELECT DISTINCT 'grant-option', place, 'todo_app may grant it to others',
    'REVOKE GRANT OPTION FOR … FROM todo_app'
FROM granted WHERE is_grantable

UNION ALL SELECT DISTINCT 'grant-system', place,
    'PostgreSQL or an extension gave no such right on it to todo_app: somebody granted it',
    'REVOKE ALL ON it FROM PUBLIC, todo_app'
FROM granted WHERE system

UNION ALL SELECT 'grant-parameter', parname::text,
    'todo_app or the login may set it, as otherwise only a superuser may',
    format('REVOKE ALL ON PARAMETER %s FROM PUBLIC, todo_app and the login', parname)
FROM pg_parameter_acl JOIN pg_settings ON name = parname
WHERE context <> 'user' AND EXISTS (
    SELECT FROM (SELECT oid FROM app UNION ALL SELECT oid FROM login WHERE NOT rolsuper) r
    WHERE has_parameter_privilege(r.oid, parname, 'SET, ALTER SYSTEM'))

UNION ALL SELECT 'grant-auth', name, 'todo_app may touch it, and sign-ins are only Better Auth''s to read',
    format('REVOKE ALL ON %s FROM PUBLIC, todo_app', name)
FROM touched WHERE auths

UNION ALL SELECT 'grant-sequence', name,
    'todo_app may read or set it: ids tell how many there are, or come again',
    format('REVOKE ALL ON SEQUENCE %s FROM PUBLIC, todo_app; Identity(always=True) needs no right',
        name)
FROM relations r, app WHERE NOT pg_has_role(app.oid, relowner, 'MEMBER') AND CASE
    WHEN relkind = 'S' THEN has_sequence_privilege(app.oid, r.oid, 'USAGE, SELECT, UPDATE') END

UNION ALL SELECT 'grant-large-objects', quote_ident(current_database()),
    'todo_app may read some of its large objects, which have no row-level security: so may every user',
    'keep their data as bytea in a table with a fence, and lo_unlink them'
FROM app WHERE EXISTS (
    SELECT FROM pg_largeobject_metadata
    WHERE pg_has_role(app.oid, lomowner, 'MEMBER') OR current_setting('lo_compat_privileges') = 'on'
        OR EXISTS (SELECT FROM aclexplode(lomacl) WHERE grantee IN (0, app.oid)))

UNION ALL SELECT 'grant-version', name,
    'todo_app may change which migrations are said to have run',
    format('REVOKE INSERT, UPDATE, DELETE ON %s FROM PUBLIC, todo_app', name)
FROM touched t, app WHERE name = 'public.todo_db_version'
    AND (has_any_column_privilege(app.oid, t.oid, 'INSERT, UPDATE')
        OR has_table_privilege(app.oid, t.oid, 'DELETE'))

UNION ALL SELECT 'grant-temporary', quote_ident(current_database()),
    'todo_app may make a temporary table that hides a real one from the connection''s next user',
    format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC, todo_app', current_database())
FROM app WHERE has_database_privilege(app.oid, current_database(), 'TEMPORARY')

UNION ALL SELECT 'grant-create', place, 'todo_app may make objects in it',
    format('REVOKE CREATE ON %s FROM PUBLIC, todo_app', place)
FROM (
    SELECT format('SCHEMA %I', nspname) FROM spaces n, app
    WHERE has_schema_privilege(app.oid, n.oid, 'CREATE')
    UNION ALL SELECT format('DATABASE %I', current_database()) FROM app
    WHERE has_database_privilege(app.oid, current_database(), 'CREATE')) c (place)

UNION ALL SELECT DISTINCT 'grant-default', defaclrole::regrole::text,
    'every table that this role makes is open to todo_app before it has row-level security',
    format('ALTER DEFAULT PRIVILEGES FOR ROLE %s REVOKE ALL ON TABLES FROM PUBLIC, todo_app',
        defaclrole::regrole)
FROM pg_default_acl, aclexplode(defaclacl) a
WHERE defaclobjtype = 'r' AND a.grantee IN (SELECT oid FROM app UNION ALL SELECT 0)

-- What the tables promise
UNION ALL SELECT 'column-required', format('%I on %s', attname, name),
    'our INSERT does not know it, and it is NOT NULL without a default: no row can be stored',
    format('ALTER TABLE %s ALTER %I SET DEFAULT …, or DROP NOT NULL', name, attname)
FROM columns WHERE ours AND required AND NOT format('%s.%s', name, attname) = ANY ($1::text[])

UNION ALL SELECT 'sequence-unusable', s.name,
    format('todo_app may not use it, so it cannot insert into %s', o.name),
    'Identity(always=True) instead of SERIAL: it needs no right on its sequence'
FROM owned o JOIN pg_attrdef d ON adrelid = o.oid
    JOIN pg_depend p ON classid = 'pg_attrdef'::regclass AND objid = d.oid
    JOIN relations s ON s.oid = refobjid, app
WHERE refclassid = 'pg_class'::regclass AND has_any_column_privilege(app.oid, o.oid, 'INSERT')
    AND CASE WHEN s.relkind = 'S' THEN
        NOT has_sequence_privilege(app.oid, s.oid, 'USAGE, UPDATE') END

UNION ALL SELECT 'trigger-missing', name, 'nothing moves its updated_at: a stale change is not noticed',
    CASE WHEN ours THEN 'create the trigger again as the migration does'
        ELSE 'touch=True in its op.fence, in a migration' END
FROM owned o, app WHERE has_any_column_privilege(app.oid, o.oid, 'UPDATE')
    AND o.oid IN (SELECT c.oid FROM columns c WHERE c.attname = 'updated_at'
        AND NOT has_column_privilege(app.oid, c.oid, attnum, 'UPDATE'))
    -- Before each row of every UPDATE, by a function that writes or is given the name.
    AND o.oid NOT IN (SELECT tgrelid FROM pg_trigger JOIN pg_proc f ON f.oid = tgfoid
        WHERE tgtype & 19 = 19 AND tgattr::text = '' AND concat(prosrc, encode(tgargs, 'escape')) ~ 'updated_at')

UNION ALL SELECT DISTINCT 'trigger-disabled', name,
    'a trigger of it is disabled: updated_at or a foreign key is not kept',
    format('ALTER TABLE %s ENABLE TRIGGER ALL (a superuser, where it is the foreign key''s)', name)
FROM (SELECT oid, name FROM stored UNION SELECT oid, name FROM relations WHERE auths) r
    JOIN pg_trigger ON tgrelid = r.oid WHERE tgenabled NOT IN ('O', 'A')

-- Settings
UNION ALL SELECT 'trigger-silenced', name,
    'it is not origin: no trigger and no foreign key is kept, on any table',
    format('ALTER DATABASE … (or the ROLE) RESET %s', name)
FROM pg_settings WHERE name = 'session_replication_role' AND setting <> 'origin'

UNION ALL SELECT 'row-security-off', name,
    'it is off: every statement on a table with row-level security fails',
    format('ALTER DATABASE … (or the ROLE) RESET %s', name)
FROM pg_settings WHERE name = 'row_security' AND setting <> 'on'

UNION ALL SELECT 'durability-weakened', name,
    'it is off: what was committed may be lost, or the whole database with it',
    format('ALTER SYSTEM (or the DATABASE, or the ROLE) SET %s = on', name)
FROM pg_settings
WHERE setting = 'off' AND name IN ('fsync', 'full_page_writes', 'synchronous_commit')

UNION ALL SELECT DISTINCT 'user-preset', place,
    'its settings name a user: a connection without a user would be that one',
    format('ALTER … %s RESET todo_db.user_id', place)
FROM pg_db_role_setting LEFT JOIN pg_database d ON d.oid = setdatabase, unnest(setconfig) s,
    concat_ws(' ', 'ROLE ' || nullif(setrole, 0)::regrole, 'DATABASE ' || quote_ident(datname))
        place
WHERE s ^@ 'todo_db.user_id=' AND (datname IS NULL OR datname = current_database())

-- Migrations
UNION ALL SELECT 'migrations-missing', wanted, 'it is not there: the database is not migrated',
    'todo-db migrate'
FROM (
    SELECT wanted FROM unnest(ARRAY['todo_db_version', 'tasks', 'users']) wanted
    WHERE NOT EXISTS (SELECT FROM relations WHERE name = 'public.' || wanted)
    UNION ALL SELECT 'todo_app' WHERE NOT EXISTS (SELECT FROM role)) m

UNION ALL SELECT 'migrations-unreadable', name,
    'todo_app may not read it, so it cannot tell which migrations have run',
    format('GRANT USAGE ON SCHEMA public TO todo_app; GRANT SELECT ON %s TO todo_app', name)
FROM relations r, role WHERE name = 'public.todo_db_version'
    AND NOT (has_table_privilege(role.oid, r.oid, 'SELECT')
        AND has_schema_privilege(role.oid, relnamespace, 'USAGE'))
)
SELECT DISTINCT code, subject, problem, remedy FROM found
