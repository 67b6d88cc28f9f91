"""Lanes: batched calls between a session worker and engine replicas.

A lane joins one worker to one replica: requests that become ready within FLUSH_S leave as one `submit`, answers
come back in batches over one long-lived `results` stream. One Serve call a turn gave 0.65 of the raw engine on
two cores, lanes 0.95.

Invariant: every request handed to a lane is answered exactly once, by a Generation or an exception; when a lane
breaks, all that it holds fail at once with LaneBroken. Nothing waits for a lane that is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from rollout.engine import GenerateRequest, Generation
from rollout.errors import EngineError

logger = logging.getLogger(__name__)

# Requests that become ready within this time leave together.
FLUSH_S = 0.002
# So many leave without waiting for others, and so many answers are handed out before the loop goes round. When a
# whole batch of turns ends at once, the engine is at work on the first of the next turns while the last of the old
# ones are still being parsed: 64 sessions in step got 0.87 of the raw engine without this.
CHUNK = 16
# A submit or cancel that the replica has not taken by then breaks the lane.
CALL_TIMEOUT_S = 30.0

Answer = tuple[str, Generation | Exception]
"""Request id and what came of it."""


class LaneBroken(EngineError):
    """The replica went away, or its stream did; the request may be sent again elsewhere."""

    category = "engine_died"
    retryable = True


class Batch(Protocol):
    """One message of the results stream."""

    answers: list[Answer]
    in_flight: int
    version: int


class Remote(Protocol):
    """The replica's side of a lane, as calls. The Serve handle is behind it, or a test's double."""

    async def submit(self, lane_id: str, requests: Sequence[GenerateRequest]) -> None: ...
    async def cancel(self, lane_id: str, request_ids: Sequence[str]) -> None: ...
    def results(self, lane_id: str) -> AsyncIterator[Any]: ...


class Lane:
    """The worker's end of one lane. Lives on one event loop."""

    _serial = itertools.count()

    def __init__(self, worker_id: str, replica: str, remote: Remote) -> None:
        self.replica = replica
        # A new id each time: a replica must not mix a reopened lane with what is left of the broken one.
        self.lane_id = f"{worker_id}#{next(self._serial)}"
        self.version = 0
        self.reported_in_flight = 0
        self.broken: str | None = None
        """Why it can no longer be used; None while it can."""
        self._remote = remote
        self._waiting: dict[str, asyncio.Future[Generation]] = {}
        self._outbox: list[GenerateRequest] = []
        self._cancels: list[str] = []
        self._flush_due: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()
        # One message after the other: a cancel that overtook its submit would find nothing to cancel.
        self._sending = asyncio.Lock()
        self._receiver = asyncio.get_running_loop().create_task(self._receive())

    @property
    def in_flight(self) -> int:
        """Requests at the replica: this worker's, or all that it last reported, whichever is more."""
        return max(len(self._waiting), self.reported_in_flight)

    async def call(self, request: GenerateRequest, timeout: float) -> Generation:
        """Send one request and wait for its answer.

        Raises LaneBroken, TimeoutError after `timeout` seconds, or what the engine raised. Giving up, by time
        or by cancellation, stops the engine's work on it.
        """
        if self.broken is not None:
            raise LaneBroken(self.broken)
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        self._outbox.append(request)
        self._flush_soon()
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            if self._waiting.pop(request.request_id, None) is not None and self.broken is None:
                # Nobody waits any more, but the replica may still be at it.
                self._cancels.append(request.request_id)
                self._flush_soon()

    def close(self, reason: str) -> None:
        """Break the lane: what it holds fails with LaneBroken, and the replica drops its end."""
        if self.broken is not None:
            return
        self.broken = reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LaneBroken(reason))
        self._waiting.clear()
        if self._flush_due is not None:
            self._flush_due.cancel()
        self._receiver.cancel()
        for task in self._calls:
            task.cancel()

    def _flush_soon(self) -> None:
        if len(self._outbox) >= CHUNK:
            if self._flush_due is not None:
                self._flush_due.cancel()
            self._flush()
        elif self._flush_due is None:
            self._flush_due = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._flush_due = None
        requests, self._outbox = self._outbox, []
        cancels, self._cancels = self._cancels, []
        # A request that was given up before it left needs neither message.
        unsent = {request.request_id for request in requests} - self._waiting.keys()
        requests = [request for request in requests if request.request_id not in unsent]
        cancels = [request_id for request_id in cancels if request_id not in unsent]
        if requests or cancels:
            task = asyncio.get_running_loop().create_task(self._send(requests, cancels))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _send(self, requests: list[GenerateRequest], cancels: list[str]) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S), self._sending:
                if requests:
                    await self._remote.submit(self.lane_id, requests)
                if cancels:
                    await self._remote.cancel(self.lane_id, cancels)
        except asyncio.CancelledError:
            raise
        except Exception as failure:
            self.close(f"replica {self.replica} took no requests: {type(failure).__name__}: {failure}")

    async def _receive(self) -> None:
        try:
            async for batch in self._remote.results(self.lane_id):
                self.reported_in_flight, self.version = batch.in_flight, batch.version
                for number, (request_id, outcome) in enumerate(batch.answers, start=1):
                    if number % CHUNK == 0:
                        await asyncio.sleep(0)
                    future = self._waiting.pop(request_id, None)
                    if future is None or future.done():
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        outcome.replica = self.replica
                        future.set_result(outcome)
            self.close(f"replica {self.replica} ended its stream")
        except asyncio.CancelledError:
            raise
        except Exception as failure:
            self.close(f"replica {self.replica} went away: {type(failure).__name__}: {str(failure)[:300]}")
