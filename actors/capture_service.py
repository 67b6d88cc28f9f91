"""Captured sessions in the controller: black-box agents play the samples of a run, through an address of their own.

A run whose environment is `captured` gives nothing to session workers. Whoever runs the agents opens a session for a
task, points any OpenAI or Anthropic client at it, and says at the end what it was worth; then it is a trajectory of
its group like any other: journaled, filtered, leased.

Invariant: a sample of a group is held by one open session at most, and is given back when the session ends without a
trajectory. What a closed session left is in the journal before `close` answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from actors import journal_records as records
from actors.groups import Group, GroupState
from actors.rows import to_rows
from actors.run_store import CAPTURED, Run, RunStore
from rollout.api import CapturedSession, OpenedSession
from rollout.capture.calls import CapturedCall
from rollout.capture.session_book import CaptureLimits, CaptureSession
from rollout.errors import ApiError, BusyError, ConflictError, NotFoundError, RefusedError
from rollout.reasoning import ReasoningMarkers
from rollout.session_keys import session_key
from rollout.tasks import Task
from rollout.trajectory import SessionKey, Trajectory

logger = logging.getLogger(__name__)

# Open sessions of all runs; each holds its tokens in the controller's memory.
MAX_OPEN = 10_000
# Closed ones that still answer, for who repeats a call.
MAX_CLOSED = 10_000
# `close` waits so long for reports that are on their way.
SETTLE_SECONDS = 10.0
SETTLE_PAUSE_S = 0.01
RETRY_AFTER_S = 2.0
_PLACEHOLDER = [{"role": "user", "content": "(captured)"}]


@dataclass(slots=True)
class _Open:
    book: CaptureSession
    run: Run
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its trajectory is in the journal, or could not be brought there."""
    closing: bool = False


class CaptureService:
    """The operations on captured sessions. Lives on the store's event loop."""

    def __init__(self, store: RunStore, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._secret = secret
        self._clock = clock
        self.markers: ReasoningMarkers | None = None
        """Of the model's reasoning, once somebody who has its tokenizer has said them."""
        self._sessions: dict[str, _Open] = {}
        self._closed: dict[str, CapturedSession] = {}

    async def open(self, run_name: str, task: Task | None, limits: CaptureLimits | None) -> OpenedSession:
        """Take the next free sample of a task; a new task is submitted first. None: a task of its own.

        Raises NotFoundError, RefusedError for a run of another kind, ConflictError where all samples are taken,
        BusyError where the staleness bound or the number of sessions holds it back.
        """
        self._store.check()
        run = self._store.run(run_name)
        if not run.captured:
            raise RefusedError(
                f"run {run_name!r} plays its own sessions; create one with environment: {{path: {CAPTURED}}}", "run"
            )
        if run.state != "running":
            raise ConflictError(f"run {run_name!r} is {run.state}", "run")
        if len(self._sessions) >= MAX_OPEN:
            raise BusyError(f"{MAX_OPEN} sessions are open; close some", RETRY_AFTER_S)
        wanted = task or Task(task_id=f"task-{uuid.uuid4().hex}", messages=_PLACEHOLDER)
        groups, _ = run.book.submit([wanted])
        if groups:
            await self._store.write(records.add_tasks(run_name, groups))
        group = run.book.find(f"{run_name}/{wanted.task_id}") or _latest(run, wanted.task_id)
        if group is None:
            raise ConflictError(f"task {wanted.task_id!r} of run {run_name!r} is done", "task.task_id")
        group_id = run.book.group_id(group)
        index = self._free_sample(run, group, group_id)
        if not run.book.admit(group_id, self._store.version):
            raise BusyError("the staleness bound holds new groups back; train on what there is", RETRY_AFTER_S)
        # Long and random: without keys, knowing it is what lets a client in.
        session_id = uuid.uuid4().hex
        key = SessionKey(run_name, wanted.task_id, group_id, index)
        book = CaptureSession(
            key, limits=limits or CaptureLimits(), opened=self._clock(), metadata=dict(wanted.metadata)
        )
        self._sessions[session_id] = _Open(book, run)
        run.changed()
        return OpenedSession(
            session_id=session_id,
            trajectory_id=key.trajectory_id,
            api_key=session_key(self._secret, session_id),
        )

    def begin(self, session_id: str, request_id: str) -> None:
        """A request of a session is about to be served."""
        self._get(session_id).book.begin(request_id, self._clock())

    def end(self, session_id: str, request_id: str, calls: list[CapturedCall], lost: bool) -> None:
        """It was served, with these generations; none where it was refused."""
        book = self._get(session_id).book
        now = self._clock()
        if lost:
            book.lose(request_id, now)
        elif not calls:
            book.abandon(request_id, now)
        for call in calls:
            try:
                book.add(call, now)
            except ApiError as failure:
                # It is counted in the session's metadata.
                logger.warning("session %s: %s", session_id, failure)

    async def reward(self, session_id: str, value: float | None, turn_rewards: Mapping[str, float] | None) -> None:
        """Score a session, or single calls of it by their ids. May be repeated, not changed."""
        opened = self._get(session_id)
        if value is None or turn_rewards:
            # A call that is being reported has no place yet.
            await self._settle(opened)
        opened.book.reward(value, turn_rewards=turn_rewards, now=self._clock())

    async def close(self, session_id: str, *, cancel: bool = False) -> CapturedSession:
        """Make the session's trajectory and hand it to its run. May be repeated. `cancel`: it counts as cancelled."""
        while (known := self._closed.get(session_id)) is None:
            opened = self._get(session_id)
            if not opened.closing:
                break
            # Somebody else's call; where that fails, this one tries.
            await opened.settled.wait()
        else:
            return known
        with _closing(opened):
            if not cancel:
                await self._settle(opened)
            now = self._clock()
            trajectory = opened.book.cancel(now, "it was cancelled") if cancel else opened.book.close(now)
            return await self._deliver(session_id, opened, trajectory)

    def info(self, session_id: str) -> CapturedSession:
        """A session at this moment."""
        known = self._closed.get(session_id)
        return known if known is not None else _told(session_id, self._get(session_id).book)

    @property
    def states(self) -> dict[str, int]:
        """How many sessions are open, and how many of them rewarded."""
        return dict(Counter(opened.book.state for opened in self._sessions.values()))

    async def expire(self) -> None:
        """End the sessions that have passed a deadline, and those whose run is no more."""
        now = self._clock()
        for session_id, opened in list(self._sessions.items()):
            if opened.closing:
                continue
            try:
                with _closing(opened):
                    await self._expire(session_id, opened, now)
            except Exception as failure:
                # It must not keep the others from their end.
                logger.warning("session %s could not be ended, it is tried again: %r", session_id, failure)

    async def _expire(self, session_id: str, opened: _Open, now: float) -> None:
        if not self._lives(opened.run):
            del self._sessions[session_id]
        elif opened.run.state == "cancelled":
            await self._deliver(session_id, opened, opened.book.cancel(now, "its run was cancelled"))
        elif (trajectory := opened.book.trajectory or opened.book.expire(now)) is not None:
            # One that had ended before could not be written then.
            await self._deliver(session_id, opened, trajectory)

    async def _deliver(self, session_id: str, opened: _Open, trajectory: Trajectory) -> CapturedSession:
        if self._lives(opened.run):
            rows, summaries = await asyncio.to_thread(to_rows, [trajectory], self.markers)
            await self._store.put(summaries, rows)
        told = _told(session_id, opened.book)
        self._sessions.pop(session_id, None)
        self._closed[session_id] = told
        while len(self._closed) > MAX_CLOSED:
            self._closed.pop(next(iter(self._closed)))
        return told

    async def _settle(self, opened: _Open) -> None:
        """Wait for calls that were answered and are not reported yet."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while opened.book.in_flight:
                    await asyncio.sleep(SETTLE_PAUSE_S)
        except TimeoutError:
            logger.warning("a session is closed with %d calls not reported", len(opened.book.in_flight))

    def _free_sample(self, run: Run, group: Group, group_id: str) -> int:
        held = {
            s.book.key.sample_index
            for s in self._sessions.values()
            if s.run is run and s.book.key.group_id == group_id
        }
        for index in range(run.book.group_size):
            if index not in held and index not in group.members:
                return index
        raise ConflictError(
            f"all {run.book.group_size} samples of task {group.task.task_id!r} are taken; choose another task_id",
            "task.task_id",
        )

    def _lives(self, run: Run) -> bool:
        """A forgotten run may have a successor of its name, which knows nothing of its sessions."""
        return self._store.runs.get(run.book.run) is run

    def _get(self, session_id: str) -> _Open:
        try:
            return self._sessions[session_id]
        except KeyError:
            pass
        if session_id in self._closed:
            raise ConflictError(f"session {session_id!r} is closed")
        raise NotFoundError(
            f"there is no session {session_id!r}; sessions that were open when the controller died are lost, "
            "open another for the same task",
            "session",
        )


@contextmanager
def _closing(opened: _Open) -> Iterator[None]:
    """One call at a time closes a session. Whatever befalls it, those that wait for it go on."""
    opened.closing = True
    opened.settled.clear()
    try:
        yield
    finally:
        opened.closing = False
        opened.settled.set()


def _latest(run: Run, task_id: str) -> Group | None:
    """A group that is played again has another id."""
    live = (GroupState.WAITING, GroupState.RUNNING)
    return next((g for g in run.book.groups() if g.task.task_id == task_id and g.state in live), None)


def _told(session_id: str, book: CaptureSession) -> CapturedSession:
    trajectory = book.trajectory
    return CapturedSession(
        session_id=session_id,
        trajectory_id=book.key.trajectory_id,
        state=book.state,
        calls=[call.call_id for call in book.calls],
        tokens=sum(len(call.token_ids) for call in book.calls),
        segments=None if trajectory is None else len(trajectory.segments),
        stop_reason=None if trajectory is None else trajectory.stop_reason,
        reward=None if trajectory is None else trajectory.reward,
        error=None if trajectory is None else trajectory.error,
    )
