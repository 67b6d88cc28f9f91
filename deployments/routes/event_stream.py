"""Server-sent events of one request, for as long as its client listens.

Invariant: however sending ends, at the last event, with a client that hangs up or with a server that shuts down, the
generator of the events is closed before the response is over, so nothing goes on for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse

# A stream without news says so, so that proxies keep it open.
KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends what a generator yields. The request's body must have been read."""

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        # No cache may keep an answer, and no proxy collect it.
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events = events
        self._sending = asyncio.Lock()
        self._sent_at = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI's entry. Raises what the generator raises."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Starlette's own way depends on the server's version: with some it never asks whether the client is there.
        sending = asyncio.ensure_future(self._send_events(send))
        others = [asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._keep_alive(send))]
        try:
            await asyncio.wait([sending, *others], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            # Not left half way when the server cancels a second time: the generator's end is the engine's.
            await asyncio.shield(asyncio.ensure_future(self._end([sending, *others])))

    async def _send_events(self, send: Any) -> None:
        async for event in self._events:
            await self._send(send, event.encode(), more=True)
        await self._send(send, b"", more=False)

    async def _keep_alive(self, send: Any) -> None:
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        while True:
            rest = self._sent_at + KEEP_ALIVE_S - loop.time()
            if rest > 0:
                await asyncio.sleep(rest)
            else:
                await self._send(send, KEEP_ALIVE, more=True)

    async def _send(self, send: Any, piece: bytes, *, more: bool) -> None:
        async with self._sending:
            await send({"type": "http.response.body", "body": piece, "more_body": more})
            self._sent_at = asyncio.get_running_loop().time()

    async def _end(self, tasks: list[asyncio.Future[Any]]) -> None:
        for task in tasks:
            task.cancel()
        # Their ends are of no interest any more; gathered, none is reported as never looked at.
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._events.aclose()


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
