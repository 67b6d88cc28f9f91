"""An ASGI application on a free port of this machine, in this process's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

START_SECONDS = 30.0


@asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[str]:
    """Its address, for as long as the block runs. `options` are uvicorn's."""
    options = {"host": "127.0.0.1", "port": 0, "log_level": "error", **options}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    running = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(START_SECONDS):
            while not server.started:
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
