"""What people may see of the runs: answers from the gallery and the histories.

Invariant: nothing here changes anything, and rows are read in a thread of its own: one search keeps neither the event
loop nor a trainer's batch waiting, and a second search waits for the first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from actors import gallery
from actors.gallery import Entry, Gallery, Line
from actors.groups import GroupState
from actors.history import Histories
from rollout.errors import NotFoundError
from rollout.viewing import (
    GroupFate,
    History,
    Sibling,
    TrajectoryPage,
    TrajectoryQuery,
    TrajectoryRows,
    TrajectorySummary,
)

T = TypeVar("T")

_FATES: dict[GroupState, GroupFate] = {GroupState.READY: "ready", GroupState.LEASED: "leased"}


class Store(Protocol):
    """What there is to look at: a RunStore, or a file (cluster.ui_file)."""

    gallery: Gallery
    histories: Histories

    @property
    def runs(self) -> Mapping[str, Any]:
        """Live runs by name, each with its `book`."""

    def run(self, name: str) -> object:
        """Raises NotFoundError for a run that is not there."""


class Viewer:
    """Implements rollout.viewing.Viewing over a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gallery")

    async def trajectories(self, run: str | None, query: TrajectoryQuery) -> TrajectoryPage:
        """See Viewing."""
        if run is not None:
            self._store.run(run)
        kept = self._store.gallery.entries(run)
        fates = [(entry, self._fate(entry)) for entry in kept]
        newest = kept[-1].number if kept else 0

        def work() -> tuple[list[Entry], list[Line], int, list[int]]:
            found = gallery.find(fates, query)
            page = found[query.offset : query.offset + query.limit]
            versions = {version for entry in kept for version, _ in entry.summary.version_tokens}
            return page, gallery.lines(page), len(found), sorted(versions)

        page, lines, matched, versions = await self._run(work)
        items = [self._summary(entry, line) for entry, line in zip(page, lines, strict=True)]
        return TrajectoryPage(items, matched, len(kept), newest, versions)

    async def trajectory(self, trajectory_id: str) -> TrajectoryRows:
        """See Viewing."""
        entry = self._store.gallery.get(trajectory_id)
        if entry is None:
            raise NotFoundError(
                f"trajectory {trajectory_id!r} is not among those kept for viewing: it has not finished, or newer "
                "ones have taken its place",
                "trajectory_id",
            )
        table, (line,) = await self._run(lambda: (gallery.rows_of(entry), gallery.lines([entry])))
        siblings = [
            Sibling(s.trajectory_id, s.sample_index, s.stop_reason, s.reward)
            for s in (other.summary for other in self._store.gallery.group(entry.summary.group_id))
        ]
        return TrajectoryRows(self._summary(entry, line), table, siblings)

    async def history(self, run: str) -> History:
        """See Viewing."""
        self._store.run(run)
        return self._store.histories.of(run, time.time())

    def _fate(self, entry: Entry) -> GroupFate:
        if entry.fate is not None:
            return entry.fate
        run = self._store.runs.get(entry.summary.run)
        group = None if run is None else run.book.find(entry.summary.group_id)
        # Groups leave the book when they are dropped or replaced, which is noted, or acknowledged.
        return "delivered" if group is None else _FATES.get(group.state, "running")

    def _summary(self, entry: Entry, line: Line) -> TrajectorySummary:
        summary = entry.summary
        return TrajectorySummary(
            number=entry.number,
            trajectory_id=summary.trajectory_id,
            run=summary.run,
            # Names of runs hold no slash.
            task_id=summary.group_id.partition("/")[2],
            group_id=summary.group_id,
            sample_index=summary.sample_index,
            group=self._fate(entry),
            group_reason=entry.reason,
            finished_at=entry.finished_at,
            stop_reason=summary.stop_reason,
            reward=summary.reward,
            sampled=summary.num_sampled,
            turns=summary.num_turns,
            segments=summary.num_segments,
            tool_calls=summary.tool_calls,
            tool_errors=summary.tool_errors,
            attempts=summary.attempt,
            staleness=entry.staleness,
            versions=[(version, count) for version, count in summary.version_tokens],
            seconds=line.seconds,
            opening=line.opening,
            error=line.error,
        )

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
