"""The operations of an OpenAPI document, and requests that they accept."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

type Id = int | str
type Schema = dict[str, Any]

_METHODS: Final = ("get", "post", "put", "patch", "delete")
_JSON: Final = "application/json"
_NAME: Final = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class Request:
    """One request, without its user."""

    method: str
    path: str
    query: Mapping[str, Any]
    headers: Mapping[str, str]
    body: object


@dataclass(frozen=True)
class Operation:
    """One operation of the document.

    Attributes:
        method: In lower case.
        path: With its parameters in braces.
        parameters: Its parameters, those of the path included.
        body: The schema of its JSON body, if it has one.
    """

    method: str
    path: str
    parameters: list[dict[str, Any]]
    body: dict[str, Any] | None

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
                item[method].get("requestBody", {}).get("content", {}).get(_JSON, {}).get("schema"),
            )
            for path, item in document["paths"].items()
            for method in _METHODS
            if method in item
        ]

    def request(self, operation: Operation, ids: Mapping[str, Id], content: str) -> Request:
        """Return a request with the ids; each text of its body is `content`."""
        path = operation.path
        places: dict[str, dict[str, Any]] = {"query": {}, "header": {}}
        for parameter in operation.parameters:
            name, place = parameter["name"], parameter["in"]
            if name not in ids and not parameter.get("required"):
                continue
            value = self._sample(parameter.get("schema", {}), ids, content, name)
            if place == "path":
                path = path.replace(f"{{{name}}}", str(value))
            elif place in places:
                places[place][name] = str(value)
        body = self._bodies.get(operation.name)
        if body is None and operation.body is not None:
            body = self._sample(operation.body, ids, content)
        return Request(operation.method, path, places["query"], places["header"], body)

    def id_names(self, operation: Operation, known: Collection[str]) -> list[str]:
        """Return the parameters, and the members of the body, that name something stored."""
        names = [each["name"] for each in operation.parameters if each["in"] in {"path", "query"}]
        members = self._resolved(operation.body or {}).get("properties", {})
        names += [name.removesuffix("s") for name in members]
        in_path = set(_NAME.findall(operation.path))
        return [
            name
            for name in dict.fromkeys(names)
            if name in known or name in in_path or name.endswith("_id")
        ]

    def creator(self, operation: Operation, name: str) -> Operation | None:
        """Return the POST operation that stores what a parameter names, if there is one."""
        before = operation.path.partition(f"/{{{name}}}")[0]
        stem = name.removesuffix("_id")
        creators = [each for each in self.operations if each.method == "post"]
        return next(
            (each for each in creators if each.path == before != operation.path),
            next((each for each in creators if _last(each.path).startswith(stem)), None),
        )

    def _resolved(self, schema: Schema) -> Schema:
        if reference := schema.get("$ref"):
            schema = self._schemas[reference.rpartition("/")[2]]
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                return self._resolved(schema[key][0])
        return schema

    def _sample(
        self, schema: Schema, ids: Mapping[str, Id], content: str, name: str = ""
    ) -> object:
        """Return a value that a schema accepts."""
        if name in ids:
            return ids[name]
        schema = self._resolved(schema)
        given = [schema.get("const"), schema.get("default")]
        given += (schema.get("enum") or schema.get("examples") or [])[:1]
        if chosen := [value for value in given if value is not None]:
            return chosen[0]
        match schema.get("type"):
            case "object":
                members = schema.get("properties", {}).items()
                return {key: self._sample(value, ids, content, key) for key, value in members}
            case "array":
                items = schema.get("items", {})
                return [self._sample(items, ids, content, name.removesuffix("s"))]
            case "string":
                return _text(schema, content)
            case kind:
                return {"boolean": True, "null": None}.get(str(kind), schema.get("minimum", 1))


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _text(schema: Schema, content: str) -> str:
    made = {
        "date-time": "2026-01-01T00:00:00Z",
        "date": "2026-01-01",
        "uuid": str(uuid4()),
        "email": f"{content}@example.org",
        "uri": f"https://example.org/{content}",
    }
    if text := made.get(schema.get("format", "")):
        return text
    return content.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]
