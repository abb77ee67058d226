# /// script
# requires-python = ">=3.13"
# dependencies = [
#     "advanced-alchemy>=1.12,<2",
#     "django>=6.1,<6.2",
#     "matplotlib>=3.11,<4",
#     "piccolo[postgres]>=1.38,<2",
#     "psycopg[binary,pool]>=3.3,<4",
#     "sqlmodel>=0.0.50",
#     "todo-db[embedded]",
#     "tortoise-orm[asyncpg]>=1.1.9,<2",
#     "uvloop>=0.23,<1",
# ]
#
# [tool.uv.sources]
# todo-db = { path = "..", editable = true }
# ///
"""todo_db beside what else a user would pick: `uv run benchmarks/run.py`.

It starts a PostgreSQL, seeds 200,000 tasks of 1,000 users, and runs the same work by each
contestant, in a fresh process each time, in turn. `--quick` does what is exact: the proof that
each contestant does the work, and its round trips. `--growth` measures todo_db alone, with larger
and larger tables and lists. `--try` does the same work, with so few tasks and calls that the
figures mean nothing.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import growth
import report
from contestants import ROSTER
from server import Server

_HERE: Final = Path(__file__).parent
_PAGE: Final = _HERE.parent / "docs" / "explanation" / "performance.md"
_README: Final = _HERE.parent / "README.md"
_IMAGES: Final = _HERE.parent / "docs" / "images"
_TIMEOUT_SECONDS: Final = 600
_ENVIRONMENT: Final = {
    # Else glibc may give asyncio's buffer of 256 KiB back after each read, or may not: it depends
    # on what else was imported, and doubles the time of the shortest calls.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    # Else each import would be compiled.
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
}


def main() -> None:
    """Read the command line, run, and report."""
    options = _options()
    page, images = (_PAGE, _IMAGES) if options.docs else (None, options.out)
    if options.growth:
        whole = growth.LARGE if options.large else growth.FULL
        growth.measure(page, images, growth.ATTEMPT if options.attempt else whole)
        return
    mode, repeats = ("try", 1) if options.attempt else ("measure", options.rounds)
    users, tasks = (10, 2_000) if options.quick or options.attempt else (1_000, 200_000)
    with Server(users=users, tasks=tasks) as server:
        postgres = asyncio.run(server.version())
        exact = _round("exact", server, options)
        _check(exact)
        rounds = []
        for number in range(0 if options.quick else repeats):
            print(f"round {number + 1} of {repeats}", file=sys.stderr)
            rounds.append(_round(mode, server, options))
    parts = {"trips": report.trips(exact)}
    if rounds:
        found = report.medians(rounds)
        parts |= {
            "where": report.where(postgres, rounds=len(rounds), loop=options.loop),
            "summary": report.summary(found),
            "latency": report.by_call(found, "2 ms", ".1f"),
            "cpu": report.by_call(found, "cpu us", ".0f"),
            "ratios": report.ratios(rounds),
        }
        if images is not None:
            report.charts(found, images)
        if page is not None:
            report.publish({"chart": report.sentence(found)}, _README)
    report.publish(parts, page)
    if options.out is not None:
        (options.out / "results.json").write_text(json.dumps({"exact": exact, "rounds": rounds}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="only what is exact")
    what.add_argument("--growth", action="store_true", help="only todo_db, on larger tables")
    parser.add_argument("--try", action="store_true", dest="attempt", help="only see it work")
    parser.add_argument("--large", action="store_true", help="--growth up to 5 million tasks")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="5 by default")
    parser.add_argument("--only", nargs="+", choices=ROSTER, default=list(ROSTER), metavar="NAME",
                        help=", ".join(ROSTER))  # fmt: skip
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for charts and raw figures")
    parser.add_argument("--docs", action="store_true", help="redraw docs/explanation/performance")
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    return options


def _check(exact: dict[str, dict[str, Any]]) -> None:
    """Stop if a contestant does not keep its promised round trips."""
    for name, found in exact.items():
        promised = ROSTER[name].turns
        if promised is not None and set(found["turns"].values()) != {promised}:
            sys.exit(f"{name} promises {promised} round trips a call: {found['turns']}")


def _round(mode: str, server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run each contestant in a process of its own, and leave the tables as they were."""
    found: dict[str, dict[str, Any]] = {}
    for name in options.only:
        url = server.url(ROSTER[name].login)
        arguments = (mode, name, url, str(server.users), str(server.tasks), options.loop)
        done = subprocess.run(  # noqa: S603  # the file beside this one
            [sys.executable, _HERE / "worker.py", *arguments],
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env=_ENVIRONMENT,
        )
        if done.returncode:
            sys.exit(f"{name} failed")
        asyncio.run(server.clean())
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
