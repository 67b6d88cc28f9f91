"""The engine's own HTTP server: vLLM's OpenAI application, served from the replica itself on a port of its own.

Invariant: a token passes nothing of Ray Serve. The application runs on the event loop on which vLLM hands out its
tokens, in vLLM's own server settings, so what it costs is what vLLM's server costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deployments import access
from deployments.capture import CaptureMiddleware, SessionKeeper
from rollout.access import AccessSettings

logger = logging.getLogger(__name__)

START_SECONDS = 30.0
# Streams in flight when the replica is told to stop.
DRAIN_SECONDS = 5.0
# Longer than the front's, or a connection could be closed here just when a request arrives on it.
KEEP_ALIVE_SECONDS = 120
BACKLOG = 2048


@dataclass(frozen=True)
class ServingSpec:
    """How replicas serve OpenAI's protocol."""

    host: str
    """The address to listen on; the port is any free one."""
    access: AccessSettings


class OpenAIServer:
    """Serves an application from the running event loop."""

    def __init__(self, app: Any, spec: ServingSpec, sessions: SessionKeeper, version: Callable[[], int]) -> None:
        """`app`: as vLLM builds it. `sessions` holds the captured ones, `version` tells that of the weights."""
        import uvicorn

        class Quiet(uvicorn.Server):
            """Signals are the replica's own business."""

            def install_signal_handlers(self) -> None: ...

            def capture_signals(self) -> Any:
                return contextlib.nullcontext()

        # A library of vLLM's builds the stack before the first request; it is built again, with ours.
        app.middleware_stack = None
        app.add_middleware(CaptureMiddleware, keeper=sessions, version=version)
        # Here, and not at the gateways: the capture keeps each such key to its session.
        access.install(app, replace(spec.access, session_keys=True))
        self._socket = socket.create_server((spec.host, 0), backlog=BACKLOG)
        self._server = Quiet(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(DRAIN_SECONDS),
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port."""
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    async def start(self) -> None:
        """Listen. Raises TimeoutError, or what uvicorn raises."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._socket]))
        async with asyncio.timeout(START_SECONDS):
            while not self._server.started:
                if self._task.done():
                    self._task.result()
                await asyncio.sleep(0.01)
        logger.info("vLLM's OpenAI application listens at %s", self.address)

    async def stop(self) -> None:
        """Let streams end for a while, then close."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=2 * DRAIN_SECONDS)
        # Bound since it was made, whether it was ever served or not.
        self._socket.close()
