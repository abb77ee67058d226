"""Deadlines of many, with one timer of the event loop."""

import asyncio
import gc
import time
import weakref
from typing import Any

import pytest
from proxy import until

from todo_db.engine.deadlines import Deadlines


@pytest.fixture
def over() -> list[str]:
    return []


@pytest.fixture
async def deadlines(over: list[str]) -> Deadlines[str]:
    return Deadlines(over.append)


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of all timers that are set."""
    loop = asyncio.get_running_loop()
    made: list[float] = []
    call_at = loop.call_at

    def counted(when: float, *arguments: Any, **keywords: Any) -> object:  # noqa: ANN401  # asyncio's own
        made.append(when)
        return call_at(when, *arguments, **keywords)

    monkeypatch.setattr(loop, "call_at", counted)
    return made


def _in(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


class TestAdd:
    async def test_expires_each_at_its_own_time(self) -> None:
        over: dict[str, float] = {}
        wanted = {"never": _in(60), "later": _in(0.2), "soon": _in(0.05)}
        deadlines = Deadlines[str](lambda item: over.update({item: _in(0)}))
        for item, deadline in wanted.items():
            deadlines.add(item, deadline)
        await until(lambda: len(over) == 2)
        assert over.keys() == {"soon", "later"}
        assert all(moment >= wanted[item] for item, moment in over.items())

    async def test_sets_one_timer_for_those_of_one_length(
        self, deadlines: Deadlines[str], timers: list[float]
    ) -> None:
        first = _in(60)
        for number in range(100):
            deadlines.add(f"statement {number}", first + number)
            deadlines.remove(f"statement {number}")
        assert timers == [first]

    async def test_pauses_between_looks_at_many(self, timers: list[float]) -> None:
        over: list[str] = []
        ended = asyncio.Event()

        def expire(item: str) -> None:
            over.append(item)
            if item == "second":
                ended.set()

        deadlines = Deadlines(expire)
        first = _in(0.05)
        for number in range(1000):
            deadlines.add(f"caller {number}", first + 60)
        deadlines.add("first", first)
        deadlines.add("second", first + 1e-6)
        await ended.wait()
        assert over == ["first", "second"]
        *_, second_look, third_look = timers
        assert second_look - first > 0.001
        assert third_look == first + 60

    async def test_moves_a_deadline(self, deadlines: Deadlines[str], over: list[str]) -> None:
        deadlines.add("statement", _in(0.05))
        deadlines.add("statement", _in(60))
        await asyncio.sleep(0.1)
        assert over == []

    async def test_does_not_expire_what_ends_in_the_same_turn(
        self, deadlines: Deadlines[str], over: list[str]
    ) -> None:
        """As a statement does whose answer arrived while the loop was busy."""
        begun, answer = _in(0), asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_at(begun + 0.01, answer.set_result, None)
        deadlines.add("statement", begun + 0.02)
        time.sleep(0.05)  # noqa: ASYNC251  # the loop is busy
        await answer
        deadlines.remove("statement")
        await asyncio.sleep(0.02)
        assert over == []

    async def test_keeps_nothing_in_memory(self) -> None:
        expired: list[Deadlines[str]] = []

        class Owner:
            def __init__(self) -> None:
                self.deadlines = Deadlines(self.expire)

            def expire(self, _item: str) -> None:
                expired.append(self.deadlines)

        owner = Owner()
        owner.deadlines.add("statement", _in(0.05))
        kept = weakref.ref(owner)
        del owner
        gc.collect()
        assert kept() is None
        await asyncio.sleep(0.1)
        assert expired == []

    async def test_by_what_expires_is_kept(self) -> None:
        times: list[float] = []

        def again(item: str) -> None:
            times.append(_in(0))
            if len(times) < 3:
                kept.add(item, _in(0.02))

        kept = Deadlines(again)
        kept.add("caller", _in(0.02))
        await until(lambda: len(times) == 3)


class TestRemove:
    async def test_forgets_it(self, deadlines: Deadlines[str], over: list[str]) -> None:
        deadlines.add("statement", _in(0.02))
        deadlines.remove("statement")
        await asyncio.sleep(0.1)
        assert over == []

    async def test_of_what_is_over_does_nothing(
        self, deadlines: Deadlines[str], over: list[str]
    ) -> None:
        deadlines.add("statement", _in(0))
        await asyncio.sleep(0.05)
        deadlines.remove("statement")
        assert over == ["statement"]

    async def test_of_the_last_leaves_no_timer_after_its_time(
        self, deadlines: Deadlines[str]
    ) -> None:
        deadlines.add("statement", _in(0.02))
        deadlines.remove("statement")
        await asyncio.sleep(0.1)
        assert deadlines._timer is None
