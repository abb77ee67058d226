"""The operations of an OpenAPI document, and requests that they accept."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Any, Final, cast
from uuid import uuid4

from todo_db.testing.answers import Id

type Schema = dict[str, Any]

JSON: Final = "application/json"
_METHODS: Final = ("get", "post", "put", "patch", "delete")
# A model can contain itself.
_DEEPEST: Final = 6


@dataclass(frozen=True)
class Request:
    """One request, without its user; `media` is the type of its body."""

    method: str
    path: str
    query: Mapping[str, Any]
    headers: Mapping[str, str]
    body: object
    media: str = JSON


@dataclass(frozen=True)
class Operation:
    """One operation of the document.

    Attributes:
        method: In lower case.
        path: With its parameters in braces.
        parameters: Its parameters, those of the path included.
        media: The type of its body.
        body: The schema of its body; empty, if it has none.
    """

    method: str
    path: str
    parameters: list[dict[str, Any]]
    media: str = JSON
    body: Schema = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its method and its path."""
        return f"{self.method.upper()} {self.path}"


class Document:
    """An OpenAPI document.

    Attributes:
        operations: Its operations, in order.
    """

    def __init__(self, document: Schema, bodies: Mapping[str, object]) -> None:
        self._schemas: Schema = document.get("components", {}).get("schemas", {})
        self._bodies = bodies
        self.operations: Final = [
            Operation(
                method,
                path,
                [*item.get("parameters", []), *item[method].get("parameters", [])],
                *_body(item[method].get("requestBody", {}).get("content", {})),
            )
            for path, item in document["paths"].items()
            for method in _METHODS
            if method in item
        ]

    def request(
        self,
        operation: Operation,
        ids: Mapping[str, Id],
        content: str,
        extras: Mapping[str, object] = MappingProxyType({}),
    ) -> Request:
        """Return a request with the ids and the extras; each text of its body is `content`."""
        path = operation.path
        query: dict[str, Any] = {}
        headers: dict[str, str] = {}
        for parameter in operation.parameters:
            name, place = parameter["name"], parameter["in"]
            if name in extras:
                value = extras[name]
            elif _one(name) in ids or parameter.get("required"):
                value = self._sample(parameter.get("schema", {}), ids, content, name)
            else:
                continue
            if place == "path":
                path = path.replace(f"{{{name}}}", str(value))
            elif place == "query":
                query[name] = value
            elif place == "header":
                headers[name] = str(value)
        body: object = self._sample(operation.body, ids, content, "ids") if operation.body else None
        given = self._bodies.get(operation.name)
        if {type(body), type(given)} == {dict}:
            body = {**cast("Schema", body), **cast("Schema", given)}
        elif given is not None:
            body = given
        return Request(operation.method, path, query, headers, body, operation.media)

    def extras(
        self, operation: Operation, ids: Collection[str], words: Collection[str]
    ) -> list[dict[str, object]]:
        """Return values of its other parameters: none, each alone, and all numbers at once."""
        extras: list[dict[str, object]] = [{}]
        numbers: dict[str, object] = {}
        for parameter in operation.parameters:
            name = parameter["name"]
            if _one(name) in ids or parameter["in"] == "cookie":
                continue
            schema = self._resolved(parameter.get("schema", {}))
            if schema.get("type") == "integer":
                numbers[name] = 2
            extras += [{name: value} for value in self._choices(schema, words)]
        return [*extras, numbers] if len(numbers) > 1 else extras

    def id_names(self, operation: Operation, known: Collection[str]) -> list[str]:
        """Return the parameters, and the members of the body, that name something stored."""
        named = [
            (each["name"], each["in"], self._resolved(each.get("schema", {})))
            for each in operation.parameters
        ]
        given = self._bodies.get(operation.name, {})
        named += [
            (name, "body", schema)
            for name, schema in self._members(operation.body, "ids")
            if isinstance(given, dict) and name not in given
        ]
        return list(
            dict.fromkeys(
                _one(name)
                for name, place, schema in named
                if _one(name) in known or self._is_id(operation, name, place, schema)
            )
        )

    def creator(self, operation: Operation, name: str) -> Operation | None:
        """Return the POST operation that stores what a parameter names, if there is one."""
        before, found, _ = operation.path.partition(f"/{{{name}}}")
        posts = [each for each in self.operations if each.method == "post" and each != operation]
        if found and (exact := [each for each in posts if each.path == before]):
            return exact[0]
        if plain(name) == "id":
            above = [each for each in posts if operation.path.startswith(each.path)]
            is_one = operation.path.endswith("}")
            return None if found or is_one else max(above, key=_length, default=None)
        stem = plain(name).removesuffix("_id")
        for word in (stem, stem.rpartition("_")[2]):
            fitting = [each for each in posts if _last(each).startswith(word.removesuffix("y"))]
            if fitting:
                return min(fitting, key=lambda each: len(_last(each)))
        return None

    def _is_id(self, operation: Operation, name: str, place: str, schema: Schema) -> bool:
        if place == "path":
            return "enum" not in schema and schema.get("format") not in {"date", "date-time"}
        if plain(name).endswith(("_id", "ids")) and place != "header":
            return True
        is_key = schema.get("type") == "integer" or schema.get("format") == "uuid"
        return (is_key or plain(name).endswith(("_id", "id"))) and self.creator(
            operation, name
        ) is not None

    def _members(self, schema: Schema, name: str, depth: int = 0) -> Iterator[tuple[str, Schema]]:
        """Yield the names in a body, also in what it contains."""
        schema = self._resolved(schema)
        if schema.get("type") == "array" and depth < _DEEPEST:
            yield from self._members(schema.get("items", {}), name, depth + 1)
        elif schema.get("type") == "object" and depth < _DEEPEST:
            for key, value in schema.get("properties", {}).items():
                yield from self._members(value, key, depth + 1)
        elif depth:
            yield name, schema

    def _resolved(self, schema: Schema) -> Schema:
        if reference := schema.get("$ref"):
            schema = self._schemas[reference.rpartition("/")[2]]
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                null = {"type": "null"}
                return self._resolved(next(each for each in schema[key] if each != null))
        return schema

    def _choices(self, schema: Schema, words: Collection[str]) -> list[object]:
        """Return the values that are worth a try."""
        kind = schema.get("type")
        choices: list[object] = [self._sample(schema, {}, "")]
        if "enum" in schema:
            choices = schema["enum"]
        elif kind == "array":
            inner = self._choices(self._resolved(schema.get("items", {})), words)
            choices = [[value] for value in inner]
        elif kind == "string" and "format" not in schema:
            choices = list(words)
        elif kind in {"boolean", "integer"}:
            choices = [True, False] if kind == "boolean" else [2]
        return choices

    def _sample(
        self, schema: Schema, ids: Mapping[str, Id], content: str, name: str = "", depth: int = 0
    ) -> object:
        """Return a value that a schema accepts."""
        schema = self._resolved(schema)
        kind = schema.get("type")
        if _one(name) in ids and kind not in {"array", "object"}:
            return ids[_one(name)]
        given = [schema.get("const"), schema.get("default")]
        given += (schema.get("enum") or schema.get("examples") or [])[:1]
        if kind not in {"array", "object"} and (
            chosen := [value for value in given if value is not None]
        ):
            return chosen[0]
        made: object = None
        if kind == "object" and depth < _DEEPEST:
            members = schema.get("properties", {}).items()
            made = {
                key: self._sample(value, ids, content, key, depth + 1) for key, value in members
            }
        elif kind == "array":
            items = schema.get("items", {})
            number: int = max(schema.get("minItems", 0), depth < _DEEPEST - 1)
            made = [self._sample(items, ids, content, name, depth + 1)] * number
        elif kind == "string":
            made = _text(schema, content)
        elif kind not in {"object", "null"}:
            made = kind == "boolean" or _number(schema)
        return made


def _number(schema: Schema) -> float:
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    most = schema.get("maximum", schema.get("exclusiveMaximum", inf) - 1)
    return cast("float", min(least, most))


def plain(name: str) -> str:
    """Return a name in lower case, with words apart: `task_id` for `taskId` and `Task-Id`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")


def _one(name: str) -> str:
    """Return `task_id` for `task_ids`."""
    return name.removesuffix("s") if name.lower().endswith("ids") else name


def _length(operation: Operation) -> int:
    return len(operation.path)


def _last(operation: Operation) -> str:
    return plain(operation.path.rstrip("/").rpartition("/")[2])


def _body(content: Schema) -> tuple[str, Schema]:
    media = JSON if JSON in content else next(iter(content), JSON)
    return media, content.get(media, {}).get("schema", {})


def _text(schema: Schema, content: str) -> str | bytes:
    if "contentMediaType" in schema or schema.get("format") == "binary":
        return content.encode()
    made = {
        "date-time": "2026-01-01T00:00:00Z",
        "date": "2026-01-01",
        "time": "12:00:00",
        "duration": "P1D",
        "uuid": str(uuid4()),
        "email": f"{content}@example.org",
        "uri": f"https://example.org/{content}",
    }
    if text := made.get(schema.get("format", "")):
        return text
    # The end of it, because names may have to be unique.
    longest = schema.get("maxLength", len(content))
    return content[max(0, len(content) - longest) :].ljust(schema.get("minLength", 0), "x")
