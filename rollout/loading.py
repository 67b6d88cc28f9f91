"""How far the engines have come with loading their model: one state, many listeners, nobody too late.

The state keeps the newest event of every rank and no history. A listener that was away, or reads slowly, is told
what has changed since the last id that it saw: figures in between are skipped, states never.

Invariant: ids only grow, also over a restart of whoever holds the state. A final event (`ready` or `error`) is the
newest of all and is withdrawn when it is no longer true, so nobody who reads in the order of ids meets it early.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

STARTING, DOWNLOADING, LOADING, WARMING_UP = "starting", "downloading", "loading_to_vram", "warming_up"
READY, ERROR = "ready", "error"
FINAL = frozenset({READY, ERROR})

Phase = Literal["nothing", "loading", "ready", "failed"]
"""No replica is known; some load; all that are expected are ready; one failed and nothing has taken its place."""

# A replica that gave no sign for so long is gone. They give one every few seconds, but may be busy importing.
FORGET_S = 60.0
# One that failed gives no sign any more, and its error should still be there when somebody looks.
FORGET_FAILED_S = 600.0
# Bounds of what one state holds: Serve's largest deployments, and the ranks of the largest engines, are far below.
MAX_REPLICAS = 1024
MAX_RANKS = 1024
MAX_MESSAGE_CHARS = 2_000

# Fields of each stage, besides `stage` and `replica`. A figure that is not known is null.
_FIELDS: dict[str, tuple[str, ...]] = {
    STARTING: (),
    DOWNLOADING: ("bytes_downloaded", "bytes_total", "speed_mbps"),
    LOADING: ("rank", "device", "layers_loaded", "layers_total", "vram_mb", "bytes_read", "bytes_total"),
    WARMING_UP: (),
    READY: (),
    ERROR: ("message",),
}


@dataclass(frozen=True, slots=True)
class LoadingEvent:
    """One line of the progress stream. `data` is JSON, with its `stage`; shared, so nobody changes it."""

    id: int
    data: Mapping[str, Any]

    @property
    def final(self) -> bool:
        """Nothing follows it: all is ready, or one has failed."""
        return self.data["stage"] in FINAL


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is known now."""

    phase: Phase
    expected: int
    """Replicas that must be ready."""
    ready: int
    """Replicas that are."""
    events: Sequence[LoadingEvent]
    """The newest of every rank and stage, in the order of their ids; a final one is the last."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The figures of one replica, put together from its ranks."""

    ranks: int
    layers_loaded: int | None
    """Of the rank that is furthest behind; null where its checkpoint does not tell its layers beforehand."""
    layers_total: int | None
    vram_mb: float
    """MiB on all devices together."""
    fraction: float | None
    """0 to 1: of the bytes that all ranks have to read, those that were read."""


@dataclass(slots=True)
class _Replica:
    seen: float
    ready: bool = False
    error: str | None = None
    newest: dict[tuple[str, int], LoadingEvent] = field(default_factory=dict)


class LoadingState:
    """The progress of all replicas of one deployment."""

    def __init__(
        self, expected: int = 1, *, clock: Callable[[], float] = time.monotonic, first_id: int | None = None
    ) -> None:
        """`expected`: replicas that must be ready. `first_id`: None: one that no earlier state can have reached.

        Raises ValueError for less than one expected replica.
        """
        self._expected = _at_least_one(expected)
        self._clock = clock
        # Microseconds of the epoch: a state that is made anew goes on above the old one's ids, and they stay below
        # 2**53, which is where a browser's numbers end.
        self._last_id = time.time_ns() // 1000 if first_id is None else first_id - 1
        self._replicas: dict[str, _Replica] = {}
        self._final: LoadingEvent | None = None

    @property
    def last_id(self) -> int:
        """The highest id given so far."""
        return self._last_id

    def expect(self, replicas: int) -> bool:
        """So many must be ready from now on. True if that is news to listeners. Raises ValueError below 1."""
        self._expected = _at_least_one(replicas)
        return self._conclude(changed=False)

    def report(self, replica: str, events: Iterable[Mapping[str, Any]]) -> bool:
        """Take what a replica says, in its order; an empty report is a sign of life. True if anything is new.

        Saying the same again changes nothing, so a replica may always say all that it has. What a replica says after
        it was ready, or has failed, is ignored, but for `starting`: weights that are loaded later pass through the
        same loader. Raises ValueError, and takes nothing, where an event is not one of this stream's.
        """
        taken = [_checked(replica, event) for event in events]
        self.forget_vanished()
        known = self._replicas.get(replica)
        if known is None:
            known = self._begin(replica)
        known.seen = self._clock()
        changed = False
        for event in taken:
            changed |= self._apply(known, event)
        return self._conclude(changed) or changed

    def since(self, after: int) -> list[LoadingEvent]:
        """What is newer than an id, in the order of ids. 0, or an id that was never given: everything."""
        after = after if after <= self._last_id else 0
        found = [event for known in self._replicas.values() for event in known.newest.values() if event.id > after]
        if self._final is not None and self._final.id > after:
            found.append(self._final)
        return sorted(found, key=lambda event: event.id)

    def snapshot(self) -> Snapshot:
        """Everything now."""
        self.forget_vanished()
        return Snapshot(self._phase(), self._expected, self._count_ready(), self.since(0))

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        if self._replicas.pop(replica, None) is not None:
            self._conclude(changed=False)

    def forget_vanished(self) -> None:
        """Forget the replicas that have given no sign for too long."""
        now = self._clock()
        for name, known in list(self._replicas.items()):
            if now - known.seen > (FORGET_FAILED_S if known.error is not None else FORGET_S):
                self.forget(name)

    def _begin(self, replica: str) -> _Replica:
        if len(self._replicas) >= MAX_REPLICAS:
            self.forget(min(self._replicas, key=lambda name: self._replicas[name].seen))
        known = self._replicas[replica] = _Replica(self._clock())
        # Serve gives a replacement a name of its own: one more than there should be stands in for one that failed.
        failed = [name for name, other in self._replicas.items() if other.error is not None]
        for name in failed[: max(0, len(self._replicas) - self._expected)]:
            del self._replicas[name]
        return known

    def _apply(self, known: _Replica, event: dict[str, Any]) -> bool:
        stage = event["stage"]
        if stage == STARTING:
            fresh = not (known.newest or known.ready or known.error)
            known.ready, known.error = False, None
            known.newest.clear()
            return not fresh
        if known.ready or known.error is not None:
            return False
        if stage == READY:
            known.ready = True
            return True
        if stage == ERROR:
            known.error = event["message"]
            return True
        key = (stage, event.get("rank", 0))
        old = known.newest.get(key)
        if old is not None and (old.data == event or _goes_back(old.data, event)):
            return False
        if old is None and len(known.newest) >= MAX_RANKS:
            return False
        known.newest[key] = self._event(event)
        return True

    def _conclude(self, changed: bool) -> bool:
        """Bring the final event up to date: there, gone, or again the newest. True if there is one with a new id."""
        final = self._final_data()
        if final is None:
            self._final = None
            return False
        if self._final is not None and self._final.data == final and not changed:
            return False
        self._final = self._event(final)
        return True

    def _final_data(self) -> dict[str, Any] | None:
        phase = self._phase()
        if phase == "ready":
            return {"stage": READY}
        if phase == "failed":
            name, known = next((name, known) for name, known in self._replicas.items() if known.error is not None)
            return {"stage": ERROR, "replica": name, "message": known.error}
        return None

    def _phase(self) -> Phase:
        if not self._replicas:
            return "nothing"
        if self._count_ready() >= self._expected:
            return "ready"
        return "failed" if any(known.error is not None for known in self._replicas.values()) else "loading"

    def _count_ready(self) -> int:
        return sum(known.ready for known in self._replicas.values())

    def _event(self, data: dict[str, Any]) -> LoadingEvent:
        self._last_id += 1
        return LoadingEvent(self._last_id, data)


def merge(events: Iterable[LoadingEvent], replica: str) -> Merged | None:
    """One replica's figures from the events of a snapshot; None before any of its ranks has said something.

    A layer counts when every rank has it, so layers are those of the rank that is furthest behind.
    """
    ranks = [event.data for event in events if event.data["stage"] == LOADING and event.data["replica"] == replica]
    if not ranks:
        return None
    last = min(ranks, key=lambda rank: rank["bytes_read"] / rank["bytes_total"] if rank["bytes_total"] else 0.0)
    known = all(rank["bytes_total"] for rank in ranks)
    read, total = sum(rank["bytes_read"] for rank in ranks), sum(rank["bytes_total"] or 0 for rank in ranks)
    return Merged(
        ranks=len(ranks),
        layers_loaded=last["layers_loaded"],
        layers_total=last["layers_total"],
        vram_mb=sum(rank["vram_mb"] for rank in ranks),
        fraction=read / total if known else None,
    )


def _checked(replica: str, event: Mapping[str, Any]) -> dict[str, Any]:
    """An event with its fields and no others. Raises ValueError."""
    stage = event.get("stage")
    if stage not in _FIELDS:
        raise ValueError(f"stage: {stage!r} is not one of {', '.join(_FIELDS)}")
    missing = [name for name in _FIELDS[stage] if name not in event]
    if missing:
        raise ValueError(f"{stage} needs {', '.join(missing)}")
    found = {"stage": stage, "replica": replica, **{name: event[name] for name in _FIELDS[stage]}}
    if stage == ERROR:
        found["message"] = str(found["message"])[:MAX_MESSAGE_CHARS]
    return found


def _goes_back(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Figures of a rank that are older than what is known: messages may overtake each other."""
    return new["stage"] == LOADING and new["bytes_read"] < old["bytes_read"]


def _at_least_one(replicas: int) -> int:
    if replicas < 1:
        raise ValueError(f"expected: at least one replica must be expected, not {replicas}")
    return replicas
