"""The course of each run over time, in a bounded number of points.

Invariant: a run's points cover everything since its first, in at most MAX_POINTS: when they are full, neighbours are
joined and the stretch of each doubles. So a chart of ten minutes and one of ten days cost the same. Pure.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from actors.messages import Summary
from rollout.viewing import History, HistoryPoint

MAX_POINTS = 240
FIRST_SECONDS = 1.0
# The runs that finished something most recently; each takes about 50 KB.
MAX_RUNS = 128


class Histories:
    """All runs."""

    def __init__(self, max_points: int = MAX_POINTS, max_runs: int = MAX_RUNS) -> None:
        self._max_points, self._max_runs = max_points, max_runs
        self._runs: OrderedDict[str, _Course] = OrderedDict()

    def add(self, summaries: Iterable[Summary], version: int, now: float) -> None:
        """Trajectories that have finished. `version`: of the weights, `now`: seconds since the epoch."""
        for summary in summaries:
            course = self._runs.get(summary.run)
            if course is None:
                course = self._runs[summary.run] = _Course(self._max_points)
                if len(self._runs) > self._max_runs:
                    self._runs.popitem(last=False)
            else:
                self._runs.move_to_end(summary.run)
            course.add(summary, version, now)

    def forget(self, run: str) -> None:
        """A run is gone."""
        self._runs.pop(run, None)

    def of(self, run: str, now: float) -> History:
        """A run's course; without points where nothing has finished."""
        course = self._runs.get(run)
        if course is None:
            return History(run, FIRST_SECONDS, [], now)
        return History(run, course.seconds, [replace(point) for point in course.points], now)


class _Course:
    def __init__(self, max_points: int) -> None:
        self.seconds = FIRST_SECONDS
        self.points: list[HistoryPoint] = []
        self._max_points = max_points

    def add(self, summary: Summary, version: int, now: float) -> None:
        point = self._point(now)
        point.sessions += 1
        point.tokens += summary.num_sampled
        point.version = version
        if summary.reward is not None:
            point.scored += 1
            point.reward_sum += summary.reward
            point.reward_min = _least(point.reward_min, summary.reward)
            point.reward_max = _most(point.reward_max, summary.reward)
        if summary.oldest_version is not None:
            staleness = max(0, version - summary.oldest_version)
            point.aged += 1
            point.staleness_sum += staleness
            point.staleness_max = max(point.staleness_max, staleness)

    def _point(self, now: float) -> HistoryPoint:
        at = self._begin(now)
        # A clock that was set back writes into the newest point: points stay in the order of time.
        if self.points and at <= self.points[-1].at:
            return self.points[-1]
        while len(self.points) >= self._max_points:
            self._halve()
            at = self._begin(now)
            if at <= self.points[-1].at:
                return self.points[-1]
        self.points.append(HistoryPoint(at))
        return self.points[-1]

    def _begin(self, now: float) -> float:
        return math.floor(now / self.seconds) * self.seconds

    def _halve(self) -> None:
        self.seconds *= 2
        joined: list[HistoryPoint] = []
        for point in self.points:
            at = self._begin(point.at)
            if joined and joined[-1].at == at:
                _join(joined[-1], point)
            else:
                point.at = at
                joined.append(point)
        self.points = joined


def _join(into: HistoryPoint, later: HistoryPoint) -> None:
    into.sessions += later.sessions
    into.tokens += later.tokens
    into.scored += later.scored
    into.reward_sum += later.reward_sum
    into.reward_min = _least(into.reward_min, later.reward_min)
    into.reward_max = _most(into.reward_max, later.reward_max)
    into.aged += later.aged
    into.staleness_sum += later.staleness_sum
    into.staleness_max = max(into.staleness_max, later.staleness_max)
    into.version = later.version


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _most(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)
