"""What every answer of the HTTP server keeps to: bounded bodies, and errors that name a field and tell no secret."""

import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import DeadlineError, RequestError


class Problem(BaseModel):
    """One thing that is wrong."""

    field: str | None
    message: str


class Problems(BaseModel):
    """Why there is no answer."""

    errors: list[Problem]


RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": Problems, "description": why}
    for code, why in {
        400: "The body is not JSON.",
        401: "The token is missing or wrong.",
        404: "No such model, SAE, catalog or feature.",
        413: "The body is too large.",
        422: "A field is wrong; its name is in the answer.",
        429: "Too many requests wait; come back after Retry-After seconds.",
        500: "Our fault; the log of the server has more.",
        504: "The continuation was not done in time.",
    }.items()
}


class BodyLimit:
    """Refuses bodies beyond a size, whether or not they say it beforehand."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                problem = _problem(413, None, f"the body has more than {self._max_bytes} bytes")
                await problem(scope, receive, send)
                return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


def _problem(code: int, field: str | None, message: str, headers: Any = None) -> JSONResponse:
    body = Problems(errors=[Problem(field=field, message=message)])
    return JSONResponse(body.model_dump(), status_code=code, headers=headers)


class LocalHosts:
    """Refuses requests under a host name that is not of this machine: a page of a stranger may bring its own."""

    def __init__(self, app: ASGIApp, names: Sequence[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and Request(scope).url.hostname not in self._names:
            await _problem(400, None, "this host name is not served")(scope, receive, send)
            return
        await self._app(scope, receive, send)


def answer_errors(api: FastAPI) -> None:
    """Every error as `Problems`."""

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        if error.errors()[0]["type"] == "json_invalid":
            return _problem(400, None, "the body is not JSON")
        problems = [
            Problem(field=".".join(map(str, e["loc"][1:])) or "prompt", message=e["msg"]) for e in error.errors()
        ]
        return JSONResponse(Problems(errors=problems).model_dump(), status_code=422)

    @api.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return _problem(404 if error.unknown else 422, error.field, str(error))

    @api.exception_handler(DeadlineError)
    async def late(_: Request, error: DeadlineError) -> JSONResponse:
        return _problem(504, "gen_tokens", str(error))

    @api.exception_handler(StarletteError)
    async def other(_: Request, error: StarletteError) -> JSONResponse:
        return _problem(error.status_code, None, str(error.detail), error.headers)

    @api.middleware("http")
    async def contained(request: Request, call: Callable[[Request], Awaitable[Any]]) -> Any:
        try:
            return await call(request)
        except Exception:  # noqa: BLE001  # whatever it is, the answer does not tell
            incident = uuid.uuid4().hex[:8]
            print(f"incident {incident}\n{traceback.format_exc()}", file=sys.stderr)
            return _problem(500, None, f"internal error; the server's log has it as incident {incident}")
