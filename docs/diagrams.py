"""Draws the diagrams of the documentation: `uv run docs/diagrams.py`.

Each is one SVG for light and dark pages. The diagram of the tables is drawn from the models.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from sqlalchemy import Column, Table
from sqlalchemy.dialects.postgresql.base import PGDialect

from todo_db.models import Base

_IMAGES: Final = Path(__file__).resolve().parent / "images"
_STYLE: Final = """
text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .note { font-size: 12px; fill: #59636e }
.code { font: 12px ui-monospace, "DejaVu Sans Mono", monospace }
.panel { fill: #ffffff; stroke: #d1d9e0 } .box { fill: #f6f8fa; stroke: #818b98 }
.fenced { fill: #ddf4ff; stroke: #0969da } .line { fill: none; stroke: #59636e; stroke-width: 1.5 }
.head { fill: #59636e } .life { stroke: #818b98; stroke-dasharray: 3 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .note { fill: #9198a1 }
  .panel { fill: #0d1117; stroke: #3d444d } .box { fill: #151b23; stroke: #656c76 }
  .fenced { fill: #121d2f; stroke: #4493f8 } .line { stroke: #9198a1 }
  .head { fill: #9198a1 } .life { stroke: #656c76 }
}
"""
_DIALECT: Final = PGDialect()  # type: ignore[no-untyped-call]
_ROW: Final = 18
_BOX_WIDTH: Final = 320
# Where the box of each table is: its left edge and its top.
_PLACES: Final = {
    "sessions": (20, 20),
    "accounts": (20, 214),
    "users": (370, 20),
    "verifications": (370, 342),
    "tasks": (720, 20),
    "idempotency_keys": (720, 200),
    "jwks": (720, 342),
}
_FENCED: Final = {"users", "tasks", "idempotency_keys"}


class Drawing:
    """An SVG of boxes, texts and arrows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">'
            ),
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            (
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                'markerHeight="7" orient="auto-start-reverse">'
                '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
            ),
            (
                f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" '
                'rx="8"/>'
            ),
        ]

    def box(self, left: int, top: int, width: int, height: int, kind: str = "box") -> None:
        """Draw a box."""
        self._parts.append(
            f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{height}" rx="6"/>'
        )

    def text(self, x: int, y: int, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write one line; `y` is its base line."""
        self._parts.append(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}" xml:space="preserve">'
            f"{escape(text)}</text>"
        )

    def lines(self, x: int, y: int, lines: Sequence[str], kind: str = "note") -> None:
        """Write lines below each other."""
        for number, line in enumerate(lines):
            self.text(x, y + number * _ROW, line, kind)

    def path(self, points: str, kind: str = "line", *, ends: str = "end") -> None:
        """Draw a line with an arrow head at its `start`, at its `end`, or at none."""
        head = f' marker-{ends}="url(#head)"' if ends else ""
        self._parts.append(f'<path class="{kind}" d="M{points}"{head}/>')

    def write(self, name: str, folder: Path) -> None:
        """Write the file."""
        folder.joinpath(name).write_text("\n".join([*self._parts, "</svg>\n"]))


def architecture(folder: Path) -> None:
    """Draw who connects to the database, and as which role."""
    drawing = Drawing(900, 420, "The components, and the roles that they connect with")
    drawing.box(20, 120, 110, 60)
    drawing.text(75, 155, "Browser", "title", "middle")
    drawing.path("130 150 H170")

    drawing.box(170, 20, 270, 250)
    drawing.text(185, 44, "Your back end (FastAPI)", "title")
    layers = {
        "todo_db.fastapi": "who sent the request",
        "repositories": "each statement names its user",
        "transaction, autocommit": "role and user, sent with it",
        "engine": "a pool for each process",
    }
    for number, (layer, what) in enumerate(layers.items()):
        drawing.box(185, 58 + number * 51, 240, 44, "fenced")
        drawing.text(197, 76 + number * 51, layer, "code")
        drawing.text(197, 94 + number * 51, what, "note")

    drawing.path("440 150 H500")
    drawing.text(470, 140, "TLS", "note", "middle")
    drawing.box(500, 110, 130, 80)
    drawing.lines(515, 138, ["Pooler"], "title")
    drawing.lines(515, 158, ["PgBouncer, Neon", "(optional)"])
    drawing.path("630 150 H680")

    drawing.box(680, 20, 200, 380)
    drawing.text(695, 44, "PostgreSQL 15 to 18", "title")
    drawing.box(695, 58, 170, 150, "fenced")
    drawing.text(707, 80, "role todo_app", "code")
    drawing.lines(
        707, 104, ["row-level security:", "user_id = the user of", "the request, or no row"]
    )
    drawing.text(707, 172, "users, tasks,", "code")
    drawing.text(707, 190, "tables of your own", "code")
    drawing.box(695, 222, 170, 74)
    drawing.text(707, 244, "role todo_auth", "code")
    drawing.lines(707, 264, ["users, sessions,", "accounts; no task"])
    drawing.box(695, 310, 170, 74)
    drawing.text(707, 332, "the owner", "code")
    drawing.lines(707, 352, ["owns the tables;", "serves no request"])

    drawing.box(170, 290, 270, 44)
    drawing.text(185, 317, "Better Auth (Node.js)", "title")
    drawing.path("75 180 V312 H170")
    drawing.path("440 312 H565 V258 H695")
    drawing.box(170, 350, 270, 44)
    drawing.text(185, 377, "todo-db migrate (Alembic)", "title")
    drawing.path("440 372 H640 V346 H695")
    drawing.text(540, 364, "the direct endpoint", "note", "middle")
    drawing.write("architecture.svg", folder)


def round_trips(folder: Path) -> None:
    """Draw a call in a transaction of its own, and in one statement."""
    drawing = Drawing(900, 330, "Three round trips of a transaction, and one of a single call")
    for left, title in ((20, "The owner's login: three"), (460, "A login of todo-db login: one")):
        drawing.text(left, 36, title, "title")
        for x, name in ((left + 30, "client"), (left + 350, "server")):
            drawing.text(x, 66, name, "note", "middle")
            drawing.path(f"{x} 74 V310", "life", ends="")
    trips = {
        "BEGIN; role, user, timeouts": "ready",
        "SELECT … WHERE user_id = $1": "rows",
        "COMMIT": "committed",
    }
    for number, (sent, answer) in enumerate(trips.items()):
        y = 100 + number * 76
        drawing.text(210, y - 6, sent, "code", "middle")
        drawing.path(f"50 {y} H370")
        drawing.text(210, y + 24, answer, "note", "middle")
        drawing.path(f"370 {y + 30} H50")
    drawing.box(500, 84, 300, 100, "fenced")
    drawing.lines(
        512,
        106,
        [
            "WITH result AS MATERIALIZED (",
            "  SELECT … WHERE user_id = $1",
            ") SELECT result.* FROM result",
            "WHERE (SELECT set_config(…, $1, true))",
            "  IS NOT NULL",
        ],
        "code",
    )
    drawing.path("490 206 H810")
    drawing.text(650, 230, "rows, committed", "note", "middle")
    drawing.path("810 236 H490")
    drawing.lines(
        520,
        270,
        [
            "The user is set before the statement inside",
            "starts, so the policies hold for it.",
        ],
    )
    drawing.write("round-trips.svg", folder)


def tables(folder: Path) -> None:
    """Draw the tables of todo_db, and their foreign keys."""
    drawing = Drawing(1060, 560, "The tables of todo_db and their foreign keys")
    for name, (left, top) in _PLACES.items():
        _table(drawing, Base.metadata.tables[name], left, top)
    _, top = _PLACES["users"]
    target = _middle(Base.metadata.tables["users"].c.id, top)
    for name in ("sessions", "accounts", "tasks", "idempotency_keys"):
        left, top = _PLACES[name]
        y = _middle(Base.metadata.tables[name].c.user_id, top)
        start, bend, end = (
            (left + _BOX_WIDTH, 355, 370) if left == 20 else (left, 705, 370 + _BOX_WIDTH)  # noqa: PLR2004
        )
        drawing.path(f"{start} {y} H{bend} V{target} H{end}")
    drawing.box(20, 524, 16, 16, "fenced")
    drawing.text(44, 537, "behind row-level security for todo_app", "note")
    drawing.box(370, 524, 16, 16)
    drawing.text(394, 537, "Better Auth's; todo_app reads none of it", "note")
    drawing.text(720, 537, "PK key · UQ unique · FK → users, cascade", "note")
    drawing.write("tables.svg", folder)


def _table(drawing: Drawing, table: Table, left: int, top: int) -> None:
    height = 32 + len(table.c) * _ROW
    drawing.box(left, top, _BOX_WIDTH, height, "fenced" if table.name in _FENCED else "box")
    drawing.text(left + 10, top + 19, table.name, "title")
    for number, column in enumerate(table.c):
        y = top + 40 + number * _ROW
        marks = [
            "PK" if column.primary_key else "",
            "FK" if column.foreign_keys else "",
            "UQ" if column.unique else "",
        ]
        drawing.text(left + 10, y, " ".join(filter(None, marks)), "note")
        drawing.text(left + 50, y, column.name + ("?" if column.nullable else ""), "code")
        kind = _kind(column)
        drawing.text(left + _BOX_WIDTH - 8, y, kind, "note", "end")


def _middle(column: Column[object], top: int) -> int:
    return top + 36 + list(column.table.c).index(column) * _ROW


def _kind(column: Column[object]) -> str:
    kind = str(column.type.compile(_DIALECT)).lower()
    return kind.replace("timestamp with time zone", "timestamptz")


def draw(folder: Path) -> None:
    """Write all diagrams."""
    architecture(folder)
    round_trips(folder)
    tables(folder)


if __name__ == "__main__":
    draw(_IMAGES)
