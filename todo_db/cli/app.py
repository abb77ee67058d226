"""The commands. Messages go to standard error, results to standard output."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from alembic.command import revision as revision_command
from alembic.config import CommandLine
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from pydantic import SecretStr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from todo_db import migrations
from todo_db.cli import demo as story
from todo_db.cli.database_url import FOLDER, database_url, is_embedded
from todo_db.cli.project import create_project
from todo_db.cli.seed import seed as seed_tasks
from todo_db.database import Database
from todo_db.doctor import examine
from todo_db.embedded import EmbeddedPostgres
from todo_db.engine import parse_url
from todo_db.errors import ConfigurationError, TodoDBError, translated
from todo_db.logins import check_name, create_login
from todo_db.records import Health
from todo_db.settings import Settings

app: Final = typer.Typer(
    no_args_is_help=True,
    # Its tracebacks print local variables: URLs, titles, ids.
    pretty_exceptions_enable=False,
)
# Such as in head-1, or +2 of its own.
_STEPS: Final = re.compile(r"[+-]\d+$")
_out: Final = Console()
_messages: Final = Console(stderr=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead, for a program.")]


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer's callback
    if wanted:
        _out.print(f"todo-db {version('todo-db')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """The data layer of a multi-user todo application.

    Without DATABASE_URL, in the environment or .env, commands use a PostgreSQL in .todo-db/.
    """


def _print_json(value: object) -> None:
    _out.print(json.dumps(value, indent=2), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _report_errors() -> Generator[None]:
    """Print an error of the database or of a file as one line, and exit with status 1."""
    try:
        yield
    except CommandError as error:
        line = str(error)
    except OSError as error:
        if error.filename is None:
            # The output, which `main` reports: what happens to a connection is a TodoDBError here.
            raise
        line = f"{error.filename} cannot be used: {error.strerror}"
    except (TodoDBError, SQLAlchemyError) as error:
        failure = translated(error)
        line = f"{type(failure).__name__}: {failure}"
    else:
        return
    # Not wrapped, because it may contain a statement to copy.
    _messages.print(line, style="bold red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


def _check_revisions(*revisions: str) -> None:
    """Refuse a revision that no migration has, before a PostgreSQL is started for it."""
    scripts = ScriptDirectory.from_config(migrations.alembic_config())
    for revision in ":".join(revisions).split(":"):
        if name := _STEPS.sub("", revision):
            scripts.get_revisions(name)


@app.command()
def demo() -> None:
    """Run a demonstration on a fresh PostgreSQL, and check each of its claims."""
    begun = time.perf_counter()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("What is claimed", no_wrap=True)
    table.add_column("What happened")
    details: list[str] = []

    def show(step: story.Step, seen: str, held: bool) -> None:  # noqa: FBT001
        mark = Text("✓", style="green") if held else Text("✗", style="bold red")
        line, _, detail = seen.partition("\n")
        table.add_row(mark, step.claim, Text(line))
        details.append(detail)

    with _report_errors():
        # The steps read them again: say what is wrong before a PostgreSQL starts.
        Settings()
    with (
        _report_errors(),
        tempfile.TemporaryDirectory(prefix="todo-db-") as folder,
        _messages.status("Starting a temporary PostgreSQL …"),
        EmbeddedPostgres(Path(folder) / "postgres") as server,
    ):
        good = asyncio.run(story.play(server, show))
    _out.print(table)
    _out.print(Text("\n".join(filter(None, details)), style="dim"))
    seconds = time.perf_counter() - begun
    if not good:
        _messages.print("At least one claim is false.", style="bold red")
        raise typer.Exit(1)
    _out.print(f"\nAll claims are true. This took {seconds:.1f} s, with the start of PostgreSQL.")


@app.command()
def migrate(
    revision: Annotated[str, typer.Argument(help="Target revision.")] = "head",
    *,
    as_json: _Json = False,
) -> None:
    """Migrate the database, to the newest revision by default."""
    with _report_errors():
        _check_revisions(revision)
        with database_url(_messages, direct=True) as url:
            place = asyncio.run(migrations.upgrade(url, revision))
    if as_json:
        _print_json({"revision": place})
    _messages.print(f"Migrated: the database is at {place}.", style="green", highlight=False)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def alembic(context: typer.Context) -> None:
    """Run any Alembic command on the schema, such as `current` or `downgrade -1`."""
    line = CommandLine(prog="todo-db alembic")
    options = line.parser.parse_args(context.args)
    if not hasattr(options, "cmd"):
        line.parser.print_help()
        raise typer.Exit(2)
    with _report_errors(), ExitStack() as stack:
        if options.config:
            raise CommandError(
                "todo-db alembic has its own configuration: for yours, run alembic itself"
            )
        _check_revisions(getattr(options, "revision", ""), *getattr(options, "revisions", ()))
        # Only a command that connects calls this, which may start a PostgreSQL.
        config = migrations.alembic_config(
            lambda: stack.enter_context(database_url(_messages, direct=True))
        )
        # Otherwise Alembic prints an error twice, and exits with 255.
        options.raiseerr = True
        if options.cmd[0] is not revision_command:
            # Otherwise `history` would connect.
            config.set_main_option("revision_environment", "false")
        line.run_cmd(config, options)


@app.command()
def init(
    module: Annotated[str, typer.Argument(help="The module with your Base.")] = "models",
    *,
    folder: Annotated[str, typer.Option(help="Where your migrations go.")] = "migrations",
) -> None:
    """Write what Alembic needs for tables of your own into this folder."""
    with _report_errors():
        for path in create_project(Path(), module, folder):
            _messages.print(f"wrote {path}", markup=False, highlight=False)
    _messages.print(
        "Next, with the owner's URL in DATABASE_URL (todo-db serve prints one):\n"
        '  todo-db migrate\n  alembic revision --autogenerate -m "add labels"\n'
        "  alembic upgrade head",
        style="green",
        highlight=False,
    )


@app.command()
def login(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, underscores.")],
    *,
    role: Annotated[
        Literal["todo_app", "todo_auth"], typer.Option(help="todo_auth is for Better Auth.")
    ] = "todo_app",
    new_password: Annotated[
        bool, typer.Option("--new-password", help="Replace that of a login that exists.")
    ] = False,
) -> None:
    """Create the login of an application, and print its URL once; safe to repeat."""

    async def run(owners: str) -> URL | None:
        return await create_login(owners, Settings(), name, role=role, new_password=new_password)

    with _report_errors():
        check_name(name)
        # The application goes through the pooler, if there is one.
        pooled = Settings().database_url
        place = parse_url(pooled.get_secret_value()) if pooled else None
        with database_url(_messages, direct=True) as owners:
            parsed = (place or parse_url(owners)).libpq_url()
            created = asyncio.run(run(owners))
    if created is None:
        _messages.print(f"{name} exists and keeps its password; its settings are up to date.")
        return
    made = parsed.set(
        username=created.username,
        password=created.password,
        database=parsed.database or created.database,
    )
    if role == "todo_auth" and made.query.get("sslrootcert") == "system":
        # Better Auth's driver would look for a file; without the key it trusts Node's own list.
        made = made.difference_update_query(["sslrootcert"])
    _warn_of_its_end(owners)
    _messages.print("The password is not shown again:", style="green")
    _out.print(_for_libpq(made, hide_password=False), soft_wrap=True, markup=False, highlight=False)


@app.command()
def seed(
    users: Annotated[int, typer.Option(min=1, max=100_000, help="How many users.")] = 2,
    tasks: Annotated[int, typer.Option(min=0, max=10_000_000, help="How many tasks in all.")] = 10,
    *,
    as_json: _Json = False,
) -> None:
    """Store example users and tasks; a second run does not store them again."""

    async def run(url: str) -> int:
        async with Database.from_url(url) as db:
            with Progress(console=_messages) as progress:
                bar = progress.add_task("Tasks", total=tasks)
                return await seed_tasks(
                    db, users, tasks, lambda count: progress.advance(bar, count)
                )

    with _report_errors():
        owners = Settings().direct_database_url
        if owners is not None:
            parse_url(owners.get_secret_value())
        with database_url(_messages) as url:
            asyncio.run(migrations.upgrade(owners.get_secret_value() if owners else url))
            created = asyncio.run(run(url))
    if as_json:
        _print_json({"users": users, "tasks": tasks, "created": created})
    else:
        _out.print(f"{users} users and {tasks} tasks are there; {created} tasks are new.")


@app.command()
def health(*, as_json: _Json = False) -> None:
    """Show whether the database answers and is migrated; exit with 1 if not."""

    async def run(url: str) -> Health:
        db = Database.from_url(url)
        try:
            return await db.health(timeout_seconds=10)
        finally:
            await db.close()

    with _report_errors(), database_url(_messages) as url:
        state = asyncio.run(run(url))
    if as_json:
        _print_json(asdict(state))
    else:
        table = Table(show_header=False)
        for name, value in asdict(state).items():
            table.add_row(name, Text(str(value)))
        _out.print(table)
    if not state.ok:
        raise typer.Exit(1)


@app.command()
def doctor(*, as_json: _Json = False) -> None:
    """Find every known weakness of the database, the URL and the role; exit with 1 if any."""
    with _report_errors(), database_url(_messages) as url:
        report = asyncio.run(examine(Settings(database_url=SecretStr(url))))
    if as_json:
        _print_json(asdict(report))
        raise typer.Exit(bool(report.findings))
    about = Table(show_header=False)
    about.add_row("server", f"PostgreSQL {report.server_version}")
    about.add_row("migration", report.revision or "unknown")
    about.add_row("endpoint", report.endpoint)
    about.add_row("line", report.line)
    about.add_row("credentials", Text(report.credentials))
    _out.print(about)
    if not report.findings:
        _out.print("No weakness was found: users are isolated, and commits are durable.")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("What was found", no_wrap=True)
    table.add_column("Where, why it matters, and what to do")
    for finding in report.findings:
        why = f"{finding.subject}\n", finding.problem, (f"\n{finding.remedy}\n", "green")
        table.add_row(Text(finding.code, style="bold red"), Text.assemble(*why))
    _out.print(table)
    raise typer.Exit(1)


def _warn_of_its_end(url: str) -> None:
    if is_embedded(url):
        _messages.print("This PostgreSQL runs while a command uses it: keep todo-db serve running.")


def _for_libpq(url: URL, *, hide_password: bool) -> str:
    """Return a URL as libpq reads it: a raw blank is an error there, and a + is a plus."""
    place, mark, query = url.render_as_string(hide_password=hide_password).partition("?")
    return f"{place.replace(' ', '%20')}{mark}{query.replace('+', '%20')}"


@app.command()
def url(
    *,
    show_password: Annotated[
        bool, typer.Option("--show-password", help="Print the password too.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Print the URL of the database in the form that psql accepts."""
    with _report_errors(), database_url(_messages) as found:
        shown = _for_libpq(parse_url(found).libpq_url(), hide_password=not show_password)
        _warn_of_its_end(found)
    if as_json:
        _print_json({"url": shown})
    else:
        _out.print(shown, soft_wrap=True, markup=False, highlight=False)


def _leave_to_psql(_number: int, _frame: object) -> None:
    """Do nothing about a signal that psql gets as well."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def psql(context: typer.Context) -> None:
    r"""Run psql on the database, for example: todo-db psql -c '\d tasks'."""
    with _report_errors(), database_url(_messages) as found:
        endpoint = parse_url(found)
        parsed = endpoint.libpq_url()
        # The psql of the wheel was built without TLS.
        program = shutil.which("psql") if endpoint.demands_tls else EmbeddedPostgres.program("psql")
        if program is None:
            raise ConfigurationError("the database URL demands TLS: install PostgreSQL's own psql")
        # Every user of the machine can see the arguments of a process, but not its environment.
        secret = {"PGPASSWORD": str(parsed.password)} if parsed.password else {}
        public = _for_libpq(parsed._replace(password=None), hide_password=False)
        # Ctrl-C is for psql, which ends a query by it. A handler is not inherited, and SIG_IGN is.
        before = signal.signal(signal.SIGINT, _leave_to_psql)
        try:
            done = subprocess.run(  # noqa: S603  # the user's own command line
                [program, public, *context.args],
                check=False,
                env=os.environ | secret,
            )
        finally:
            signal.signal(signal.SIGINT, before)
    raise typer.Exit(done.returncode)


@app.command()
def serve() -> None:
    """Migrate the embedded PostgreSQL, and keep it running until Ctrl-C."""
    with _report_errors():
        settings = Settings()
        for name in ("database_url", "direct_database_url"):
            found = getattr(settings, name)
            if found is not None and not is_embedded(found.get_secret_value()):
                raise ConfigurationError(
                    f"{name.upper()} names another server: unset it to use the embedded PostgreSQL"
                )
    with ExitStack() as stack:
        with _report_errors():
            owners = stack.enter_context(EmbeddedPostgres(FOLDER)).url()
            asyncio.run(migrations.upgrade(owners))
        # By default these signals end Python without stopping the server.
        stop = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, stop)
        _out.print(f"DATABASE_URL={owners}", soft_wrap=True, markup=False, highlight=False)
        signal.sigwait(stop)
