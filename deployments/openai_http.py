"""A connection to an OpenAI server that streams: what the clients of its single endpoints share.

Invariant: whatever goes wrong on the way is a ChatEngineError that says what; connecting and every wait for the
next byte have deadlines; and leaving a stream closes the connection, which ends the completion in the engine.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import httpx

from rollout.agents.chat_engine import ChatEngineError, Chunk

CONNECT_SECONDS = 5.0
# Between two pieces of a stream, the wait for the first token in the engine's queue included.
IDLE_SECONDS = 300.0
# One event: a chunk is small, and one with many log-probabilities is not a hundred times larger.
MAX_EVENT_BYTES = 16 * 2**20
# Of an error that is not OpenAI's, so much is told.
MAX_ERROR_CHARS = 500
# A server that wants to be asked again later than this is not believed.
MAX_RETRY_AFTER_S = 3600


class OpenAIHttp:
    """An OpenAI server at `base_url`. `model` is the one that it is asked for."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._model = model
        self._idle = idle_seconds
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/"),
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(idle_seconds, connect=connect_seconds),
            # The gateway bounds its requests; httpx's own hundred connections would make the others wait unseen.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            transport=transport,
        )

    @property
    def model(self) -> str:
        """The model's name at the server."""
        return self._model

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    @asynccontextmanager
    async def _streaming(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[Chunk]]:
        """The chunks of the answer to `body`. Entered when the server has accepted it.

        Raises ChatEngineError, whose statuses are the server's, or 400 for a body that is no JSON, 502 broken,
        503 not reached, 504 silent too long.
        """
        content = _written(body)
        headers = {**(headers or {}), "content-type": "application/json"}
        with self._as_engine_errors():
            async with self._http.stream("POST", path, content=content, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    told = _told(response.text, response.status_code)
                    raise ChatEngineError(response.status_code, told, _retry_after(response))
                async with aclosing(self._chunks(response)) as chunks:
                    yield chunks

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[Chunk, None]:
        # The reader may look at an error before it leaves the context, so it is made ours here.
        with self._as_engine_errors():
            async with aclosing(_events(response)) as events:
                async for data in events:
                    if data == b"[DONE]":
                        return
                    yield _chunk(data)

    @contextmanager
    def _as_engine_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
            raise ChatEngineError(503, f"the model cannot be reached: {_said(failure)}") from failure
        except httpx.TimeoutException as failure:
            raise ChatEngineError(504, f"the model said nothing for {self._idle:g} s") from failure
        except httpx.HTTPError as failure:
            raise ChatEngineError(502, f"the connection to the model broke: {_said(failure)}") from failure


def _written(body: Mapping[str, Any]) -> bytes:
    """Strict JSON in UTF-8. Raises ChatEngineError for NaN, halves of characters and endless nesting."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError) as failure:
        raise ChatEngineError(400, f"the request cannot be sent to the model as JSON: {_said(failure)}") from None


def _retry_after(response: httpx.Response) -> float | None:
    told = response.headers.get("retry-after", "")
    # Digits alone: the header's other form is a date.
    return float(min(int(told), MAX_RETRY_AFTER_S)) if told.isascii() and told.isdigit() and len(told) < 10 else None


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event. Split at \\n alone: httpx's own lines also end at U+2028 and its like."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(rest) > MAX_EVENT_BYTES:
            raise ChatEngineError(502, f"the model sent an event of more than {MAX_EVENT_BYTES} bytes")
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _chunk(data: bytes) -> Chunk:
    try:
        chunk = json.loads(data)
    except ValueError as failure:
        raise ChatEngineError(502, f"the model sent a chunk that is not JSON: {failure}") from None
    if not isinstance(chunk, dict):
        raise ChatEngineError(502, f"the model sent a chunk that is a {type(chunk).__name__}")
    error = chunk.get("error")
    if error:
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
        raise ChatEngineError(status, _message(error))
    return chunk


def _told(text: str, status: int) -> str:
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if isinstance(body, dict) and body.get("error"):
        return _message(body["error"])
    return f"the model answered HTTP {status}: {text[:MAX_ERROR_CHARS]}"


def _message(error: Any) -> str:
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)


def _said(failure: BaseException) -> str:
    return str(failure) or type(failure).__name__
