"""Round trips to the server, counted where they are made."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from todo_db.engine import observe_answers


@dataclass(slots=True)
class RoundTrips:
    """How often this process has waited for a server: what `count_round_trips` gives its block.

    ```python
    with count_round_trips() as trips:
        pass
    assert trips == RoundTrips(count=0)
    ```

    Attributes:
        count: The number of answers that were complete.
    """

    count: int = 0


@contextmanager
def count_round_trips() -> Generator[RoundTrips]:
    """Count the round trips of every `Database` in this process while the block runs.

    A statement that a connection has not prepared costs one more, and connecting costs several: so
    run what you count once before.

    ```python
    await db.tasks.count("alice")
    with count_round_trips() as trips:
        await db.tasks.count("alice")
    assert trips.count == (await db.health()).round_trips
    ```
    """
    trips = RoundTrips()

    def note() -> None:
        trips.count += 1

    with observe_answers(note):
        yield trips
