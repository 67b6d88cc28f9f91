"""Access control of an HTTP application, as one ASGI middleware: the gateway's and each engine's alike.

Invariant: nothing reaches the application that `rollout.access.Gate` has not let in, and every response carries its
correlation id, a failure's too. A streamed response costs nothing more for each of its pieces: they are handed to the
server's own `send`, and a request is counted out when the application is done with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from rollout.access import AccessSettings, Caller, Gate, Refusal
from rollout.correlation import choose_id, correlation_id

if TYPE_CHECKING:
    from starlette.applications import Starlette

logger = logging.getLogger(__name__)

ID_HEADER = b"x-correlation-id"
# WebSocket's close code for "against the rules here".
POLICY_VIOLATION = 1008
# Seconds for which a browser may remember a preflight's answer.
PREFLIGHT_SECONDS = 600
# Of a content-length. Python refuses to read numbers of thousands of digits.
MAX_LENGTH_DIGITS = 18
_START, _BODY = "http.response.start", "http.response.body"
_READ_HEADERS = frozenset(
    {b"authorization", b"x-api-key", ID_HEADER, b"x-request-id", b"content-length", b"transfer-encoding"}
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def install(app: Starlette, access: AccessSettings) -> None:
    """Puts access control around a FastAPI or Starlette application, outside of everything that it has.

    Once, before it serves; raises RuntimeError afterwards, ConfigError where PyJWT is needed and missing.
    """
    if app.middleware_stack is not None:
        raise RuntimeError("access control must be installed before the application serves its first request")
    # vLLM's application lets every origin in by default. Which ones may is said in one place, `access`.
    app.user_middleware = [item for item in app.user_middleware if item.cls is not CORSMiddleware]
    gate = Gate(access)
    build = app.build_middleware_stack

    def build_guarded() -> Application:
        return AccessMiddleware(build(), gate)

    # Not add_middleware: what is added so stands inside Starlette's handler of unexpected errors, whose answers
    # would go out without a correlation id.
    app.build_middleware_stack = build_guarded  # type: ignore[method-assign, assignment]


class AccessMiddleware:
    """Correlation id, then CORS, then the gate, then the application."""

    def __init__(self, app: Application, gate: Gate) -> None:
        self._app = app
        self._gate = gate
        self._inner: Application = self._guarded
        if origins := gate.settings.cors_origins:
            # Outside of the gate: a preflight carries no key, and a browser shows no refusal without these headers.
            # It looks at each piece of a response, which is why it is only there when asked for.
            self._inner = CORSMiddleware(
                self._guarded,
                allow_origins=list(origins),
                allow_methods=["GET", "POST", "DELETE"],
                # Clients send many of their own; none of them is more than text. Keys are headers, never cookies.
                allow_headers=["*"],
                expose_headers=["X-Correlation-ID", "Retry-After", "x-rollout-lease"],
                max_age=PREFLIGHT_SECONDS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry. Raises what the application raises."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind == "websocket":
            # Before it is accepted, this is a 403. Nothing of ours speaks it, and vLLM's would pass by the gate.
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if kind != "http":
            raise ValueError(f"{kind} is not served")
        headers = _wanted(scope["headers"])
        chosen = choose_id(_text(headers, ID_HEADER), _text(headers, b"x-request-id"))
        state = {**scope.get("state", {}), "correlation_id": chosen}
        # Of this request alone: a server may hand one dictionary to all.
        scope = {**scope, "state": state}
        token = correlation_id.set(chosen)
        try:
            await self._inner(scope, receive, _identified(send, chosen))
        finally:
            correlation_id.reset(token)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, headers = self._gate, _wanted(scope["headers"])
        client = scope.get("client")
        found = gate.admit(scope["method"], route_path(scope), headers, client[0] if client else "unknown address")
        if isinstance(found, Refusal):
            await _refuse(scope, send, found)
            return
        announced = _announced(headers)
        refusal = None if announced is None else gate.too_large(announced)
        refusal = refusal or gate.enter(found)
        if refusal is not None:
            await _refuse(scope, send, refusal, found)
            return
        try:
            scope["state"]["caller"], scope["state"]["scopes"] = found.name, found.scopes
            if announced is not None or gate.settings.max_body_bytes is None:
                await self._app(scope, receive, send)
            else:
                await _Bounded(gate, receive, send).serve(self._app, scope)
        finally:
            gate.leave(found)


class _Bounded:
    """One request whose body has no announced length, and is counted while it is received."""

    def __init__(self, gate: Gate, receive: Receive, send: Send) -> None:
        self._gate, self._receive, self._send = gate, receive, send
        self._size = 0
        self._started = False
        self._refusal: Refusal | None = None

    async def serve(self, app: Application, scope: Scope) -> None:
        """Runs the application. Where its request was too large, what it says of that is replaced by our answer."""
        try:
            await app(scope, self._counted, self._replaced)
        except Exception:
            # Half an answer is out, and the server must break it off; or it is none of ours.
            if self._started or self._refusal is None:
                raise
        if self._refusal is not None and not self._started:
            await _refuse(scope, self._send, self._refusal)

    async def _counted(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._refusal = self._gate.too_large(self._size)
            if self._refusal is not None:
                # Applications answer this kind without logging a stack.
                raise HTTPException(413, self._refusal.message)
        return message

    def _replaced(self, message: Message) -> Awaitable[None]:
        # No coroutine of its own, as a piece passes here thousands of times a second.
        if self._refusal is not None and not self._started:
            return _nothing()
        if message["type"] != _BODY:
            self._started = True
        return self._send(message)


async def _nothing() -> None:
    return None


def _identified(send: Send, chosen: str) -> Send:
    """`send` with the correlation id added to a response's headers."""
    header = (ID_HEADER, chosen.encode())

    def identified(message: Message) -> Awaitable[None]:
        # Returns the server's own awaitable: for a piece of a body this is one comparison and no coroutine.
        if message["type"] == _START:
            kept = [item for item in message.get("headers", ()) if item[0].lower() != ID_HEADER]
            message = {**message, "headers": [*kept, header]}
        return send(message)

    return identified  # type: ignore[return-value]


async def _refuse(scope: Scope, send: Send, refusal: Refusal, caller: Caller | None = None) -> None:
    path = route_path(scope)
    who = "somebody" if caller is None else caller.name
    # The path as a literal: whoever sent it may have put line breaks into it.
    logger.info("%s %r of %s refused: %d %s", scope["method"], path, who, refusal.status, refusal.message)
    content = json.dumps(refusal.body(path, scope["state"]["correlation_id"])).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        **refusal.headers(),
    }
    await send({"type": _START, "status": refusal.status, "headers": _encoded(headers)})
    await send({"type": _BODY, "body": b"" if scope["method"] == "HEAD" else content})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _wanted(headers: Any) -> dict[bytes, bytes]:
    """The headers that decide, by name; the first where one is repeated."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if (lower := name.lower()) in _READ_HEADERS:
            found.setdefault(lower, value)
    return found


def _announced(headers: Mapping[bytes, bytes]) -> int | None:
    """The body's length where it is certain: the server's parser ends the body there. Chunks override the header."""
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit() or len(length) > MAX_LENGTH_DIGITS:
        return None
    return int(length)


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


def route_path(scope: Scope) -> str:
    """The path that the application's routers match: without the prefix that the server mounts it under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    rest = path[len(root) :]
    return rest if root and path.startswith(root) and rest[:1] in ("", "/") else path
