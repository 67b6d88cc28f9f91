"""What becomes of every group of every run, in memory and in the journal.

Invariant: nothing is told to a trainer, and nothing is forgotten, before the journal has it on disk; memory changes
first, and if the journal then fails, nothing is accepted any more (`failure`) until a restart reads the disk. After a
restart `recover` brings back the same runs, leases and trajectories.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors import journal_records as records
from actors.filter_function import FilterFunction
from actors.gallery import Gallery
from actors.groups import Group, GroupBook, GroupState, Member
from actors.history import Histories
from actors.journal import Journal, Statement
from actors.leases import Lease, LeaseBook
from actors.messages import RunSpec, Summary
from actors.metrics import Metrics
from actors.rows import to_rows
from actors.scheduler import Assignment, QueuedGroup, Scheduler
from actors.shelf import Shelf
from rollout.api import RunRequest, RunState
from rollout.errors import JournalError, NotFoundError, RolloutError, describe
from rollout.remote.foreign_client import RemoteSpec
from rollout.trajectory import SessionKey, StopReason, Trajectory

logger = logging.getLogger(__name__)

CAPTURED = "captured"
"""The environment of runs whose sessions are played by black-box agents (see capture_service)."""


@dataclass
class Run:
    """One run: its groups, its settings, and who waits for it."""

    book: GroupBook
    request: RunRequest
    spec: RunSpec
    state: RunState = "running"
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set and replaced at every change."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the trainer that waits for the next batch: first come, first served."""
    filter: FilterFunction | None = None
    filter_error: str | None = None
    leases_expired: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0

    @property
    def captured(self) -> bool:
        """Whether its sessions are opened from outside, and not given to workers."""
        return self.spec.environment == CAPTURED and self.spec.remote is None

    def changed(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class RunStore:
    """All runs over one scheduler and one journal. Lives on one event loop."""

    def __init__(
        self,
        journal: Journal,
        scheduler: Scheduler,
        *,
        cancel_sessions: Callable[[dict[str, list[str]]], None],
        dispatch: Callable[[], None],
        metrics: Metrics | None = None,
        gallery: Gallery | None = None,
    ) -> None:
        """`cancel_sessions`: told trajectory ids by worker. `dispatch`: told that there may be work to hand out.

        `metrics`: told what happens; None: some of its own, which nobody reads.
        `gallery`: where trajectories are kept for viewing; None: one with the default bounds.
        """
        self.journal = journal
        self.scheduler = scheduler
        self.cancel_sessions = cancel_sessions
        self.dispatch = dispatch
        self.metrics = metrics or Metrics()
        self.runs: dict[str, Run] = {}
        self.leases = LeaseBook()
        self.shelf = Shelf()
        self.gallery = gallery or Gallery()
        self.histories = Histories()
        self.version = 0
        """Policy version of the current weights."""
        self.failure: JournalError | None = None
        """Why nothing is accepted any more."""
        self._recovered = False
        self._next_block = 0
        self._background: set[asyncio.Task[None]] = set()

    def recover(self, found: records.Recovered) -> None:
        """Take up what the journal has, before anything else, on the event loop. A second call does nothing."""
        if self._recovered:
            return
        self._recovered = True
        self.version = found.version
        for old in found.runs.values():
            run = self.open(old.run, old.request, old.first_version)
            run.state = old.state
            run.book.settled, run.book.totals = old.totals, copy.deepcopy(old.totals)
            for task_id, digest, outcome in old.done:
                run.book.restore_done(task_id, digest, None if outcome == records.DELIVERED else outcome)
            for task, seq, generation in old.unfinished:
                run.book.restore(task, seq, generation)
        complete = self._recover_blocks(found)
        for name, run in self.runs.items():
            if run.state == "paused":
                self.scheduler.pause(name, True)
            # Before complete groups are judged: one that is replaced is queued by that, and once.
            for group in run.book.unfinished() if not run.captured else []:
                missing = [i for i in range(run.book.group_size) if i not in group.members]
                if missing:
                    self.scheduler.queue(
                        name, QueuedGroup(run.book.group_id(group), group.task, missing, time.time())
                    )
        leased = {(lease.run, seq) for lease in found.leases if lease.state == "active" for seq in lease.groups}
        judged = []
        for name, group in complete:
            if (name, group.seq) in leased:
                self.runs[name].book.accept(group)
            else:
                judged.append((self.runs[name], group))
        for lease in found.leases:
            self._recover_lease(lease)
        for run, group in judged:
            self._complete(run, group)
        for run in self.runs.values():
            if run.state == "cancelled":
                self.end(run)

    def _recover_blocks(self, found: records.Recovered) -> list[tuple[str, Group]]:
        complete = []
        unwanted = []
        for block, summaries, rows in found.blocks:
            self._next_block = block + 1
            wanted = [s for s in summaries if s.run in self.runs and self._book(s).wants(s.group_id, s.sample_index)]
            if not wanted:
                unwanted.append(block)
                continue
            self.shelf.put(block, rows, len(wanted))
            self.gallery.put(rows, wanted, self.version, None)
            for summary in wanted:
                group = self._book(summary).add(summary.group_id, Member(block, summary))
                if group is not None:
                    complete.append((summary.run, group))
        if unwanted:
            self.write_later(records.remove_blocks(unwanted))
        return complete

    def _recover_lease(self, lease: Lease) -> None:
        if lease.run not in self.runs:
            return
        if lease.state == "active":
            book = self.runs[lease.run].book
            groups = [book.get(seq) for seq in lease.groups]
            book.lease([g for g in groups if g is not None and g.state is GroupState.READY], lease.lease_id)
        self.leases.restore(lease)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def run(self, name: str) -> Run:
        try:
            return self.runs[name]
        except KeyError:
            known = ", ".join(list(self.runs)[:10]) or "none"
            raise NotFoundError(f"there is no run {name!r}; the runs are: {known}", "run") from None

    def _book(self, summary: Summary) -> GroupBook:
        return self.runs[summary.run].book

    def open(self, name: str, request: RunRequest, first_version: int) -> Run:
        assert request.environment is not None and request.sampling is not None
        assert request.limits is not None and request.group_size is not None
        filter_function = None
        if request.filters.function is not None:
            filter_function = FilterFunction(request.filters.function)
        where = request.environment
        remote = None
        if where.remote is not None and where.generation is not None:
            remote = RemoteSpec(where.remote, where.generation, where.key_env)
        spec = RunSpec(name, where.path or "", where.args, request.sampling, request.limits, remote)
        run = Run(GroupBook(name, request.group_size, request, first_version), request, spec, filter=filter_function)
        self.runs[name] = run
        self.scheduler.add_run(name, request.share, guest=remote is not None)
        self.metrics.run_opened(name)
        return run

    def queue(self, run: Run, groups: Sequence[Group], *, first: bool = False) -> None:
        indexes = range(run.book.group_size)
        for group in groups if not run.captured else []:
            queued = QueuedGroup(run.book.group_id(group), group.task, indexes, time.time())
            self.scheduler.queue(run.book.run, queued, first=first)
        run.changed()
        self.dispatch()

    async def put(self, summaries: list[Summary], rows: bytes) -> None:
        block, self._next_block = self._next_block, self._next_block + 1
        figures = [summary.figures for summary in summaries]
        for summary in summaries:
            # For the metrics alone: neither the journal nor memory need to hold them.
            summary.figures = None
        await self.write(records.add_block(block, summaries, rows))
        self.shelf.put(block, rows, len(summaries))
        self._show(rows, summaries, time.time())
        unwanted = []
        touched = []
        for summary, counted in zip(summaries, figures, strict=True):
            run = self.runs.get(summary.run)
            member = Member(block, summary)
            if run is None or not run.book.wants(summary.group_id, summary.sample_index):
                unwanted.append(member)
                continue
            touched.append(run)
            self.metrics.finished(summary, counted)
            group = run.book.add(summary.group_id, member)
            if group is not None:
                self._complete(run, group)
        self.release(unwanted)
        for run in {id(run): run for run in touched}.values():
            run.changed()

    def _show(self, rows: bytes, summaries: Sequence[Summary], now: float) -> None:
        """Before anything is decided about them: what is dropped is often what one wants to look at."""
        wanted = [s for s in summaries if s.run in self.runs and self._book(s).wants(s.group_id, s.sample_index)]
        self.gallery.put(rows, wanted, self.version, now)
        self.histories.add(wanted, self.version, now)

    def _complete(self, run: Run, group: Group) -> None:
        reason = run.book.judge(group, self.version)
        if reason is None and run.filter is not None:
            self._keep(self._ask_filter(run, run.filter, group))
        else:
            self.settle(run, group, reason)

    async def _ask_filter(self, run: Run, function: FilterFunction, group: Group) -> None:
        try:
            reason = await function.judge(self.shelf.table([group]))
        except RolloutError as failure:
            # A broken filter must not eat the trajectories: they are kept, and the run says so.
            run.filter_error, reason = describe(failure), None
            logger.warning("the filter of run %s failed: %s", run.book.run, failure)
        if self.runs.get(run.book.run) is run and run.book.get(group.seq) is group:
            self.settle(run, group, reason)

    def settle(self, run: Run, group: Group, reason: str | None) -> None:
        """What becomes of a group that is complete, or too old."""
        book = run.book
        if reason is None:
            book.accept(group)
            target = run.request.target_groups
            if target is not None and book.accepted >= target:
                self._drop_surplus(run)
        else:
            self.cancel_sessions(self.scheduler.withdraw(book.run, book.group_id(group)))
            if run.state != "cancelled" and book.replaces(group, reason):
                self.gallery.settle(book.group_id(group), "replaced", reason)
                again, members = book.replace(group, reason)
                self.metrics.replaced(book.run, reason)
                self.write_later(records.replace_group(book.run, again))
                self.release(members)
                self.queue(run, [again], first=True)
            else:
                self.drop(run, group, reason)
        run.changed()

    def drop(self, run: Run, group: Group, reason: str) -> None:
        self.gallery.settle(run.book.group_id(group), "dropped", reason)
        members = run.book.drop(group, reason)
        self.metrics.dropped(run.book.run, reason)
        self.write_later(*records.finish_groups(run.book.run, [group.seq], reason, run.book.settled))
        self.release(members)

    def _drop_surplus(self, run: Run) -> None:
        for group in run.book.unfinished():
            if len(group.members) == run.book.group_size:
                # Being judged, or found in the journal: it was played in time.
                continue
            self.cancel_sessions(self.scheduler.withdraw(run.book.run, run.book.group_id(group)))
            self.drop(run, group, "surplus")

    def end(self, run: Run) -> None:
        groups, unplayed, running = self.scheduler.end_run(run.book.run)
        for queued in groups:
            group = run.book.find(queued.group_id)
            if group is not None and not group.members:
                self.drop(run, group, "cancelled")
            elif group is not None:
                # Found in the journal half-played: the rest of it is given up.
                keys = [
                    SessionKey(run.book.run, queued.task.task_id, queued.group_id, index) for index in queued.indexes
                ]
                unplayed += [Assignment(key, queued.task, 1) for key in keys]
        self.cancel_sessions(running)
        self._keep(self.give_up(unplayed, "cancelled", None))
        run.changed()

    def release(self, members: Sequence[Member]) -> None:
        if members and (blocks := self.shelf.release(members)):
            self.write_later(records.remove_blocks(blocks))

    async def give_up(
        self, assignments: Sequence[Assignment], stop_reason: StopReason, failure: RolloutError | None
    ) -> None:
        """Samples that will not be played (again) become trajectories without tokens."""
        trajectories = [_unplayed(assignment, stop_reason, failure) for assignment in assignments]
        if trajectories:
            rows, summaries = to_rows(trajectories)
            await self.put(summaries, rows)

    async def write(self, *statements: Statement) -> None:
        try:
            await self.journal.write(*statements)
        except JournalError as failure:
            # From here on memory and disk may differ: nothing more is promised until a restart reads the disk.
            self.failure = failure
            raise

    def write_later(self, *statements: Statement) -> None:
        self._keep(self.write(*statements))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("background work failed", exc_info=failure)
            self.failure = self.failure or JournalError(f"background work failed: {failure!r}")

    async def close(self) -> None:
        """Let what is being written be written."""
        await asyncio.gather(*self._background, return_exceptions=True)
        self.journal.close()


def _unplayed(assignment: Assignment, stop_reason: StopReason, failure: RolloutError | None) -> Trajectory:
    """The trajectory of a sample that left no tokens."""
    return Trajectory(
        assignment.key,
        [],
        stop_reason,
        list(assignment.task.messages),
        error=None if failure is None else describe(failure),
        metadata=assignment.task.metadata,
        attempts=assignment.attempt,
    )
