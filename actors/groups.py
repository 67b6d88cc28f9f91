"""The groups of one run, from submission to acknowledgement.

Invariant, checked by `audit`: every task that was submitted is exactly one group, which is waiting, running, ready,
leased, delivered or dropped; `submitted` is the sum of these. Delivered and dropped are final. A group that is played
again gets a new generation, and with it new ids, so that answers of the old one reach nobody. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from actors.messages import Summary
from actors.staleness import StalenessBound
from rollout.api import Filters, RunRequest
from rollout.errors import ConflictError
from rollout.tasks import Task

TRUNCATED = frozenset({"length", "max_tokens", "max_turns", "deadline"})
FAILED = frozenset({"error", "cancelled"})


class GroupState(Enum):
    """Where a group is. Delivered and dropped groups are no longer kept."""

    WAITING = "waiting"
    RUNNING = "running"
    READY = "ready"
    LEASED = "leased"


@dataclass(slots=True)
class Member:
    """A finished trajectory: where its rows are, and what is known without opening them."""

    block: int
    summary: Summary


@dataclass(slots=True)
class Group:
    """One task's samples."""

    seq: int
    """Position of its task in the run, from 0."""
    task: Task
    generation: int = 0
    state: GroupState = GroupState.WAITING
    started_version: int | None = None
    """Lower bound for the versions of tokens that are still being sampled."""
    members: dict[int, Member] = field(default_factory=dict)
    lease_id: str | None = None
    """The lease that holds it, or held it last."""

    @property
    def oldest_version(self) -> int | None:
        """Version of its oldest token so far; None where nothing was sampled."""
        versions = [m.summary.oldest_version for m in self.members.values() if m.summary.oldest_version is not None]
        if self.state is GroupState.RUNNING and self.started_version is not None:
            versions.append(self.started_version)
        return min(versions, default=None)


@dataclass(slots=True)
class Totals:
    """Sums over finished trajectories."""

    tokens: int = 0
    turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    forks: int = 0
    scored: int = 0
    reward_sum: float = 0.0
    stop_reasons: dict[str, int] = field(default_factory=dict)

    def add(self, summary: Summary) -> None:
        """Count one trajectory."""
        self.tokens += summary.num_sampled
        self.turns += summary.num_turns
        self.tool_calls += summary.tool_calls
        self.tool_errors += summary.tool_errors
        self.forks += max(0, summary.num_segments - 1)
        self.stop_reasons[summary.stop_reason] = self.stop_reasons.get(summary.stop_reason, 0) + 1
        if summary.reward is not None:
            self.scored += 1
            self.reward_sum += summary.reward


class GroupBook:
    """All groups of one run."""

    def __init__(self, run: str, group_size: int, request: RunRequest, first_version: int = 0) -> None:
        self.run = run
        self.group_size = group_size
        self.request = request
        self.bound = StalenessBound(request.max_staleness, request.batch_groups, first_version)
        self.totals = Totals()
        """Of all finished trajectories, those of groups that were dropped or played again included."""
        self.settled = Totals()
        """Of those whose groups are done with; the rest can be counted again from their rows."""
        self.delivered = 0
        self.dropped: dict[str, int] = {}
        self.replaced: dict[str, int] = {}
        self._groups: dict[int, Group] = {}
        self._ready: dict[int, Group] = {}
        """In the order of completion."""
        self._by_id: dict[str, Group] = {}
        self._counts = dict.fromkeys(GroupState, 0)
        self._known: dict[str, bytes] = {}
        """Digest of every task ever submitted, by task_id."""
        self._started = 0
        """Started and not dropped: what the staleness bound counts."""

    # Tasks

    def submit(self, tasks: Iterable[Task]) -> tuple[list[Group], int]:
        """New groups, and how many of the tasks were known already.

        Raises ConflictError, and takes nothing, where a task_id is known with other content.
        """
        new: dict[str, tuple[Task, bytes]] = {}
        duplicates = 0
        for index, task in enumerate(tasks):
            digest = task_digest(task)
            known = self._known.get(task.task_id) or new.get(task.task_id, (None, None))[1]
            if known is None:
                new[task.task_id] = (task, digest)
            elif known == digest:
                duplicates += 1
            else:
                raise ConflictError(
                    f"task_id {task.task_id!r} was already submitted to run {self.run!r} with other content; "
                    "give the new task another task_id",
                    f"tasks.{index}.task_id",
                )
        groups = [self._add(len(self._known), task, digest) for task, digest in new.values()]
        return groups, duplicates

    def restore(self, task: Task, seq: int, generation: int) -> Group:
        """An unfinished group, as the journal has it."""
        return self._add(seq, task, task_digest(task), generation)

    def restore_done(self, task_id: str, digest: bytes, reason: str | None) -> None:
        """A finished group, as the journal has it: delivered (None), or dropped for a reason."""
        self._known[task_id] = digest
        self._started += reason is None
        if reason is None:
            self.delivered += 1
        else:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1

    # Life

    def group_id(self, group: Group) -> str:
        """Unique for ever. The generation stands before the task's id, which may hold any character."""
        run = self.run if group.generation == 0 else f"{self.run}~{group.generation}"
        return f"{run}/{group.task.task_id}"

    def find(self, group_id: str) -> Group | None:
        """A group that is not done, by the id of its present generation."""
        return self._by_id.get(group_id)

    def get(self, seq: int) -> Group | None:
        """A group that is not done, by its position."""
        return self._groups.get(seq)

    def admit(self, group_id: str, version: int) -> bool:
        """Start a waiting group, if the staleness bound allows."""
        group = self._by_id[group_id]
        if group.state is GroupState.RUNNING:
            return True
        if not self.bound.may_start(self._started, version):
            return False
        self._move(group, GroupState.RUNNING)
        group.started_version = version
        self._started += 1
        return True

    def wants(self, group_id: str, index: int) -> bool:
        """Whether a trajectory belongs to a group as it is played now, and is not there yet."""
        group = self._by_id.get(group_id)
        return group is not None and 0 <= index < self.group_size and index not in group.members

    def add(self, group_id: str, member: Member) -> Group | None:
        """Take in a finished trajectory that is wanted. Returns its group if that is complete now."""
        group = self._by_id[group_id]
        index = member.summary.sample_index
        if group.state is GroupState.WAITING:
            # From the journal: it had been started before.
            self._move(group, GroupState.RUNNING)
            self._started += 1
        group.members[index] = member
        self.totals.add(member.summary)
        return group if len(group.members) == self.group_size else None

    def judge(self, group: Group, version: int) -> str | None:
        """Why a complete group is not delivered; None: it is. (`replaces` says whether it is played again.)"""
        if self.bound.too_old(group.oldest_version, version):
            return "stale"
        summaries = [member.summary for member in group.members.values()]
        if self.request.failed == "drop" and any(s.stop_reason in FAILED for s in summaries):
            return "failed"
        return judge_filters(self.request.filters, summaries)

    def replaces(self, group: Group, reason: str) -> bool:
        """Whether a group that is not delivered for `reason` is played again."""
        return reason == "stale" or (reason == "failed" and group.generation < self.request.max_replacements)

    def accept(self, group: Group) -> None:
        """A complete group can be delivered."""
        self._move(group, GroupState.READY)
        self._ready[group.seq] = group

    def drop(self, group: Group, reason: str) -> list[Member]:
        """A group is done without being delivered. Returns the members whose rows nobody needs any more."""
        self._remove(group)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return self._settle(group)

    def replace(self, group: Group, reason: str) -> tuple[Group, list[Member]]:
        """The same task once more, and the members that are thrown away."""
        self._remove(group)
        self.replaced[reason] = self.replaced.get(reason, 0) + 1
        again = Group(group.seq, group.task, group.generation + 1)
        self._groups[again.seq] = again
        self._by_id[self.group_id(again)] = again
        self._counts[again.state] += 1
        return again, self._settle(group)

    def too_old(self, version: int) -> list[Group]:
        """Running and ready groups that may not be delivered any more at `version`."""
        if self.bound.max_staleness is None:
            return []
        states = (GroupState.RUNNING, GroupState.READY)
        return [
            g for g in self._groups.values() if g.state in states and self.bound.too_old(g.oldest_version, version)
        ]

    def groups(self) -> list[Group]:
        """All that are not done."""
        return list(self._groups.values())

    def unfinished(self) -> list[Group]:
        """Waiting and running groups, as submitted."""
        return [g for g in self._groups.values() if g.state in (GroupState.WAITING, GroupState.RUNNING)]

    # Delivery

    def available(self) -> list[Group]:
        """Ready groups that may be handed out now, in the run's order."""
        if self.request.order == "completed":
            return list(self._ready.values())
        found = []
        for seq in sorted(self._groups):
            group = self._groups[seq]
            if group.state is GroupState.LEASED:
                continue
            if group.state is not GroupState.READY:
                break
            found.append(group)
        return found

    def lease(self, groups: Iterable[Group], lease_id: str) -> None:
        """Hand out ready groups."""
        for group in groups:
            del self._ready[group.seq]
            self._move(group, GroupState.LEASED)
            group.lease_id = lease_id

    def give_back(self, seq: int, lease_id: str) -> Group | None:
        """A lease ended without acknowledgement: its group is ready again, and is the next to be delivered."""
        group = self._groups.get(seq)
        if group is None or group.state is not GroupState.LEASED or group.lease_id != lease_id:
            return None
        self._move(group, GroupState.READY)
        self._ready = {seq: group, **self._ready}
        return group

    def deliver(self, seq: int) -> list[Member]:
        """A group is acknowledged. Returns the members whose rows nobody needs any more."""
        group = self._groups.pop(seq)
        self._ready.pop(seq, None)
        self._by_id.pop(self.group_id(group))
        self._counts[group.state] -= 1
        self.delivered += 1
        return self._settle(group)

    # Looking

    @property
    def submitted(self) -> int:
        """Tasks so far."""
        return len(self._known)

    @property
    def accepted(self) -> int:
        """Groups that are or were deliverable."""
        return self.delivered + len(self._ready) + self.count(GroupState.LEASED)

    def count(self, state: GroupState) -> int:
        """How many groups are in a state."""
        return self._counts[state]

    @property
    def idle(self) -> bool:
        """Nothing is waiting or running."""
        return not self._counts[GroupState.WAITING] and not self._counts[GroupState.RUNNING]

    def held_back(self, version: int) -> bool:
        """Whether the staleness bound alone keeps the next group from starting."""
        return self._counts[GroupState.WAITING] > 0 and not self.bound.may_start(self._started, version)

    def audit(self) -> None:
        """Check the invariant. Raises AssertionError."""
        assert self.submitted == len(self._groups) + self.delivered + sum(self.dropped.values())
        assert {g.seq for g in self._groups.values() if g.state is GroupState.READY} == set(self._ready)
        assert set(self._by_id) == {self.group_id(group) for group in self._groups.values()}
        active = sum(group.state is not GroupState.WAITING for group in self._groups.values())
        assert self._started == active + self.delivered, (self._started, active, self.delivered)
        for state in GroupState:
            assert self._counts[state] == sum(group.state is state for group in self._groups.values())
        for group in self._groups.values():
            if group.state in (GroupState.READY, GroupState.LEASED):
                assert len(group.members) == self.group_size

    # Inside

    def _add(self, seq: int, task: Task, digest: bytes, generation: int = 0) -> Group:
        self._known[task.task_id] = digest
        group = Group(seq, task, generation)
        self._groups[seq] = group
        self._by_id[self.group_id(group)] = group
        self._counts[group.state] += 1
        return group

    def _move(self, group: Group, state: GroupState) -> None:
        self._counts[group.state] -= 1
        self._counts[state] += 1
        group.state = state

    def _settle(self, group: Group) -> list[Member]:
        members = list(group.members.values())
        for member in members:
            self.settled.add(member.summary)
        return members

    def _remove(self, group: Group) -> None:
        del self._groups[group.seq]
        self._ready.pop(group.seq, None)
        self._by_id.pop(self.group_id(group))
        self._started -= group.state is not GroupState.WAITING
        self._counts[group.state] -= 1


def judge_filters(filters: Filters, summaries: list[Summary]) -> str | None:
    """The reason to drop a complete group, of those that need no look at its rows; None: keep it."""
    if filters.max_truncated is not None:
        cut = sum(summary.stop_reason in TRUNCATED for summary in summaries)
        if cut > filters.max_truncated * len(summaries):
            return "truncated"
    if filters.drop_zero_variance:
        rewards = [summary.reward for summary in summaries if summary.reward is not None]
        # A member without a reward is no evidence of equality.
        if len(rewards) == len(summaries) and len(set(rewards)) == 1:
            return "zero_variance"
    return None


def task_digest(task: Task) -> bytes:
    """Eight bytes that tell whether two tasks are the same, word for word."""
    return hashlib.blake2b(task.model_dump_json().encode(), digest_size=8).digest()
