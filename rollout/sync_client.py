"""The trainer's client for code without asyncio.

    client = RolloutClient("http://127.0.0.1:8800")
    run = client.create_run(group_size=8, max_staleness=2)
    client.submit(run.run, tasks)
    for batch in client.batches(run.run, groups=16):
        train(batch.table)
        client.update_weights("/checkpoints/step-17")

Invariant: it does nothing of its own: every call is AsyncRolloutClient's, on an event loop in a thread, so that
leases are extended while the trainer computes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from rollout.api import (
    DEFAULT_LEASE_S,
    Acknowledged,
    Batch,
    CapturedSession,
    NoBatch,
    OpenedSession,
    RunInfo,
    RunRequest,
    Submitted,
)
from rollout.backend import Backend
from rollout.capture.session_book import CaptureLimits
from rollout.client import AsyncRolloutClient, Tasks, no_batch_error
from rollout.tasks import Task
from rollout.weights import WeightReport, WeightSource

T = TypeVar("T")


class RolloutClient:
    """See AsyncRolloutClient for the methods. Safe to use from several threads."""

    def __init__(self, address: str | Backend, *, api_key: str | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()
        self._async = self._run(_made(address, api_key))

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release connections and the thread."""
        if self._loop.is_running():
            self._run(self._async.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)

    def create_run(self, request: RunRequest | None = None, **fields: Any) -> RunInfo:
        """See AsyncRolloutClient.create_run."""
        return self._run(self._async.create_run(request, **fields))

    def run_info(self, run: str) -> RunInfo:
        """See AsyncRolloutClient.run_info."""
        return self._run(self._async.run_info(run))

    def runs(self) -> list[RunInfo]:
        """See AsyncRolloutClient.runs."""
        return self._run(self._async.runs())

    def pause(self, run: str) -> RunInfo:
        """See AsyncRolloutClient.pause."""
        return self._run(self._async.pause(run))

    def resume(self, run: str) -> RunInfo:
        """See AsyncRolloutClient.resume."""
        return self._run(self._async.resume(run))

    def cancel(self, run: str) -> RunInfo:
        """See AsyncRolloutClient.cancel."""
        return self._run(self._async.cancel(run))

    def open_session(
        self, run: str, task: Task | None = None, *, limits: CaptureLimits | None = None
    ) -> OpenedSession:
        """See AsyncRolloutClient.open_session."""
        return self._run(self._async.open_session(run, task, limits=limits))

    def session_info(self, session: str) -> CapturedSession:
        """See AsyncRolloutClient.session_info."""
        return self._run(self._async.session_info(session))

    def reward_session(
        self, session: str, reward: float | None = None, *, turn_rewards: dict[str, float] | None = None
    ) -> CapturedSession:
        """See AsyncRolloutClient.reward_session."""
        return self._run(self._async.reward_session(session, reward, turn_rewards=turn_rewards))

    def close_session(self, session: str, reward: float | None = None, *, cancel: bool = False) -> CapturedSession:
        """See AsyncRolloutClient.close_session."""
        return self._run(self._async.close_session(session, reward, cancel=cancel))

    def forget(self, run: str) -> None:
        """See AsyncRolloutClient.forget."""
        self._run(self._async.forget(run))

    def events(self, run: str, interval: float = 10.0) -> Iterator[RunInfo]:
        """See AsyncRolloutClient.events."""
        yield from self._iterate(self._async.events(run, interval))

    def submit(self, run: str, tasks: Tasks) -> Submitted:
        """See AsyncRolloutClient.submit."""
        return self._run(self._async.submit(run, tasks))

    def lease(self, run: str, groups: int, **options: Any) -> Batch | NoBatch:
        """See AsyncRolloutClient.lease."""
        return self._run(self._async.lease(run, groups, **options))

    def fetch(self, lease_id: str) -> Batch:
        """See AsyncRolloutClient.fetch."""
        return self._run(self._async.fetch(lease_id))

    def acknowledge(self, batch: Batch | str) -> Acknowledged:
        """See AsyncRolloutClient.acknowledge."""
        return self._run(self._async.acknowledge(batch))

    def extend(self, batch: Batch | str, ttl: float = DEFAULT_LEASE_S) -> float:
        """See AsyncRolloutClient.extend."""
        return self._run(self._async.extend(batch, ttl))

    def release(self, batch: Batch | str) -> None:
        """See AsyncRolloutClient.release."""
        self._run(self._async.release(batch))

    @contextmanager
    def using(self, batch: Batch, ttl: float = DEFAULT_LEASE_S) -> Iterator[Batch]:
        """See AsyncRolloutClient.using."""
        manager = self._async.using(batch, ttl)
        self._run(_enter(manager))
        try:
            yield batch
        except BaseException as failure:
            self._run(_exit(manager, failure))
            raise
        self._run(_exit(manager, None))

    def batches(
        self, run: str, groups: int, *, ttl: float = DEFAULT_LEASE_S, timeout: float = 600.0
    ) -> Iterator[Batch]:
        """See AsyncRolloutClient.batches.

        A loop that is left by `break` gives its last batch back, as if it had failed: nobody can tell the two apart.
        """
        while True:
            answer = self.lease(run, groups, ttl=ttl, timeout=timeout)
            if isinstance(answer, NoBatch):
                if answer.finished:
                    return
                raise no_batch_error(run, timeout, answer)
            with self.using(answer, ttl):
                yield answer

    def rollout(self, tasks: Tasks, *, progress: bool = True, **fields: Any) -> pa.Table:
        """See AsyncRolloutClient.rollout."""
        return self._run(self._async.rollout(tasks, progress=progress, **fields))

    def update_weights(self, source: WeightSource | str | Path, version: int | None = None) -> WeightReport:
        """See AsyncRolloutClient.update_weights."""
        return self._run(self._async.update_weights(source, version))

    def weights(self) -> dict[str, Any]:
        """See AsyncRolloutClient.weights."""
        return self._run(self._async.weights())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C here must end the call there.
            future.cancel()
            raise

    def _iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        while True:
            try:
                yield self._run(_next(items))
            except StopAsyncIteration:
                return


async def _made(address: str | Backend, api_key: str | None) -> AsyncRolloutClient:
    return AsyncRolloutClient(address, api_key=api_key)


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)


async def _enter(manager: Any) -> Any:
    return await manager.__aenter__()


async def _exit(manager: Any, failure: BaseException | None) -> None:
    if failure is None:
        await manager.__aexit__(None, None, None)
        return
    with suppress(type(failure)):
        await manager.__aexit__(type(failure), failure, None)
