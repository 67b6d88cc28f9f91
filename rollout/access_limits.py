"""How much a caller, and all callers together, may ask of one process.

Invariant: a request that is refused has taken nothing, and one that was let in gives its place back exactly once.
Memory is bounded: a bucket is kept for at most MAX_BUCKETS callers, a count only while a caller has requests running.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

# A bucket that nobody has touched for so long is full again, so dropping it forgets nothing.
WINDOW_S = 60.0
# Beyond this the callers that were seen longest ago are forgotten, and begin with a full bucket if they come back;
# the limit on all callers together holds regardless.
MAX_BUCKETS = 10_000
# When a running request ends is unknown; a second is long enough not to be asked in a loop.
RETRY_CONCURRENT_S = 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of one caller, or of all. None: unbounded."""

    requests_per_minute: int | None = None
    """Also how many may come at once after a quiet minute."""
    max_concurrent: int | None = None


UNBOUNDED = Bounds()


@dataclass(frozen=True, slots=True)
class Busy:
    """A request that must come later."""

    message: str
    retry_after: int
    """Whole seconds, at least 1."""


class Bucket:
    """Tokens that come back steadily: `per_minute` a minute, never more than a minute's worth."""

    __slots__ = ("_last", "_per_second", "_size", "_tokens")

    def __init__(self, per_minute: int, now: float) -> None:
        self._size = float(per_minute)
        self._per_second = per_minute / WINDOW_S
        self._tokens = self._size
        self._last = now

    @property
    def last(self) -> float:
        """When it was last looked at, in the clock's seconds."""
        return self._last

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 if there is one. Takes nothing."""
        self._tokens = min(self._size, self._tokens + max(0.0, now - self._last) * self._per_second)
        self._last = max(now, self._last)
        return 0.0 if self._tokens >= 1.0 else (1.0 - self._tokens) / self._per_second

    def take(self) -> None:
        """Takes one token; ask `wait` first."""
        self._tokens -= 1.0


class Limiter:
    """Counts the requests of one process, on its event loop. It does not wait: who comes too early is sent away."""

    def __init__(self, per_caller: Bounds, total: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        """`total`: bounds of all callers together. `clock`: monotonic seconds."""
        self._per_caller, self._total = per_caller, total
        self._clock = clock
        # Least recently used first.
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._common = None if total.requests_per_minute is None else Bucket(total.requests_per_minute, clock())
        self._running: dict[str, int] = {}
        self._running_all = 0

    def __len__(self) -> int:
        """Callers that are remembered."""
        return len(self._buckets.keys() | self._running.keys())

    def enter(self, caller: str) -> Busy | None:
        """Lets a request in (None), which must `leave` later, or says when to come again."""
        each, total = self._per_caller, self._total
        if total.max_concurrent is not None and self._running_all >= total.max_concurrent:
            return _busy(f"{self._running_all} requests of all callers are running, the most that may", 0)
        running = self._running.get(caller, 0)
        if each.max_concurrent is not None and running >= each.max_concurrent:
            return _busy(f"{running} requests of {caller} are running, the most that one caller may have", 0)
        now = self._clock()
        own = self._bucket(caller, now)
        if own is not None and (seconds := own.wait(now)):
            return _busy(f"{caller} may send {each.requests_per_minute} requests a minute", seconds)
        if self._common is not None and (seconds := self._common.wait(now)):
            return _busy(f"all callers together may send {total.requests_per_minute} requests a minute", seconds)
        for bucket in (own, self._common):
            if bucket is not None:
                bucket.take()
        self._running[caller] = running + 1
        self._running_all += 1
        return None

    def leave(self, caller: str) -> None:
        """A request that was let in has ended, however it did."""
        self._running_all -= 1
        left = self._running[caller] - 1
        if left:
            self._running[caller] = left
        else:
            del self._running[caller]

    def _bucket(self, caller: str, now: float) -> Bucket | None:
        if self._per_caller.requests_per_minute is None:
            return None
        found = self._buckets.get(caller)
        if found is not None:
            self._buckets.move_to_end(caller)
            return found
        while self._buckets:
            oldest, bucket = next(iter(self._buckets.items()))
            if len(self._buckets) < MAX_BUCKETS and now - bucket.last < WINDOW_S:
                break
            del self._buckets[oldest]
        made = self._buckets[caller] = Bucket(self._per_caller.requests_per_minute, now)
        return made


def _busy(message: str, seconds: float) -> Busy:
    return Busy(message, max(RETRY_CONCURRENT_S, math.ceil(seconds)))
