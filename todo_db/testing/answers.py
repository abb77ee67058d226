"""Answers of an API, and what tells two of them apart."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from httpx import Response

type Id = int | str

# They differ between two equal answers, or follow from the body.
_VOLATILE: Final = frozenset({"date", "content-length"})
_HEADER: Final = "header "
# Numbers, times, and ids of requests.
_MADE: Final = re.compile(r"(?i)[0-9a-f-]{8,}|\d+")


@dataclass(frozen=True)
class Answer:
    """One answer, without the ids that were asked for.

    Attributes:
        status: The status code.
        facts: Each header and each value of the body, by where it stands.
        text: The headers and the body.
    """

    status: int
    facts: dict[str, str]
    text: str

    @classmethod
    def of(cls, response: "Response", ids: Mapping[str, Id]) -> "Answer":
        """Return an answer, without the ids of its request."""
        asked = "|".join(re.escape(str(each)) for each in ids.values())

        def masked(text: str) -> str:
            return re.sub(rf"(?<!\w)(?:{asked})(?!\w)", "{id}", text) if asked else text

        headers = {key: value for key, value in response.headers.items() if key not in _VOLATILE}
        facts = {f"{_HEADER}{key}": value for key, value in headers.items()}
        try:
            facts |= dict(_leaves(response.json()))
        except ValueError:
            facts["body"] = response.text
        text = "\n".join([*headers.values(), response.text])
        return cls(
            response.status_code,
            {masked(key): masked(value) for key, value in facts.items()},
            masked(text),
        )


def differences(name: str, found: Answer, absent: Answer, other: Answer) -> Iterator[str]:
    """Yield how the answer for an id that exists differs from those for two that do not."""
    unstable = f"answers differently to two values of {name} that do not exist: name it in skip="
    if absent.status != other.status:
        yield unstable
    elif found.status != absent.status:
        yield f"answers {found.status} to alice's {name}, and {absent.status} to a missing one"
    else:
        for place in found.facts | absent.facts | other.facts:
            values = [each.facts.get(place, "") for each in (found, absent, other)]
            if values[1] != values[2]:
                values = [_MADE.sub("0", value) for value in values]
            header = place.removeprefix(_HEADER) if place.startswith(_HEADER) else ""
            if values[1] != values[2]:
                yield from () if header else [unstable]
            elif values[0] != values[1]:
                what = f"header {header}" if header else "body"
                yield f"has another {what} for alice's {name} than for a missing one"


def changes(before: Sequence[Answer], after: Answer) -> set[str]:
    """Return where an answer has changed since two that were asked for one after the other."""
    first, second = (each.facts for each in before)
    return {
        place
        for place in first | after.facts
        if first.get(place) == second.get(place) != after.facts.get(place)
    }


def id_of(response: "Response", name: str = "id") -> Id | None:
    """Return the id of what a POST stored, by `id` or by its own name."""
    try:
        return _id_in(response.json(), name) if response.is_success else None
    except ValueError:
        return None


def _id_in(value: object, name: str) -> Id | None:
    if isinstance(value, list):
        inner = cast("list[object]", value)[:1]
    elif isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        for key in ("id", name):
            if isinstance(members.get(key), int | str):
                return cast("Id", members[key])
        # {"user": {"id": …}, "task": {"id": …}} has two.
        stem = name.removesuffix("_id")
        inner = [members[key] for key in sorted(members, key=lambda key: key != stem)]
    else:
        inner = []
    return next((found for each in inner if (found := _id_in(each, name)) is not None), None)


def _leaves(value: object, place: str = "body") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in cast("dict[str, object]", value).items():
            yield from _leaves(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(cast("list[object]", value)):
            yield from _leaves(inner, f"{place}.{number}")
    else:
        yield place, json.dumps(value)
