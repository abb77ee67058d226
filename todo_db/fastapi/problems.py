"""Error responses: problem details (https://www.rfc-editor.org/rfc/rfc9457)."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.client import responses
from math import ceil
from typing import Any, Final, cast

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from todo_db.errors import (
    ConflictError,
    ForbiddenOriginError,
    InvalidInputError,
    NotAuthenticatedError,
    NotFoundError,
    OutcomeUnknownError,
    StaleTaskError,
    TodoDBError,
    UnavailableError,
)
from todo_db.fastapi.caching import keep_private
from todo_db.pagination import TaskSort

MEDIA_TYPE: Final = "application/problem+json"

_logger: Final = logging.getLogger(__name__)


class Problem(BaseModel):
    """The body of an error response (https://www.rfc-editor.org/rfc/rfc9457).

    Attributes:
        type: Always `about:blank`: the status describes the problem.
        title: The reason phrase of the status.
        status: The status code.
        detail: What was wrong, without a value of the request.
        field: The part of the request that was refused, for 422.
        code: The name of the error's class, for conflicts and unknown outcomes.
    """

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    field: str | None = None
    code: str | None = None


# The first class that matches counts. Any other error is a fault of the service.
_STATUS: Final[dict[type[TodoDBError], HTTPStatus]] = {
    InvalidInputError: HTTPStatus.UNPROCESSABLE_CONTENT,
    NotAuthenticatedError: HTTPStatus.UNAUTHORIZED,
    ForbiddenOriginError: HTTPStatus.FORBIDDEN,
    NotFoundError: HTTPStatus.NOT_FOUND,
    # https://www.rfc-editor.org/rfc/rfc9110#section-13.1.1
    StaleTaskError: HTTPStatus.PRECONDITION_FAILED,
    ConflictError: HTTPStatus.CONFLICT,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    OutcomeUnknownError: HTTPStatus.GATEWAY_TIMEOUT,
}

PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status.value: {
        "description": status.phrase,
        "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
    }
    # FastAPI itself answers 400 to a body that it cannot parse.
    for status in sorted({HTTPStatus.BAD_REQUEST, *_STATUS.values()})
}
"""The error responses of `install`, for the parameter `responses` of a router."""

# The requirements of `inputs` that name a type of Python, in the words of JSON and HTTP.
_REQUIREMENTS: Final = {
    "must be a str": "must be a string",
    "must be an int": "must be a whole number",
    "must be True or False": "must be true or false",
    "must be a TaskSort": f"must be one of {', '.join(sort.value for sort in TaskSort)}",
    "must be a datetime with a time zone": "must be a date and time with an offset",
    "must contain NewTask and nothing else": "must contain tasks and nothing else",
    "must not be NULL": "must not be null",
}
_STALE: Final = (
    "The task does not have the version that If-Match names: it was changed, or that is not the"
    " strong ETag of an earlier response."
)
# The messages of pydantic that name a type of Python, or repeat a value of the request.
_MESSAGES: Final = {
    **dict.fromkeys(
        ("dataclass_type", "dict_type", "mapping_type", "model_attributes_type", "model_type"),
        "Input should be an object",
    ),
    "none_required": "Input should be null",
    "union_tag_invalid": "is none of the kinds",
}
# https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
_POLICY_VIOLATION: Final = 1008
_INTERNAL_ERROR: Final = 1011
_TRY_AGAIN_LATER: Final = 1013
_CLOSE_CODES: Final = {
    HTTPStatus.INTERNAL_SERVER_ERROR: _INTERNAL_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE: _TRY_AGAIN_LATER,
    HTTPStatus.GATEWAY_TIMEOUT: _TRY_AGAIN_LATER,
}


async def answer_error(connection: HTTPConnection, error: Exception) -> Response | None:
    """Answer an error of the package. A WebSocket is refused, or closed unless it is already."""
    keep_private(connection)
    response = _error_response(error)
    if not isinstance(connection, WebSocket):
        return response
    if connection.application_state is WebSocketState.DISCONNECTED:
        # The handler has closed it, and the server would refuse to send more.
        return None
    is_open = connection.application_state is not WebSocketState.CONNECTING
    # The client may have gone.
    with suppress(WebSocketDisconnect):
        if is_open or "websocket.http.response" not in connection.scope.get("extensions", {}):
            code = _CLOSE_CODES.get(HTTPStatus(response.status_code), _POLICY_VIOLATION)
            await connection.close(code, HTTPStatus(response.status_code).phrase)
        else:
            await connection.send_denial_response(response)
    return None


async def answer_validation(_connection: HTTPConnection, error: Exception) -> Response:
    """Answer what FastAPI finds wrong with a request. Its own answer would repeat the input."""
    first = cast("RequestValidationError", error).errors()[0]
    # Nested and unknown field names come from the request body, so they are not repeated in the
    # answer.
    named = first["loc"][1:2] if first["type"] != "extra_forbidden" else ()
    field = "".join(part for part in named if isinstance(part, str))
    detail = _MESSAGES.get(first["type"], first["msg"])
    return _problem(HTTPStatus.UNPROCESSABLE_CONTENT, detail=detail, field=field)


async def answer_http(_connection: HTTPConnection, error: Exception) -> Response:
    """Answer an `HTTPException`."""
    refusal = cast("HTTPException", error)
    if not is_body_allowed_for_status_code(refusal.status_code):
        return Response(None, refusal.status_code, refusal.headers)
    phrase = responses.get(refusal.status_code, "Unknown")
    members = {} if refusal.detail == phrase else {"detail": refusal.detail}
    content = {"type": "about:blank", "title": phrase, "status": refusal.status_code, **members}
    return JSONResponse(content, refusal.status_code, refusal.headers, media_type=MEDIA_TYPE)


async def answer_fault(_connection: HTTPConnection, _error: Exception) -> Response:
    """Answer any other error. Starlette raises it again, so that the server logs it."""
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR)


HANDLERS: Final = {
    TodoDBError: answer_error,
    RequestValidationError: answer_validation,
    HTTPException: answer_http,
    Exception: answer_fault,
}


def _error_response(error: Exception) -> JSONResponse:
    status = next(
        (status for kind, status in _STATUS.items() if isinstance(error, kind)),
        HTTPStatus.INTERNAL_SERVER_ERROR,
    )
    match error:
        case InvalidInputError():
            detail = _REQUIREMENTS.get(error.requirement, error.requirement)
            return _problem(status, detail=detail, field=error.field)
        case NotAuthenticatedError() | NotFoundError():
            # The kind of the missing object could reveal ids of other users.
            is_anonymous = isinstance(error, NotAuthenticatedError)
            return _problem(status, {"WWW-Authenticate": "Bearer"} if is_anonymous else None)
        case UnavailableError():
            return _problem(
                status, {"Retry-After": str(max(1, ceil(error.retry_after)))}, detail=str(error)
            )
        case StaleTaskError():
            return _problem(status, detail=_STALE, code=type(error).__name__)
        case ConflictError() | ForbiddenOriginError() | OutcomeUnknownError():
            return _problem(status, detail=str(error), code=type(error).__name__)
        case _:
            _logger.error(
                "%s: %s",
                type(error).__name__,
                error,
                extra={"event": "todo_db.request.failed", "reason": type(error).__name__},
            )
            return _problem(status)


def _problem(
    status: HTTPStatus, headers: Mapping[str, str] | None = None, **members: object
) -> JSONResponse:
    content = {"type": "about:blank", "title": status.phrase, "status": status, **members}
    return JSONResponse(content, status, headers, media_type=MEDIA_TYPE)
