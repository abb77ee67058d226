"""What a run found: Markdown tables, and charts as SVG."""

import platform
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from contestants import ROSTER

_LIBRARIES: Final = (
    "todo-db",
    "asyncpg",
    "sqlalchemy",
    "psycopg",
    "sqlmodel",
    "advanced-alchemy",
    "tortoise-orm",
    "piccolo",
    "django",
    "uvloop",
)
_FLOOR: Final = "asyncpg-fenced"
_COLOURS: Final = {"todo_db": "#1f6feb", "todo_db-owner": "#79b1ff"}
_FENCED_COLOUR: Final = "#57606a"
_UNFENCED_COLOUR: Final = "#c9ced6"
# It can be read on a white and on a black page.
_GREY: Final = "#7d8590"

type Results = Mapping[str, Any]


def where(postgres: str, *, rounds: int, loop: str) -> str:
    """Return one sentence on the machine, the versions, and the run."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = model.group(1) if model else platform.machine()
    cores = len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {processor}, {cores} cores, "
        f"{platform.system()} {platform.release().split('-')[0]}, Python "
        f"{platform.python_version()}, {loop}, PostgreSQL {postgres}, {libraries}. "
        f"Medians of {rounds} rounds."
    )


def trips(exact: Results) -> str:
    """Return the table of round trips."""
    calls = list(next(iter(exact.values()))["turns"])
    rows = (
        [_label(name), _fence(name), found["first turns"], *found["turns"].values()]
        for name, found in exact.items()
    )
    return table(["", "fenced", "first", *calls], rows)


def medians(rounds: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """Return the median of each figure of each contestant over all rounds."""
    return {
        name: {
            figure: {call: statistics.median(each[name][figure][call] for each in rounds)
                     for call in value}
            if isinstance(value, dict)
            else statistics.median(each[name][figure] for each in rounds)
            for figure, value in found.items()
        }
        for name, found in rounds[0].items()
    }  # fmt: skip


def sentence(found: Results) -> str:
    """Return what the README says of a run."""
    todo, unfenced, fenced = (
        found[name]["2 ms"]["get"] for name in ("todo_db", "asyncpg", "sqlalchemy-fenced")
    )
    text = (
        f"With 2 ms to the database each way, `get` takes {todo:.1f} ms. asyncpg without isolation "
        f"takes {unfenced:.1f} ms, and SQLAlchemy's ORM with the same row-level security "
        f"{fenced:.1f} ms."
    )
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def by_call(found: Results, figure: str, form: str) -> str:
    """Return a table of one figure, with a row for each contestant and a column for each call."""
    calls = list(next(iter(found.values()))[figure])
    rows = (
        [_label(name), *(format(value, form) for value in of[figure].values())]
        for name, of in found.items()
    )
    return table(["", *calls], rows)


def summary(found: Results) -> str:
    """Return a table of `get` at each delay, of many at once, and of what is paid once."""
    rows = (
        [
            _label(name),
            *(f"{of[delay]['get']:.1f}" for delay in ("0 ms", "2 ms", "20 ms")),
            f"{of['get/s']:,.0f}",
            f"{of['first ms']:.0f}",
            f"{of['import ms']:.0f}",
        ]
        for name, of in found.items()
    )
    heads = ["`get`, ms, at", "0 ms", "2 ms", "20 ms", "a second", "first, ms", "import, ms"]
    return table(heads, rows)


def ratios(rounds: Sequence[Results]) -> str:
    """Return what the bars are about: each contestant beside the fenced floor, CPU and speed."""
    if _FLOOR not in rounds[0]:
        return ""

    def ratio(name: str, of: Callable[[Any], float]) -> str:
        return f"{statistics.median(of(each[name]) / of(each[_FLOOR]) for each in rounds):.2f}"

    calls = list(rounds[0][_FLOOR]["cpu us"])
    rows = (
        [
            _label(name),
            *(ratio(name, lambda it, call=call: it["cpu us"][call]) for call in calls),  # type: ignore[misc]
            ratio(name, lambda it: it["get/s"]),
        ]
        for name in rounds[0]
    )
    return table(["", *calls, "`get` a second"], rows)


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown, with numbers to the right."""
    lines = [heads, ["---", *("--:" for _ in heads[1:])], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def bars(path: Path, title: str, panels: Mapping[str, Mapping[str, float]], form: str) -> None:
    """Draw horizontal bars, one panel beside the other, in the order of the first panel."""
    plt = _plt()
    names = list(next(iter(panels.values())))
    figure, axes = plt.subplots(
        1, len(panels), sharey=True, squeeze=False, figsize=(3.2 + 2.4 * len(panels), 3.6)
    )
    for axis, (head, values) in zip(axes[0], panels.items(), strict=True):
        drawn = axis.barh(
            [_label(name) for name in names],
            [values[name] for name in names],
            color=[_colour(name) for name in names],
        )
        axis.bar_label(drawn, fmt=lambda value: format(value, form), padding=3, fontsize=8)
        axis.set_title(head, fontsize=9)
        axis.set_xlim(0, max(values.values()) * 1.25)
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0, labelsize=9)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.text(0.99, 0.01, "dark: behind row-level security · light: not", ha="right", fontsize=7)
    save(figure, path)


def charts(found: Results, folder: Path) -> None:
    """Draw a run."""
    calls = ("get", "list", "create", "create 100")
    bars(
        folder / "benchmark-latency.svg",
        "One call, 2 ms from the database each way: milliseconds",
        {
            call: {name: of["2 ms"][call] for name, of in found.items()}
            for call in ("get", "update")
        },
        ".1f",
    )
    bars(
        folder / "benchmark-cpu.svg",
        "CPU time of the client for one call: microseconds",
        {call: {name: of["cpu us"][call] for name, of in found.items()} for call in calls},
        ",.0f",
    )
    bars(
        folder / "benchmark-throughput.svg",
        "32 tasks on 10 connections",
        {"get, calls a second": {name: of["get/s"] for name, of in found.items()}},
        ",.0f",
    )


def lines(path: Path, title: str, label: str, series: Mapping[str, Mapping[int, float]]) -> None:
    """Draw one line for each call over a size; both axes are logarithmic."""
    plt = _plt()
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for name, points in series.items():
        axis.loglog(list(points), list(points.values()), marker="o", markersize=3, label=name)
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel("ms", fontsize=9)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.grid(visible=True, color=_GREY, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def save(figure: Any, path: Path) -> None:  # noqa: ANN401  # matplotlib's
    """Write an SVG that is the same for the same figures."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    text = path.read_text()
    path.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))


def publish(parts: Mapping[str, str], page: Path | None) -> None:
    """Print the parts; replace those that a page has between its marks, too."""
    for name, part in parts.items():
        print(f"{name}\n\n{part}\n")
    if page is None:
        return
    text = page.read_text()
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            sys.exit(f"{page} has no mark {name}")
        text = f"{before}{mark}\n\n{part}\n\n{end}{after}"
    page.write_text(text)


def _label(name: str) -> str:
    return ROSTER[name].label


def _fence(name: str) -> str:
    return "yes" if ROSTER[name].fenced else "no"


def _colour(name: str) -> str:
    other = _FENCED_COLOUR if ROSTER[name].fenced else _UNFENCED_COLOUR
    return _COLOURS.get(name, other)


def _plt() -> Any:  # noqa: ANN401  # it is not installed where mypy runs
    import matplotlib as mpl  # noqa: PLC0415  # half a second that `--quick` has no use for

    mpl.use("svg")
    # Text stays text, and ids are the same in each run.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "todo_db"})
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    mpl.rcParams.update(dict.fromkeys(colours, _GREY))
    mpl.rcParams.update({"axes.facecolor": "none", "savefig.transparent": True})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt
