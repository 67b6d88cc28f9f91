"""The course of runs: sums stay true, the number of points stays bounded."""

from __future__ import annotations

from actors.history import FIRST_SECONDS, Histories
from actors.messages import Summary


def summary(run: str = "r", reward: float | None = 1.0, oldest: int | None = 0, tokens: int = 3) -> Summary:
    return Summary(run, f"{run}/t", 0, 1, False, "stop", reward, tokens, 1, 1, 0, 0, oldest, 0, 1)


def test_a_point_tells_what_finished_in_its_stretch():
    histories = Histories()
    histories.add([summary(reward=0.0), summary(reward=1.0, oldest=2), summary(reward=None, oldest=None)], 3, 100.5)
    (point,) = histories.of("r", 101.0).points
    assert (point.at, point.sessions, point.tokens, point.version) == (100.0, 3, 9, 3)
    assert (point.scored, point.reward_sum, point.reward_min, point.reward_max) == (2, 1.0, 0.0, 1.0)
    assert (point.aged, point.staleness_sum, point.staleness_max) == (2, 4, 3)


def test_however_long_it_lasts_points_are_few_and_nothing_is_lost():
    histories = Histories(max_points=16)
    for second in range(5_000):
        histories.add([summary(reward=second % 2, oldest=0)], second // 1000, 1_000_000 + second)
        assert len(histories.of("r", 0).points) <= 16
    history = histories.of("r", 0)
    assert sum(point.sessions for point in history.points) == 5_000
    assert sum(point.reward_sum for point in history.points) == 2_500
    assert history.seconds == 512 * FIRST_SECONDS
    times = [point.at for point in history.points]
    assert times == sorted(set(times)) and times[0] <= 1_000_000
    assert all(at % history.seconds == 0 for at in times)


def test_long_silence_costs_no_points():
    histories = Histories(max_points=16)
    histories.add([summary()], 0, 0.0)
    histories.add([summary()], 0, 10.0**6)
    assert [point.at for point in histories.of("r", 0).points] == [0.0, 10.0**6]


def test_a_clock_that_is_set_back_changes_no_order():
    histories = Histories()
    histories.add([summary()], 0, 100.0)
    histories.add([summary()], 0, 50.0)
    assert [(point.at, point.sessions) for point in histories.of("r", 0).points] == [(100.0, 2)]


def test_runs_that_did_nothing_for_longest_make_room():
    histories = Histories(max_runs=2)
    for run in ("a", "b", "a", "c"):
        histories.add([summary(run)], 0, 1.0)
    assert [len(histories.of(run, 0).points) for run in "abc"] == [1, 0, 1]
    histories.forget("a")
    assert histories.of("a", 7.0).points == [] and histories.of("a", 7.0).now == 7.0


def test_what_is_told_does_not_change_afterwards():
    histories = Histories()
    histories.add([summary()], 0, 1.0)
    told = histories.of("r", 0)
    histories.add([summary()], 0, 1.0)
    assert told.points[0].sessions == 1
