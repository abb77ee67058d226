"""The security schemes of the OpenAPI document: those that are in force."""

import copy
from collections.abc import Iterator
from typing import Any, Final

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant
from fastapi.security.base import SecurityBase

from todo_db.fastapi.dependencies import BEARER, COOKIE, current_user_id
from todo_db.trust import Trust

type _Json = dict[str, Any]

_METHODS: Final = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})


def document_security(app: FastAPI) -> None:
    """Let the application's OpenAPI document name the security schemes that are in force.

    FastAPI reads them from the handlers, which do not know the settings, nor what is in
    `dependency_overrides`.
    """
    original = app.openapi

    def openapi() -> _Json:
        document = copy.deepcopy(original())
        override = app.dependency_overrides.get(current_user_id)
        if override is not None:
            dependant = Dependant(dependencies=[get_dependant(path="/", call=override)])
            instead = {scheme.scheme_name: scheme for scheme in _schemes(dependant)}
            _replace(document, {BEARER.scheme_name, COOKIE.scheme_name}, instead)
            return document
        trust: Trust | None = getattr(app.state, "todo_trust", None)
        if trust is not None and not trust.cookies:
            _replace(document, {COOKIE.scheme_name}, {})
        elif trust is not None:
            known = document.get("components", {}).get("securitySchemes", {})
            known.get(COOKIE.scheme_name, {})["name"] = trust.cookies[-1]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _schemes(dependant: Dependant) -> Iterator[SecurityBase]:
    for inner in dependant.dependencies:
        if isinstance(inner.call, SecurityBase):
            yield inner.call
        yield from _schemes(inner)


def _replace(document: _Json, names: set[str], instead: dict[str, SecurityBase]) -> None:
    components = document.get("components", {})
    known: _Json = components.get("securitySchemes", {})
    if not names & known.keys():
        return
    for name in names:
        known.pop(name, None)
    for name, scheme in instead.items():
        known[name] = scheme.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    if not known:
        del components["securitySchemes"]
    for path in document["paths"].values():
        for method in path.keys() & _METHODS:
            _replace_in(path[method], names, instead)


def _replace_in(operation: _Json, names: set[str], instead: dict[str, SecurityBase]) -> None:
    before: list[_Json] = operation.get("security", [])
    after = [each for each in before if not names & each.keys()]
    if len(after) < len(before):
        after += [{name: []} for name in instead]
        operation["security"] = after
    if not after:
        operation.pop("security", None)
