"""The engine as a session worker sees it: `generate`, over lanes to whichever replicas are running.

Invariant: a turn is answered by one replica or fails within its timeout. When a replica dies, its turns are sent
again elsewhere (nothing of the lost answer was recorded, so this is a fresh sample of the same context); where
there is no replica they wait for one until their deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from actors.lanes import Lane, LaneBroken
from actors.replica_board import BOARD
from actors.routing import ReplicaLoad, choose_replica
from rollout.engine import GenerateRequest, Generation
from rollout.errors import EngineDied, EngineTimeout

logger = logging.getLogger(__name__)

# A turn is sent again this often after its replica died; a context that kills every engine must end somewhere.
MAX_RESENDS = 3
# A replica whose engine reported its own death gets nothing more for this long: Serve needs up to a few health
# checks to replace it, and until then it would swallow every request at once.
SUSPECT_S = 5.0
# How often a waiting turn looks for a replica although no change was announced.
POLL_S = 0.25


@dataclass(frozen=True)
class EngineInfo:
    """What a replica says of its engine."""

    model: str
    max_model_len: int
    tensor_parallel_size: int
    version: int
    address: str = ""
    """host:port of its own HTTP server, which speaks OpenAI's protocol; empty: it has none."""


class _ServeRemote:
    """A replica's side of a lane behind a Serve handle, addressed by the replica's id."""

    def __init__(self, handle: Any, replica: str) -> None:
        self._calls = handle.options(session_id=replica)
        self._stream = handle.options(session_id=replica, stream=True)

    async def submit(self, lane_id: str, requests: Sequence[GenerateRequest]) -> None:
        await self._calls.submit.remote(lane_id, requests)

    async def cancel(self, lane_id: str, request_ids: Sequence[str]) -> None:
        await self._calls.cancel.remote(lane_id, request_ids)

    async def results(self, lane_id: str) -> AsyncIterator[Any]:
        stream = self._stream.results.remote(lane_id)
        try:
            async for batch in stream:
                yield batch
        finally:
            stream.cancel()


class EngineClient:
    """Implements rollout.engine.Engine over a Serve deployment handle."""

    def __init__(self, handle: Any, *, worker_id: str, sticky_margin: int) -> None:
        self._handle = handle
        # Workers of several controllers may share an engine and a name; lanes and requests must never share an id,
        # or the answers of one would be taken by the other.
        self._worker_id = f"{worker_id}-{uuid.uuid4().hex[:8]}"
        self._margin = sticky_margin
        self._lanes: dict[str, Lane] = {}
        self._suspects: dict[str, float] = {}
        self._avoided: frozenset[str] = frozenset()
        self._held_by: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._serial = itertools.count()
        self._info: EngineInfo | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.resends = 0
        """Turns sent again because their replica died."""

    async def connect(self, timeout: float) -> EngineInfo:
        """Wait for a replica, learn what it runs, and open lanes. Raises EngineTimeout after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                info: EngineInfo = await self._handle.describe.remote()
        except TimeoutError:
            raise EngineTimeout(f"no engine replica became ready within {timeout:g} s") from None
        self._info = info
        self._loop = asyncio.get_running_loop()
        BOARD.subscribe(self._handle.deployment_name, self._hear)
        return info

    @property
    def max_model_len(self) -> int:
        """Context length of the model. Raises RuntimeError before `connect`."""
        if self._info is None:
            raise RuntimeError("connect() comes first")
        return self._info.max_model_len

    @property
    def replicas(self) -> dict[str, ReplicaLoad]:
        """The replicas that can be used now."""
        now = asyncio.get_running_loop().time()
        return {
            name: ReplicaLoad(lane.in_flight, lane.version)
            for name, lane in self._lanes.items()
            if lane.broken is None and self._suspects.get(name, 0.0) <= now and name not in self._avoided
        }

    async def generate(
        self, prompt_ids: Sequence[int], sampling: dict[str, Any], *, session_id: str, timeout: float
    ) -> Generation:
        """See rollout.engine.Engine.generate."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        prompt = prompt_ids if isinstance(prompt_ids, array) else array("i", prompt_ids)
        failure: LaneBroken | EngineDied | None = None
        for attempt in range(MAX_RESENDS + 1):
            try:
                lane = await self._lane_for(session_id, deadline)
                request = GenerateRequest(f"{self._worker_id}-{next(self._serial)}", prompt, sampling)
                if attempt:
                    self.resends += 1
                return await lane.call(request, deadline - loop.time())
            except TimeoutError:
                raise EngineTimeout(f"no answer within {timeout:g} s") from failure
            except LaneBroken as broken:
                failure = broken
            except EngineDied as died:
                # The replica lives, its engine does not; Serve's health check will replace it.
                self._suspects[lane.replica] = loop.time() + SUSPECT_S
                failure = died
        raise EngineDied(f"{MAX_RESENDS + 1} replicas died over this turn; the last: {failure}")

    def avoid(self, replicas: frozenset[str]) -> None:
        """Send these replicas nothing more, and the others again. What they hold, they may finish."""
        self._avoided = replicas
        self._changed.set()

    def forget(self, session_id: str) -> None:
        """A session has ended: its prefix needs no replica any more."""
        self._held_by.pop(session_id, None)

    def close(self) -> None:
        """Close all lanes."""
        BOARD.unsubscribe(self._handle.deployment_name, self._hear)
        for lane in self._lanes.values():
            lane.close("the worker is closing")

    async def _lane_for(self, session_id: str, deadline: float) -> Lane:
        loop = asyncio.get_running_loop()
        while True:
            self._reopen_broken()
            name = choose_replica(self.replicas, self._held_by.get(session_id), self._margin)
            if name is not None:
                self._held_by[session_id] = name
                return self._lanes[name]
            left = deadline - loop.time()
            if left <= 0:
                raise TimeoutError
            self._changed.clear()
            try:
                async with asyncio.timeout(min(left, POLL_S)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _hear(self, names: frozenset[str]) -> None:
        # The board calls from the router's thread.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_replicas, names)

    def _on_replicas(self, names: frozenset[str]) -> None:
        for name in list(self._lanes):
            if name not in names:
                self._retire(name)
        for name in names:
            if name not in self._lanes:
                self._open(name)
        self._changed.set()

    def _open(self, name: str) -> None:
        self._lanes[name] = Lane(self._worker_id, name, _ServeRemote(self._handle, name))

    def _retire(self, name: str) -> None:
        """A replica that Serve no longer lists: dead, or draining after a scale-down, which is treated alike."""
        self._lanes.pop(name).close(f"replica {name} is no longer running")
        self._suspects.pop(name, None)

    def _reopen_broken(self) -> None:
        # Serve still lists the replica, so only the stream broke; after a pause it may be tried again.
        now = asyncio.get_running_loop().time()
        for name, lane in list(self._lanes.items()):
            if lane.broken is None:
                continue
            if name not in self._suspects:
                self._suspects[name] = now + SUSPECT_S
            elif self._suspects[name] <= now:
                del self._suspects[name]
                self._open(name)
