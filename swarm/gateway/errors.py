"""Errors in the form of OpenAI's API, and which of ours becomes which."""

from __future__ import annotations

import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from routing.errors import CallerError, SwarmError
from swarm.errors import ContextTooLong, SessionClosed
from swarm.gateway.engine import Overloaded

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_OVERLOADED_S = 2
RETRY_UNAVAILABLE_S = 5


class ApiError(Exception):
    """An answer that is no answer: raised by handlers, sent by the application."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(math.ceil(self.retry_after_s))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def from_swarm(error: SwarmError) -> ApiError:
    """The caller erred: 400. All places are taken: 429. Nobody can answer now: 503."""
    text = f"{error} ({error.hint})" if error.hint else str(error)
    match error:
        case Overloaded():
            return ApiError(429, text, code="overloaded", retry_after_s=RETRY_OVERLOADED_S)
        case ContextTooLong():
            return ApiError(400, text, code="context_length_exceeded")
        case CallerError() if not isinstance(error, SessionClosed):
            return ApiError(400, text)
        case _:
            return ApiError(503, text, code="unavailable", retry_after_s=RETRY_UNAVAILABLE_S)


def from_validation(error: RequestValidationError) -> ApiError:
    """The first field that is wrong with a request; its value is not repeated."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg']}", code="invalid_json")
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        text = "the body is to be one JSON object, sent with Content-Type: application/json"
        return ApiError(400, text, param="body", code=first["type"])
    # of a union's alternatives, one of the right type, else the one that fitted furthest, is what was meant
    meant = max((each for each in errors if each["loc"][:2] == first["loc"][:2]), key=_fit)
    # pydantic also names the alternative of a union that it tried, which is no field
    place = [str(part) for part in meant["loc"] if part != "body" and (isinstance(part, int) or part.isidentifier())]
    where = ".".join(place) or "body"
    return ApiError(400, f"{where}: {meant['msg'].removeprefix('Value error, ')}", param=where, code=meant["type"])


def _fit(error: Any) -> tuple[bool, int]:
    return not error["type"].endswith(("_type", "_parsing")), len(error["loc"])
