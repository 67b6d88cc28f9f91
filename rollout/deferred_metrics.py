"""Figures that are counted in place and told to their exporter now and then.

Invariant: what an event loop pays for one observation is an addition, and what is told is exact: each total and each
bucket since the process began. An exporter that is told of every observation costs more than that for each token.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

from prometheus_client.utils import floatToGoString

logger = logging.getLogger(__name__)

Tell = Callable[[float], object]
"""Hands one value to the exporter."""


class Figure(Protocol):
    """One series, or the series of one histogram."""

    def tell(self) -> None:
        """Hand the present value to the exporter."""
        ...


F = TypeVar("F", bound=Figure)


class Figures:
    """All series of a process, each once: whoever asks for the same labels again counts into the same series."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, ...], Figure] = {}
        self._failed: set[tuple[str, ...]] = set()

    def find(self, key: tuple[str, ...], make: Callable[[], F]) -> F:
        """The series of this name and labels; made where it is new."""
        found = self._figures.get(key)
        if found is None:
            found = self._figures[key] = make()
        return found  # type: ignore[return-value]

    def tell(self) -> None:
        """Tell every series, also what did not change: exporters forget what they do not hear of for a while."""
        for key, figure in list(self._figures.items()):
            try:
                figure.tell()
            except Exception:
                # One that is refused is refused each time; the others go on.
                if key not in self._failed:
                    self._failed.add(key)
                    logger.exception("the figure %s cannot be told", key[0])


class Latest:
    """A gauge: its last value."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._value: float | None = None

    def set(self, value: float) -> None:
        """Replace the value."""
        self._value = value

    def tell(self) -> None:
        """Nothing before it was set once."""
        if self._value is not None:
            self._tell(self._value)


class Total:
    """A counter whose exporter wants increments."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._value = 0.0
        self._told = 0.0

    def inc(self, value: float = 1.0) -> None:
        """Raises ValueError for less than nothing."""
        if value < 0:
            raise ValueError(f"a counter cannot be increased by {value}")
        self._value += value

    def tell(self) -> None:
        """What came since the last time; kept for the next time where the exporter raises."""
        if (grown := self._value - self._told) > 0:
            self._tell(grown)
            self._told += grown


class Buckets:
    """A histogram as Prometheus holds it: how many were at most each bound, how many in all, and their sum."""

    def __init__(
        self, bounds: Sequence[float], tell_bucket: Callable[[str, float], object], tell_sum: Tell, tell_count: Tell
    ) -> None:
        """`bounds` ascend, without infinity, which is added. `tell_bucket(le, count)`: `le` as Prometheus writes it.

        Raises ValueError for bounds that do not ascend.
        """
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"bounds must ascend: {list(bounds)}")
        self._bounds = list(bounds)
        self._labels = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]
        self._counts = [0] * len(self._labels)
        self._sum = 0.0
        self._tell_bucket, self._tell_sum, self._tell_count = tell_bucket, tell_sum, tell_count

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def tell(self) -> None:
        """The buckets, the sum and the count; zeros too, so that the first observation is seen as an increase."""
        count = 0
        for label, here in zip(self._labels, self._counts, strict=True):
            count += here
            self._tell_bucket(label, count)
        self._tell_sum(self._sum)
        self._tell_count(count)
