"""Failures as HTTP: every error of ours has its status, names the field, and says what to do.

Invariant: no failure leaves as a bare 500 with a stack; what is unexpected is logged, and told as such.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from rollout.access_paths import error_form
from rollout.errors import ApiError, BusyError, RolloutError, TaskFileError

logger = logging.getLogger(__name__)

# A client that meets a part that is being started again may come back after so many seconds.
RETRY_AFTER_S = 1.0
# Problems named in one answer.
MAX_PROBLEMS = 5
# Characters of a path that a message repeats.
MAX_PATH_CHARS = 200
_KINDS = {404: "not_found", 405: "method_not_allowed"}


def install(app: FastAPI) -> None:
    """Let an application answer errors in our form."""

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, failure: ApiError) -> JSONResponse:
        return answer(failure.status, failure.category, failure.message, failure.field, _retry_after(failure))

    @app.exception_handler(TaskFileError)
    async def _task_error(_: Request, failure: TaskFileError) -> JSONResponse:
        return answer(422, failure.category, str(failure), "tasks")

    @app.exception_handler(RolloutError)
    async def _rollout_error(_: Request, failure: RolloutError) -> JSONResponse:
        return answer(503, failure.category, str(failure), None, RETRY_AFTER_S)

    @app.exception_handler(RequestValidationError)
    async def _invalid_request(_: Request, failure: RequestValidationError) -> JSONResponse:
        return _invalid(failure.errors())

    @app.exception_handler(ValidationError)
    async def _invalid_body(_: Request, failure: ValidationError) -> JSONResponse:
        return _invalid(failure.errors(include_url=False, include_context=False, include_input=False))

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, failure: HTTPException) -> JSONResponse:
        return _of_framework(request, failure)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, failure: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=failure)
        text = f"{type(failure).__name__}: {str(failure)[:300]}; this is a bug, the gateway's log has the stack"
        return answer(500, "internal", text)


def answer(
    status: int, kind: str, message: str, field: str | None = None, retry_after: float | None = None
) -> JSONResponse:
    """An error's response: {"error": {"type", "message", "field"}}."""
    headers = {"retry-after": f"{retry_after:g}"} if retry_after is not None else None
    return JSONResponse({"error": {"type": kind, "message": message, "field": field}}, status, headers)


def _of_framework(request: Request, failure: HTTPException) -> JSONResponse:
    """What the framework refuses, such as a path that nothing is at, in the form that the path's clients read."""
    kind = _KINDS.get(failure.status_code, "invalid")
    message = f"{request.method} {request.url.path[:MAX_PATH_CHARS]}: {failure.detail}"
    if error_form(request.url.path) == "openai":
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": kind}
        return JSONResponse({"error": error}, failure.status_code, failure.headers)
    response = answer(failure.status_code, kind, message)
    response.headers.update(failure.headers or {})
    return response


def named_problems(problems: object) -> tuple[str, str | None]:
    """Pydantic's problems as one text, and the first field of them."""
    assert isinstance(problems, list | tuple)
    named = [(_path(problem["loc"]), problem["msg"].removeprefix("Value error, ")) for problem in problems]
    text = "; ".join(f"{path}: {what}" if path else what for path, what in named[:MAX_PROBLEMS])
    if len(named) > MAX_PROBLEMS:
        text += f"; and {len(named) - MAX_PROBLEMS} more"
    return text, named[0][0] or None


def _invalid(problems: object) -> JSONResponse:
    text, field = named_problems(problems)
    return answer(422, "invalid", text, field)


def _path(location: tuple[object, ...]) -> str:
    return ".".join(str(part) for part in location if part != "body")


def _retry_after(failure: ApiError) -> float | None:
    if isinstance(failure, BusyError):
        return failure.retry_after
    return RETRY_AFTER_S if failure.status == 503 else None
