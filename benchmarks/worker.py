"""One contestant in a fresh process: it proves that it does the work, or measures it.

`run.py` starts it with the mode, the contestant's name, the URL, the numbers of users and tasks,
and the event loop as arguments. It prints one line of JSON.
"""

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Final, NamedTuple, cast

from contestants import PAGE, ROSTER, Contestant
from seed import seeded

CONNECTIONS: Final = 10
TASKS: Final = 32
BULK: Final = 100
MILLISECONDS: Final = (2, 20)


class Amount(NamedTuple):
    """How much is measured."""

    calls: Mapping[str, tuple[int, int, int]]
    """How often each call is made: for its CPU time, at 2 ms, and at 20 ms."""
    seconds: float
    """How long many tasks read at once."""
    waits: bool = True
    """Whether the database is as far away as it is said to be."""


CALLS: Final = {
    "get": (200, 10, 3),
    "list": (100, 10, 3),
    "create": (200, 10, 3),
    f"create {BULK}": (20, 5, 2),
    "update": (200, 10, 3),
    "toggle": (200, 10, 3),
    "delete": (200, 10, 3),
    "count": (200, 10, 3),
}
AMOUNTS: Final = {
    "measure": Amount(CALLS, seconds=1.0),
    "try": Amount(dict.fromkeys(CALLS, (5, 1, 1)), seconds=0.1, waits=False),
}
_BATCHES: Final = 5
# By then every statement is prepared, whatever a library waits for.
_WARM: Final = 8
_USER: Final = "user-1"
# It belongs to user-2.
_FOREIGN: Final = 2

type Call = Callable[[], Awaitable[object]]
type Result = dict[str, float | dict[str, float]]


async def calls_of(it: Contestant, read: int, deletions: int) -> dict[str, Call]:
    """Return the eight calls; `delete` can be made so many times."""
    numbers = count()

    def title() -> str:
        # Another one each time, so that an update changes the row.
        return f"Title {next(numbers)}"

    stored = await it.create_many(_USER, [title() for _ in range(deletions + 1)])
    changed, *doomed = (cast("int", it.values(row)[0]) for row in stored)
    titles = [title() for _ in range(BULK)]
    return {
        "get": lambda: it.get(_USER, read),
        "list": lambda: it.list(_USER),
        "create": lambda: it.create(_USER, title()),
        f"create {BULK}": lambda: it.create_many(_USER, titles),
        "update": lambda: it.update(_USER, changed, title()),
        "toggle": lambda: it.toggle(_USER, changed),
        "delete": lambda: it.delete(_USER, doomed.pop()),
        "count": lambda: it.count(_USER),
    }


async def warm(calls: dict[str, Call]) -> None:
    """Make each call so often that it is as fast as it gets."""
    for call in calls.values():
        for _ in range(_WARM):
            await call()


# What is exact: one run is enough.


async def exact(it: Contestant, url: str, ids: range, users: int) -> Result:
    """Prove that the contestant does the work; count the client's turns of each call."""
    from wire import Wire  # noqa: PLC0415  # not a part of the library's import time

    with Wire(url) as wire:
        await it.open(wire.url, CONNECTIONS)
        await it.get(_USER, ids[-PAGE])
        first = wire.turns
        await prove(it, ids, users)
        calls = await calls_of(it, ids[-PAGE], 2 * _WARM)
        await warm(calls)
        turns: dict[str, float] = {}
        # No answer arrives while a client still sends, as one with a pipeline does.
        wire.delay(0.01)
        for name, call in calls.items():
            before = wire.turns
            await call()
            turns[name] = wire.turns - before
        await it.close()
    return {"first turns": first, "turns": turns}


async def prove(it: Contestant, ids: range, users: int) -> None:
    """Compare each call's rows with what they must be, and reach for another user's task."""

    def expect(got: object, expected: object) -> None:
        if got != expected:
            raise AssertionError(f"expected {expected}, got {got}")

    async def expect_nothing(call: Awaitable[object]) -> None:
        with suppress(*it.missing):
            expect(await call or None, None)

    async def read(number: object) -> tuple[object, ...]:
        return it.values(await it.get(_USER, cast("int", number)))

    expect(await read(ids[0]), seeded(ids[0], users))
    page = [it.values(task) for task in await it.list(_USER)]
    expect(page, [seeded(number, users) for number in reversed(ids[-PAGE:])])
    expect(await it.count(_USER), len(ids))

    created = it.values(await it.create(_USER, "Buy milk"))
    expect(created[1:5], (_USER, "Buy milk", None, False))
    expect(await read(created[0]), created)
    titles = [f"Task {number}" for number in range(BULK)]
    many = [it.values(task) for task in await it.create_many(_USER, titles)]
    expect([task[1:5] for task in many], [(_USER, title, None, False) for title in titles])
    expect([await read(task[0]) for task in many[::33]], many[::33])

    number = cast("int", created[0])
    updated = it.values(await it.update(_USER, number, "Buy bread"))
    expect(updated[:6], (number, _USER, "Buy bread", *created[3:6]))
    toggled = it.values(await it.toggle(_USER, number))
    expect(toggled[:6], (*updated[:4], True, created[5]))
    expect([await read(number), str(toggled[6]) > str(updated[6])], [toggled, True])
    expect("yes" if await it.delete(_USER, number) else "no", "yes")
    await expect_nothing(it.get(_USER, number))

    await expect_nothing(it.get(_USER, _FOREIGN))
    await expect_nothing(it.update(_USER, _FOREIGN, "Mine"))
    await expect_nothing(it.toggle(_USER, _FOREIGN))
    await expect_nothing(it.delete(_USER, _FOREIGN))
    kept = it.values(await it.get("user-2", _FOREIGN))
    expect(kept, seeded(_FOREIGN, users))


# What is measured: `run.py` takes the medians of several runs.


async def measured(it: Contestant, url: str, ids: range, amount: Amount) -> Result:
    """Measure the first call, then warm calls without and with a delay, then many at once."""
    from wire import Wire  # noqa: PLC0415

    begun = time.perf_counter()
    await it.open(url, CONNECTIONS)
    await it.get(_USER, ids[-PAGE])
    result: Result = {"first ms": (time.perf_counter() - begun) * 1e3}

    calls = await calls_of(it, ids[-PAGE], sum(amount.calls["delete"]) + 2 * _WARM)
    await warm(calls)
    cpu: dict[str, float] = {}
    latency: dict[str, float] = {}
    for name, call in calls.items():
        cpu[name], latency[name] = await cost(call, amount.calls[name][0])
    result |= {
        "cpu us": cpu,
        "0 ms": latency,
        "get/s": await throughput(it, ids[-PAGE], amount.seconds),
    }
    await it.close()

    with Wire(url) as wire:
        await it.open(wire.url, CONNECTIONS)
        calls = await calls_of(it, ids[-PAGE], sum(amount.calls["delete"]) + 2 * _WARM)
        await warm(calls)
        for column, delay in enumerate(MILLISECONDS, start=1):
            wire.delay(delay / 1e3 if amount.waits else 0)
            result[f"{delay} ms"] = {
                name: await wait(call, amount.calls[name][column]) for name, call in calls.items()
            }
        wire.delay(0)
        await it.close()
    return result


async def cost(call: Call, calls: int) -> tuple[float, float]:
    """Return microseconds of this process's CPU, and milliseconds by the clock, of one call."""
    gc.collect()
    cpu, clock = [], []
    for _ in range(_BATCHES):
        cpu_begun, clock_begun = time.process_time(), time.perf_counter()
        for _ in range(calls // _BATCHES):
            await call()
        cpu.append(time.process_time() - cpu_begun)
        clock.append(time.perf_counter() - clock_begun)
    number = calls // _BATCHES
    return statistics.median(cpu) / number * 1e6, statistics.median(clock) / number * 1e3


async def wait(call: Call, calls: int) -> float:
    """Return the median of the milliseconds that a call takes."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        await call()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


async def throughput(it: Contestant, read: int, seconds: float) -> float:
    """Return how many reads a second 32 tasks finish on 10 connections."""
    done, end = 0, 0.0
    all_warm = asyncio.Barrier(TASKS + 1)

    async def task() -> None:
        nonlocal done
        async with it.scope():
            for _ in range(_WARM):
                await it.get(_USER, read)
            await all_warm.wait()
            while time.perf_counter() < end:
                await it.get(_USER, read)
                done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(task())
        while all_warm.n_waiting < TASKS:  # noqa: ASYNC110  # they wait for this one in turn
            await asyncio.sleep(0.01)
        end = time.perf_counter() + seconds
        await all_warm.wait()
    return done / seconds


def main() -> None:
    """Import the contestant's library, and run one mode."""
    mode, name, url, users, tasks, loop = sys.argv[1:]
    ids = range(1, int(tasks) + 1, int(users))
    begun = time.perf_counter()
    it = ROSTER[name].create()
    imported = (time.perf_counter() - begun) * 1e3
    factory = None
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415  # not a part of the library's import time

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        if mode == "exact":
            result = runner.run(exact(it, url, ids, int(users)))
        else:
            result = runner.run(measured(it, url, ids, AMOUNTS[mode])) | {"import ms": imported}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
