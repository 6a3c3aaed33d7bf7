"""What every answer of the HTTP server keeps to: bounded bodies, and errors that name a field and tell no secret.

Also what its document says: every bound to the digit.
"""

import asyncio
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

from sae_census.errors import DeadlineError, RequestError


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
        408: "The body did not come in time.",
        413: "The body is too large.",
        422: "A field is wrong; its name is in the answer.",
        429: "Too many requests wait; come back after Retry-After seconds.",
        500: "Our fault; the log of the server has more.",
        503: "All connections are busy; come back after Retry-After seconds.",
        504: "The continuation was not done in time.",
    }.items()
}


class Room:
    """Refuses requests beyond a number of them at a time."""

    def __init__(self, app: ASGIApp, num_requests: int):
        self._app, self._num_requests, self._num_inside = app, num_requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._num_inside += 1
        full = _problem(503, None, "all connections are busy", {"Retry-After": "5", "Connection": "close"})
        try:
            await (full if self._num_inside > self._num_requests else self._app)(scope, receive, send)
        finally:
            self._num_inside -= 1


class BodyLimit:
    """Refuses bodies beyond a size, whether or not they say it beforehand, and those that do not come in time."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._body(receive)
        except TimeoutError:
            late = _problem(408, None, f"the body was not there after {self._seconds:g} s", {"Connection": "close"})
            await late(scope, receive, send)
            return
        if body is None:  # the client hung up
            return
        if len(body) > self._max_bytes:
            await _problem(413, None, f"the body has more than {self._max_bytes} bytes")(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or as much as proves that it is too large; None if it breaks off."""
        body, more = bytearray(), True
        while more and len(body) <= self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)


async def hung_up(request: Request) -> None:
    """Come back when the client of a request that was read is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def exact(document: Any) -> Any:
    """A schema whose integers have integers as bounds; FastAPI makes floats of them, which end at 2**53."""
    if isinstance(document, list):
        return [exact(inner) for inner in document]
    if not isinstance(document, dict):
        return document
    whole = _BOUNDS if document.get("type") == "integer" else frozenset()
    return {name: int(inner) if name in whole else exact(inner) for name, inner in document.items()}


_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})


def _problem(code: int, field: str | None, message: str, headers: Any = None) -> JSONResponse:
    body = Problems(errors=[Problem(field=field, message=message)])
    return JSONResponse(body.model_dump(), status_code=code, headers=headers)


class LocalHosts:
    """Refuses requests under a host name that is not of this machine: a page of a stranger may bring its own.

    Starlette's TrustedHostMiddleware answers in plain text, where every error here is `Problems`, and releases that
    pyproject.toml admits take `[::1]:8000` apart at the first colon.
    """

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
