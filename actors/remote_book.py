"""What becomes of every rollout that a foreign trainer ordered: queued → running → finished → reported → forgotten.

Invariant: a rollout runs at most once, ends in exactly one answer, and an answer never changes. No trainer's host has
all places while there are enough for two, and whoever has fewest of them is next. Pure: it knows no network, no disk
and no clock of its own; whoever drives it writes down what changed before anybody is told.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from rollout.errors import BusyError, ConflictError, NotFoundError
from rollout.remote.failures import RemoteFailure
from rollout.remote.order import RolloutCounts, RolloutOrder
from rollout.remote.server_rollout import failed
from rollout.remote.wire import RolloutResponse

State = Literal["queued", "running", "finished", "reported"]

# Pause before a trainer is told again: doubled each time, up to a limit. The client below has its own short retries.
FIRST_PAUSE_S, MAX_PAUSE_S = 5.0, 300.0
# One part of so many of the places is never one host's alone: a trainer that stalls leaves it to the others. Where
# there are fewer places than parts, they are anybody's.
PARTS = 8
# Ended rollouts that are remembered, and the characters of their answers; the oldest that are reported go first.
MAX_REMEMBERED = 20_000
MAX_REMEMBERED_CHARS = 256 * 2**20
# Without any that ended there is nothing to guess the wait from.
DEFAULT_RETRY_AFTER_S = 5.0
MAX_RETRY_AFTER_S = 60.0
# Weight of the newest rollout in the mean duration.
_NEWEST = 0.1


@dataclass(slots=True)
class Entry:
    """One rollout. Times are seconds since the epoch."""

    order: RolloutOrder
    digest: str
    state: State
    accepted_at: float
    response: RolloutResponse | None = None
    started_at: float | None = None
    ended_at: float | None = None
    reported_at: float | None = None
    report_error: str | None = None
    """Why it counts as reported although its trainer does not know."""
    reports: int = 0
    """Times that the trainer was told in vain."""
    due_at: float = math.inf
    """When the trainer is told next."""
    size: int = 0
    """Characters of its answer's messages, roughly."""
    host: str = field(init=False)
    """The trainer's, by which places are shared."""

    def __post_init__(self) -> None:
        self.host = self.order.host

    @property
    def rollout_id(self) -> str:
        """The trainer's name for it."""
        return self.order.rollout_id


class RemoteBook:
    """All of them. `now` is always given, and never goes back by much."""

    def __init__(
        self, *, max_concurrent: int, max_queued: int, queue_s: float, keep_s: float, report_s: float
    ) -> None:
        """`queue_s`: longest wait for a start; `keep_s`: how long an answer is kept; `report_s`: how long a trainer
        that does not answer is told."""
        self._max_concurrent, self._max_queued = max_concurrent, max_queued
        self._max_of_host = max_concurrent - max_concurrent // PARTS
        self._queue_s, self._keep_s, self._report_s = queue_s, keep_s, report_s
        self._entries: dict[str, Entry] = {}
        self._keys: dict[str, str] = {}
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, OrderedDict[str, None]] = {}
        self._running: set[str] = set()
        self._places: Counter[str] = Counter()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._unreported: set[str] = set()
        self._chars = 0
        self._mean_s: float | None = None
        self._completed = self._failed = 0

    def get(self, rollout_id: str) -> Entry:
        """Raises NotFoundError."""
        try:
            return self._entries[rollout_id]
        except KeyError:
            raise NotFoundError(
                f"there is no rollout {rollout_id!r}; answers are kept {self._keep_s:g} s, then they are forgotten",
                "rollout_id",
            ) from None

    def accept(self, order: RolloutOrder, now: float) -> tuple[Entry, bool]:
        """Take an order, or find the one that it repeats. Returns the entry, and whether it is new.

        Raises ConflictError for another order under the same id or key, BusyError where the queue is full.
        """
        digest = order.digest()
        known = self._entries.get(self._keys.get(_key(order), order.rollout_id))
        if known is not None:
            if known.digest != digest:
                raise ConflictError(
                    f"rollout {known.rollout_id!r} was ordered with another body; send the same one to join it, or "
                    "choose another rollout_id (and idempotency_key)",
                    "rollout_id",
                )
            return known, False
        # One that is about to start waits too, for a moment.
        if len(self._queue) + len(self._running) >= self._max_concurrent + self._max_queued:
            raise BusyError(
                f"{len(self._running)} rollouts are running and {len(self._queue)} wait, the most that may",
                self._retry_after(),
            )
        entry = Entry(order, digest, "queued", now)
        self._put(entry)
        return entry, True

    def withdraw(self, rollout_id: str) -> None:
        """Forget an order that could not be written down: nobody was told that it was taken."""
        self._drop(self.get(rollout_id))

    def next_to_start(self) -> Entry | None:
        """The order that waits longest of the host with the fewest places, if one more may run."""
        if len(self._running) >= self._max_concurrent:
            return None
        open_to = [host for host in self._waiting if self._places[host] < self._max_of_host]
        first = [self._entries[next(iter(self._waiting[host]))] for host in open_to]
        return min(first, key=lambda entry: (self._places[entry.host], entry.accepted_at), default=None)

    def start(self, rollout_id: str, now: float) -> Entry:
        """It is being played. From here on it is never played again."""
        entry = self.get(rollout_id)
        assert entry.state == "queued", entry.state
        self._unqueue(entry)
        self._run(entry)
        entry.state, entry.started_at = "running", now
        return entry

    def finish(self, rollout_id: str, response: RolloutResponse, now: float) -> bool:
        """It ended so. The first answer counts; returns whether this was it."""
        entry = self.get(rollout_id)
        if entry.state in ("finished", "reported"):
            return False
        self._unqueue(entry)
        self._unrun(entry)
        if entry.started_at is not None:
            took = max(0.0, now - entry.started_at)
            self._mean_s = took if self._mean_s is None else (1 - _NEWEST) * self._mean_s + _NEWEST * took
        self._completed += 1
        self._failed += response.status == "ERROR"
        entry.state, entry.response, entry.ended_at = "finished", response, now
        # What was asked is needed no more, but for its digest and, in B, where to report.
        entry.order = entry.order.without_history()
        self._remember(entry)
        if entry.order.generation == "B":
            self._unreported.add(rollout_id)
            entry.due_at = now
        else:
            # Its answer is the HTTP response; who has lost that asks again.
            entry.state, entry.reported_at = "reported", now
        return True

    def renew(self, rollout_id: str, api_key: str | None) -> bool:
        """A repeated request came with this key: calls that are still to come use it. Returns whether it changed."""
        entry = self.get(rollout_id)
        of_use = entry.state == "queued" or (entry.order.generation == "B" and entry.state != "reported")
        if api_key is None or api_key == entry.order.api_key or not of_use:
            return False
        entry.order = entry.order.model_copy(update={"api_key": api_key})
        return True

    def due(self, now: float) -> list[Entry]:
        """Those whose trainer must be told now; who has waited longest comes first."""
        found = [entry for name in self._unreported if (entry := self._entries[name]).due_at <= now]
        return sorted(found, key=lambda entry: entry.due_at)

    def reporting(self, rollout_id: str) -> None:
        """Its trainer is being told: it is not due until `reported`, `unreported` or `interrupted`."""
        self.get(rollout_id).due_at = math.inf

    def interrupted(self) -> None:
        """Nobody is being told any more, and it is not known who was: all of them are due."""
        for entry in map(self.get, self._unreported):
            if entry.due_at == math.inf:
                assert entry.ended_at is not None
                entry.due_at = entry.ended_at

    def reported(self, rollout_id: str, now: float, error: str | None = None) -> Entry:
        """Its trainer knows; or, with `error`, will not be told any more."""
        entry = self.get(rollout_id)
        entry.state, entry.reported_at, entry.report_error, entry.due_at = "reported", now, error, math.inf
        self._unreported.discard(rollout_id)
        # The key of a trainer that needs no call any more is not kept, and nobody asks for this answer again.
        entry.order = entry.order.model_copy(update={"api_key": None})
        if entry.response is not None:
            entry.response = entry.response.model_copy(update={"final_messages": []})
        self._chars -= entry.size
        entry.size = 0
        return entry

    def unreported(self, rollout_id: str, now: float, failure: str, after: float | None = None) -> bool:
        """Its trainer could not be told. It is tried again later; False: too old, see `reported`.

        `after`: seconds that the trainer asked for, of which MAX_PAUSE_S at most are given.
        """
        entry = self.get(rollout_id)
        assert entry.ended_at is not None
        entry.reports += 1
        if now - entry.ended_at >= self._report_s:
            return False
        entry.report_error = failure
        pause = max(after or 0.0, FIRST_PAUSE_S * 2 ** min(entry.reports - 1, 16))
        entry.due_at = now + min(pause, MAX_PAUSE_S)
        return True

    def stale(self, now: float) -> list[Entry]:
        """Orders that wait too long for a start. Whoever asks ends them with `overdue`."""
        found = []
        for name in self._queue:
            entry = self._entries[name]
            if now - entry.accepted_at < self._queue_s:
                break
            found.append(entry)
        return found

    def overdue(self, entry: Entry) -> RolloutResponse:
        """The answer to an order that waited too long."""
        text = f"the rollout did not begin within {self._queue_s:g} s: the rollout server is full"
        return failed(entry.order, RemoteFailure("rate_limited", text))

    def forgotten(self, now: float) -> list[str]:
        """Drop what is reported and old, or too much. Returns the ids, to be removed from wherever else they are."""
        gone: list[str] = []
        chars = self._chars
        for name in self._ended:
            entry = self._entries[name]
            too_many = len(self._ended) - len(gone) > MAX_REMEMBERED or chars > MAX_REMEMBERED_CHARS
            old = entry.ended_at is not None and now - entry.ended_at >= self._keep_s
            if entry.state == "reported" and (old or too_many):
                gone.append(name)
                chars -= entry.size
        for name in gone:
            self._drop(self._entries[name])
        return gone

    def restore(self, entries: list[Entry], now: float) -> list[Entry]:
        """Take up what was written down before a restart. Returns those that were being played: they are lost."""
        lost = []
        for entry in sorted(entries, key=lambda entry: entry.ended_at or entry.accepted_at):
            if entry.state == "finished":
                entry.due_at = now
            self._put(entry)
            if entry.state == "running":
                lost.append(entry)
        return lost

    def running(self) -> list[Entry]:
        """Those that are being played."""
        return [self._entries[name] for name in self._running]

    def counts(self) -> RolloutCounts:
        """How many there are."""
        return RolloutCounts(
            queued=len(self._queue),
            running=len(self._running),
            unreported=len(self._unreported),
            completed=self._completed,
            failed=self._failed,
        )

    def _put(self, entry: Entry) -> None:
        name = entry.rollout_id
        self._entries[name] = entry
        self._keys[_key(entry.order)] = name
        if entry.state == "queued":
            self._queue[name] = None
            self._waiting.setdefault(entry.host, OrderedDict())[name] = None
        elif entry.state == "running":
            self._run(entry)
        else:
            self._remember(entry)
            if entry.state == "finished":
                self._unreported.add(name)

    def _unqueue(self, entry: Entry) -> None:
        self._queue.pop(entry.rollout_id, None)
        if (waiting := self._waiting.get(entry.host)) is not None:
            waiting.pop(entry.rollout_id, None)
            if not waiting:
                del self._waiting[entry.host]

    def _run(self, entry: Entry) -> None:
        self._running.add(entry.rollout_id)
        self._places[entry.host] += 1

    def _unrun(self, entry: Entry) -> None:
        if entry.rollout_id in self._running:
            self._running.remove(entry.rollout_id)
            self._places[entry.host] -= 1
            if not self._places[entry.host]:
                del self._places[entry.host]

    def _remember(self, entry: Entry) -> None:
        self._ended[entry.rollout_id] = None
        messages = [] if entry.response is None else entry.response.final_messages
        entry.size = sum(len(str(message)) for message in messages)
        self._chars += entry.size

    def _drop(self, entry: Entry) -> None:
        name = entry.rollout_id
        del self._entries[name]
        self._keys.pop(_key(entry.order), None)
        self._unqueue(entry)
        self._unrun(entry)
        if name in self._ended:
            del self._ended[name]
            self._chars -= entry.size
        self._unreported.discard(name)

    def _retry_after(self) -> float:
        """Whole seconds until a place in the queue is free, guessed from how long rollouts take."""
        if self._mean_s is None:
            return DEFAULT_RETRY_AFTER_S
        return float(math.ceil(min(max(1.0, self._mean_s / self._max_concurrent), MAX_RETRY_AFTER_S)))


def _key(order: RolloutOrder) -> str:
    """Keys of the two kinds do not meet: an idempotency key may be another rollout's id."""
    return order.key if order.key == order.rollout_id else f"key:{order.key}"
