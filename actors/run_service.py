"""Runs and tasks, as trainers ask for them, and what the session workers hand in.

Invariant: whatever is acknowledged here is in the journal. Requests are checked before anything changes. No Ray: the
controller around it talks to the workers. Batches are given out by `delivery`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from actors import journal_records as records
from actors.foreign_rollouts import check_remote
from actors.groups import GroupState
from actors.messages import Collected, ForeignSettings, RunSpec
from actors.run_store import Run, RunStore
from rollout.api import RunInfo, RunRequest, Submitted
from rollout.errors import BusyError, ConflictError, NotFoundError, RefusedError
from rollout.tasks import Task

# Tasks that may wait, of all runs; each takes about 3 KB here.
MAX_BACKLOG = 500_000
# Finished rows in memory beyond which nothing new is started until batches are acknowledged.
MAX_SHELF_BYTES = 4 * 2**30
# A trainer that was refused for a full backlog may try again after so many seconds.
RETRY_AFTER_S = 5.0
MAX_RUNS = 1_000
# A new run waits so long for the sessions of a forgotten one of its name.
ENDING_SECONDS = 10.0
ENDING_POLL_S = 0.05


class RunService:
    """The operations on runs."""

    def __init__(self, store: RunStore, defaults: RunRequest, foreign: ForeignSettings | None = None) -> None:
        """`defaults`: what runs take from the config. `foreign`: None: no run is played at a rollout server."""
        self._store = store
        self._defaults = defaults
        self._foreign = foreign

    async def create(self, request: RunRequest) -> RunInfo:
        """A new run, or the one that the same request made. Raises ConflictError, RefusedError, BusyError."""
        self._store.check()
        name = request.name or f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        full = self._complete_request(request, name)
        await self._until_ended(name)
        if (known := self._store.runs.get(name)) is not None:
            if known.request != full:
                raise ConflictError(f"run {name!r} exists with other settings; choose another name", "name")
            await self._store.write()
            return self.info(name)
        if len(self._store.runs) >= MAX_RUNS:
            raise BusyError(f"there are {MAX_RUNS} runs; forget some that are finished", RETRY_AFTER_S)
        self._store.open(name, full, self._store.version)
        await self._store.write(records.add_run(name, full, self._store.version))
        return self.info(name)

    async def _until_ended(self, name: str) -> None:
        """Nothing that a forgotten run's sessions still answer may be taken for the new run's."""
        try:
            async with asyncio.timeout(ENDING_SECONDS):
                while self._store.scheduler.ending(name):
                    await asyncio.sleep(ENDING_POLL_S)
        except TimeoutError:
            raise BusyError(
                f"sessions of the forgotten run {name!r} are still ending; try again, or choose another name",
                RETRY_AFTER_S,
            ) from None

    async def pause(self, run_name: str, paused: bool) -> RunInfo:
        """Start nothing new of a run, or go on. Sessions that run, run on."""
        self._store.check()
        run = self._store.run(run_name)
        if run.state == "cancelled":
            raise ConflictError(f"run {run_name!r} is cancelled")
        run.state = "paused" if paused else "running"
        self._store.scheduler.pause(run_name, paused)
        await self._store.write(records.set_run_state(run_name, run.state))
        run.changed()
        self._store.dispatch()
        return self.info(run_name)

    async def cancel(self, run_name: str) -> RunInfo:
        """End a run: groups that wait are dropped, running sessions end as `cancelled` with what they have.

        What has finished can still be leased.
        """
        self._store.check()
        run = self._store.run(run_name)
        run.state = "cancelled"
        await self._store.write(records.set_run_state(run_name, "cancelled"))
        self._store.end(run)
        return self.info(run_name)

    async def forget(self, run_name: str) -> None:
        """Drop a run with everything that it has, delivered or not."""
        self._store.check()
        run = self._store.runs.pop(run_name, None)
        if run is None:
            raise NotFoundError(f"there is no run {run_name!r}", "run")
        self._store.cancel_sessions(self._store.scheduler.remove_run(run_name))
        members = [m for g in run.book.groups() for m in g.members.values()]
        self._store.leases.forget_run(run_name)
        blocks = self._store.shelf.release(members)
        run.changed()
        await self._store.write(*records.remove_run(run_name), records.remove_blocks(blocks))

    def info(self, run_name: str) -> RunInfo:
        """A run at this moment. Raises NotFoundError."""
        run = self._store.run(run_name)
        book, counts = run.book, self._store.scheduler.counts(run_name)
        totals = book.totals
        return RunInfo(
            run=run_name,
            state=run.state,
            environment=run.spec.played_in,
            group_size=book.group_size,
            submitted=book.submitted,
            waiting=book.count(GroupState.WAITING),
            running=book.count(GroupState.RUNNING),
            ready=book.count(GroupState.READY),
            leased=book.count(GroupState.LEASED),
            delivered=book.delivered,
            dropped=dict(book.dropped),
            replaced=dict(book.replaced),
            sessions_running=counts.running,
            sessions_done=sum(totals.stop_reasons.values()),
            sessions_retried=counts.retried,
            tokens=totals.tokens,
            turns=totals.turns,
            tool_calls=totals.tool_calls,
            tool_errors=totals.tool_errors,
            forks=totals.forks,
            scored=totals.scored,
            reward_sum=totals.reward_sum,
            stop_reasons=dict(totals.stop_reasons),
            leases_expired=run.leases_expired,
            staleness_sum=run.staleness_sum,
            staleness_max=run.staleness_max,
            held_by=self._held_by(run),
            policy_version=self._store.version,
            filter_error=run.filter_error,
        )

    def runs(self) -> list[RunInfo]:
        """All runs, oldest first."""
        return [self.info(name) for name in self._store.runs]

    async def watch(self, run_name: str, timeout: float) -> RunInfo:
        """The run as it is after its next change, or after `timeout` seconds."""
        run = self._store.run(run_name)
        try:
            async with asyncio.timeout(timeout):
                await run.news.wait()
        except TimeoutError:
            pass
        return self.info(run_name)

    async def submit(self, run_name: str, tasks: Sequence[Task]) -> Submitted:
        """Queue tasks. Those that the run has already are not queued again. Raises ConflictError, BusyError."""
        self._store.check()
        run = self._store.run(run_name)
        if run.state == "cancelled":
            raise ConflictError(f"run {run_name!r} is cancelled and takes no more tasks")
        backlog = sum(r.book.count(GroupState.WAITING) for r in self._store.runs.values())
        if backlog + len(tasks) > MAX_BACKLOG:
            raise BusyError(f"{backlog} tasks are waiting, at most {MAX_BACKLOG} may", RETRY_AFTER_S)
        groups, duplicates = run.book.submit(tasks)
        # Duplicates are acknowledged as well, so that the write comes after the one that they repeat.
        await self._store.write(*([records.add_tasks(run_name, groups)] if groups else []))
        if self._store.runs.get(run_name) is not run:
            raise NotFoundError(f"run {run_name!r} was forgotten meanwhile", "run")
        if run.state == "cancelled":
            for group in groups:
                self._store.drop(run, group, "cancelled")
        else:
            self._store.queue(run, groups)
        return Submitted(len(groups), duplicates)

    def admit(self, run_name: str, group_id: str) -> bool:
        """The scheduler asks before it starts a group."""
        return self._store.shelf.num_bytes < MAX_SHELF_BYTES and self._store.run(run_name).book.admit(
            group_id, self._store.version
        )

    def spec(self, run_name: str) -> RunSpec:
        """How sessions of a run are played."""
        return self._store.run(run_name).spec

    async def accept(self, worker: str, collected: Collected) -> None:
        """Finished attempts of a worker: journal those that are wanted, then count them."""
        wanted = [
            s
            for s in collected.summaries
            if self._store.scheduler.finished(worker, s.trajectory_id, s.attempt, retryable=s.retryable)
        ]
        if wanted:
            assert collected.rows is not None, "summaries come with rows"
            await self._store.put(wanted, collected.rows)

    def set_version(self, version: int) -> None:
        """New weights are current. Groups that are too old for them are played again."""
        self._store.version = version
        for run in self._store.runs.values():
            for group in run.book.too_old(version):
                self._store.settle(run, group, "stale")
            run.changed()
        self._store.dispatch()

    def _complete_request(self, request: RunRequest, name: str) -> RunRequest:
        given = {f: v for f in RunRequest.model_fields if (v := getattr(request, f)) is not None}
        default = {f: v for f in RunRequest.model_fields if (v := getattr(self._defaults, f)) is not None}
        full = RunRequest.model_validate({**default, **given, "name": name})
        if full.environment is None:
            raise RefusedError("the run names no environment, and the cluster's config has none", "environment")
        check_remote(full.environment, self._foreign)
        return full

    def _held_by(self, run: Run) -> str | None:
        if run.state == "paused":
            return "paused"
        if self._store.shelf.num_bytes >= MAX_SHELF_BYTES:
            return "memory"
        return "staleness" if run.book.held_back(self._store.version) else None
