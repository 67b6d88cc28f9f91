"""The trainer's client: tasks in, batches out, weights back.

    client = AsyncRolloutClient("http://127.0.0.1:8800")
    run = await client.create_run(group_size=8, max_staleness=2)
    await client.submit(run.run, tasks)
    async for batch in client.batches(run.run, groups=16):
        train(batch.table)
        await client.update_weights("/checkpoints/step-17")

Invariant: a batch is acknowledged only after the trainer's code has asked for the next one, or left the block; if
that code raised, it is given back. (`RolloutClient`, for code without asyncio, runs this one: see sync_client.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.api import (
    DEFAULT_LEASE_S,
    MAX_TASKS_PER_CALL,
    MAX_WAIT_S,
    Acknowledged,
    Batch,
    CapturedSession,
    LeaseRequest,
    NoBatch,
    OpenedSession,
    RunInfo,
    RunRequest,
    Submitted,
)
from rollout.backend import Backend
from rollout.capture.session_book import CaptureLimits
from rollout.errors import ApiError, ConflictError, NotFoundError, RolloutError
from rollout.http_backend import HttpBackend
from rollout.tasks import Task, read_tasks
from rollout.weights import CheckpointSource, WeightReport, WeightSource

logger = logging.getLogger(__name__)

Tasks = Iterable[Task | dict[str, Any]] | Path | str
"""Tasks, or objects of their fields, or the path of a JSONL file."""

# A batch is extended when so much of its lease is over while the trainer still works on it.
EXTEND_AT = 0.5
# An extension that failed although it was repeated is tried again after so many seconds.
EXTEND_RETRY_S = 2.0
# Tasks of one call where they are sent in bulk.
SUBMIT_CHUNK = 2_000


class AsyncRolloutClient:
    """The client for asyncio. All methods raise ApiError for what the cluster refuses."""

    def __init__(self, address: str | Backend, *, api_key: str | None = None) -> None:
        """`address`: of a gateway, or a backend such as actors.ray_backend.RayBackend()."""
        self._backend: Backend = HttpBackend(address, api_key=api_key) if isinstance(address, str) else address

    async def __aenter__(self) -> AsyncRolloutClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Release connections."""
        await self._backend.close()

    # Runs

    async def create_run(self, request: RunRequest | None = None, **fields: Any) -> RunInfo:
        """A new run; the fields are RunRequest's. Raises pydantic's ValidationError for a field that is wrong."""
        wanted = request or RunRequest.model_validate(fields)
        if wanted.name is None:
            # Named here, so that a repeated call is the same run.
            wanted = wanted.model_copy(update={"name": f"run-{uuid.uuid4().hex[:12]}"})
        return await self._backend.create_run(wanted)

    async def run_info(self, run: str) -> RunInfo:
        """A run at this moment."""
        return await self._backend.run_info(run)

    async def runs(self) -> list[RunInfo]:
        """All runs of the cluster."""
        return await self._backend.runs()

    async def pause(self, run: str) -> RunInfo:
        """Start no more sessions of a run."""
        return await self._backend.pause(run, True)

    async def resume(self, run: str) -> RunInfo:
        """Go on with a paused run."""
        return await self._backend.pause(run, False)

    async def cancel(self, run: str) -> RunInfo:
        """End a run; what has finished can still be leased."""
        return await self._backend.cancel(run)

    async def open_session(
        self, run: str, task: Task | None = None, *, limits: CaptureLimits | None = None
    ) -> OpenedSession:
        """An address and a key for one black-box agent. The run's environment is `captured`; None: a task of its own.

        Point any OpenAI client at `base_url` (Anthropic's at `anthropic_base_url`), then `close_session`.
        """
        return await self._backend.open_session(run, task, limits)

    async def session_info(self, session: str) -> CapturedSession:
        """A captured session at this moment."""
        return await self._backend.session_info(session)

    async def reward_session(
        self, session: str, reward: float | None = None, *, turn_rewards: dict[str, float] | None = None
    ) -> CapturedSession:
        """Score a captured session, or calls of it by their ids."""
        return await self._backend.reward_session(session, reward, turn_rewards)

    async def close_session(
        self, session: str, reward: float | None = None, *, cancel: bool = False
    ) -> CapturedSession:
        """Turn a session's calls into a trajectory of its run."""
        if reward is not None:
            await self._backend.reward_session(session, reward, None)
        return await self._backend.close_session(session, cancel)

    async def forget(self, run: str) -> None:
        """Drop a run with everything that it has."""
        await self._backend.forget(run)

    async def events(self, run: str, interval: float = 10.0) -> AsyncIterator[RunInfo]:
        """The run at every change, at least every `interval` seconds, until it is finished."""
        while True:
            info = await self._backend.watch(run, interval)
            yield info
            if info.finished:
                return

    # Tasks and batches

    async def submit(self, run: str, tasks: Tasks) -> Submitted:
        """Queue tasks, in as many calls as it takes. Those that the run knows are not queued again."""
        total = Submitted(0, 0)
        chunk: list[Task] = []
        for task in _tasks(tasks):
            chunk.append(task)
            if len(chunk) == min(SUBMIT_CHUNK, MAX_TASKS_PER_CALL):
                _add(total, await self._backend.submit(run, chunk))
                chunk = []
        if chunk:
            _add(total, await self._backend.submit(run, chunk))
        return total

    async def lease(
        self,
        run: str,
        groups: int,
        *,
        timeout: float = 60.0,
        min_groups: int | None = None,
        ttl: float = DEFAULT_LEASE_S,
    ) -> Batch | NoBatch:
        """Wait up to `timeout` seconds for the next `groups` complete groups. Acknowledge the batch in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            left = max(0.0, deadline - loop.time())
            request = LeaseRequest(
                groups=groups,
                min_groups=min_groups,
                timeout=min(left, MAX_WAIT_S),
                ttl=ttl,
                request_id=uuid.uuid4().hex,
            )
            answer = await self._backend.lease(run, request)
            if isinstance(answer, Batch) or answer.finished or loop.time() >= deadline:
                return answer

    async def fetch(self, lease_id: str) -> Batch:
        """The batch of an active lease once more."""
        return await self._backend.fetch(lease_id)

    async def acknowledge(self, batch: Batch | str) -> Acknowledged:
        """The batch is trained on and will not be delivered again."""
        return await self._backend.acknowledge(batch if isinstance(batch, str) else batch.lease_id)

    async def extend(self, batch: Batch | str, ttl: float = DEFAULT_LEASE_S) -> float:
        """Keep a batch for `ttl` more seconds from now."""
        return await self._backend.extend(batch if isinstance(batch, str) else batch.lease_id, ttl)

    async def release(self, batch: Batch | str) -> None:
        """Give a batch back, for somebody else."""
        await self._backend.release(batch if isinstance(batch, str) else batch.lease_id)

    @asynccontextmanager
    async def using(self, batch: Batch, ttl: float = DEFAULT_LEASE_S) -> AsyncIterator[Batch]:
        """Work on a batch: it is extended meanwhile, acknowledged at the end, given back if the block raises."""
        keeper = asyncio.get_running_loop().create_task(self._keep(batch, ttl))
        try:
            yield batch
        except BaseException:
            keeper.cancel()
            with suppress(ApiError):
                await self.release(batch)
            raise
        keeper.cancel()
        await self.acknowledge(batch)

    async def batches(
        self, run: str, groups: int, *, ttl: float = DEFAULT_LEASE_S, timeout: float = 600.0
    ) -> AsyncIterator[Batch]:
        """One batch after the other until the run is finished; each is acknowledged when the next is asked for.

        Raises RolloutError where none comes within `timeout` seconds, with what the run waits for.
        """
        while True:
            answer = await self.lease(run, groups, ttl=ttl, timeout=timeout)
            if isinstance(answer, NoBatch):
                if answer.finished:
                    return
                raise no_batch_error(run, timeout, answer)
            async with self.using(answer, ttl):
                yield answer

    async def rollout(
        self,
        tasks: Tasks,
        *,
        on_progress: Callable[[RunInfo], None] | None = None,
        progress: bool = False,
        **fields: Any,
    ) -> pa.Table:
        """Tasks in, their trajectories out (rows of the record, as they completed). The fields are RunRequest's.

        `progress`: a bar on the terminal (needs rich). The run is forgotten at the end, and cancelled if this fails.
        """
        loaded = list(_tasks(tasks))
        if not loaded:
            raise RolloutError("there are no tasks to roll out")
        info = await self.create_run(**fields)
        tables: list[pa.Table] = []
        try:
            with _bar(progress) as bar:
                await self.submit(info.run, loaded)
                while not (info := await self.run_info(info.run)).finished:
                    for hear in filter(None, (on_progress, bar)):
                        hear(info)
                    answer = await self.lease(info.run, len(loaded), min_groups=1, timeout=1.0)
                    if isinstance(answer, Batch):
                        async with self.using(answer):
                            tables.append(answer.table)
                for hear in filter(None, (on_progress, bar)):
                    hear(info)
        finally:
            await self.forget(info.run)
        from rollout.record import SCHEMA

        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    # Weights

    async def update_weights(self, source: WeightSource | str | Path, version: int | None = None) -> WeightReport:
        """Bring new weights to all engines and wait until every rank has read them back.

        `source`: a checkpoint directory that the engines can read, or a LoraSource or TransferSource. Raises
        RefusedError where they do not fit; then the old ones are still served.
        """
        if isinstance(source, str | Path):
            source = CheckpointSource(path=os.path.abspath(source))
        return await self._backend.update_weights(source, version)

    async def weights(self) -> dict[str, Any]:
        """Which weights are served: version, source, replicas."""
        return await self._backend.weights()

    async def _keep(self, batch: Batch, ttl: float) -> None:
        pause = EXTEND_AT * ttl
        while True:
            await asyncio.sleep(pause)
            try:
                await self.extend(batch, ttl)
                pause = EXTEND_AT * ttl
            except (ConflictError, NotFoundError) as failure:
                logger.warning("lease %s is lost: %s", batch.lease_id, failure)
                return
            except RolloutError as failure:
                # The cluster may be back before the lease has expired.
                logger.warning("lease %s could not be extended, it is tried again: %s", batch.lease_id, failure)
                pause = EXTEND_RETRY_S


def no_batch_error(run: str, timeout: float, answer: NoBatch) -> RolloutError:
    """What a trainer is told that waited in vain."""
    return RolloutError(
        f"no batch of run {run!r} within {timeout:g} s: {answer.reason} ({answer.ready} groups ready, "
        f"{answer.running} running, {answer.waiting} waiting, {answer.leased} leased)"
    )


def _tasks(tasks: Tasks) -> Iterator[Task]:
    if isinstance(tasks, str | Path):
        yield from read_tasks(tasks)
        return
    for task in tasks:
        yield task if isinstance(task, Task) else Task.model_validate(task)


def _add(total: Submitted, more: Submitted) -> None:
    total.accepted += more.accepted
    total.duplicates += more.duplicates


@contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[RunInfo], None] | None]:
    """A progress bar, where rich is installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not wanted:
        yield None
        return
    with Progress(transient=True) as view:
        task = view.add_task("rollouts", total=None)
        yield lambda info: view.update(task, completed=info.sessions_done, total=info.submitted * info.group_size)
