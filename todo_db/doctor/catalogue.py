"""What the migrations made, as lines of text: Alembic does not compare policies, grants, triggers.

`catalogue.sql` reads the lines of a live database; `catalogue.txt` has those of a database that was
just migrated. `tests/helpers/catalogue.py` writes the latter, and a test compares it.
"""

import re
from collections.abc import Collection, Generator, Iterable
from importlib.resources import files
from typing import Final

# Each is the name of an object, a colon, and a fact about it.
type Catalogue = frozenset[str]

# The names of objects are printed with their schema, and no object of the login hides one of the
# catalogue. The other settings fix the format of expressions, which a login or a database may have
# changed.
SETTINGS: Final = """
    SET LOCAL search_path = pg_catalog, pg_temp;
    SET LOCAL quote_all_identifiers = off;
    SET LOCAL standard_conforming_strings = on;
    SET LOCAL DateStyle = 'ISO';
    SET LOCAL TimeZone = 'UTC'
"""
STATEMENT: Final = files(__package__).joinpath("catalogue.sql").read_text("utf-8")
EXPECTED: Final[Catalogue] = frozenset(
    files(__package__).joinpath("catalogue.txt").read_text("utf-8").splitlines()
)
OBJECTS: Final = sorted({line.partition(": ")[0] for line in EXPECTED})

# For the roles of the migrations; an owner may add policies for others.
_POLICY: Final = re.compile(r"permissive policy .*? TO (.*\b(?:public|todo_app|todo_auth)\b)")
_COLUMN: Final = re.compile(r"grant \w+ \((.+)\) to todo_app")


def catalogued(lines: Iterable[tuple[str, str]]) -> Catalogue:
    """Return the lines of `STATEMENT`."""
    return frozenset(f"{name}: {line}" for name, line in lines)


def differences(found: Catalogue, explained: Collection[str]) -> Generator[tuple[str, str]]:
    """Yield the code and the subject of a finding for each missing or additional line.

    Args:
        found: The lines of a live database about `OBJECTS`.
        explained: Objects that have a finding already, which can be the reason.
    """
    for code, lines in (("missing", EXPECTED - found), ("extra", found - EXPECTED)):
        for line in lines:
            name, _, fact = line.partition(": ")
            counts = _opens(name, fact) if code == "extra" else not fact.endswith(" to PUBLIC")
            if counts and name not in explained:
                yield f"catalogue-{code}", line


def _opens(name: str, fact: str) -> bool:
    """Whether a line that no migration made gives a right, where no rule judges that.

    The rules judge what `todo_app` may do with tables that it may touch. An application adds
    columns, indexes, constraints and triggers to these, and Better Auth's plugins to theirs.
    """
    if name == "DATABASE":
        return fact.endswith(" to todo_auth")
    if column := _COLUMN.fullmatch(fact):
        return any(line.startswith(f"{name}: column {column[1]} ") for line in EXPECTED)
    if policy := _POLICY.match(fact):
        is_judged = any(line.startswith(f"{name}: restrictive policy ") for line in EXPECTED)
        return "todo_auth" in policy[1] or not is_judged
    return fact.startswith(("grant ", "member of "))
