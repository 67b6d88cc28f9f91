"""The simulated fleet: it plays everything, says the same every time, and its balance is that of the real choice."""

from __future__ import annotations

from benchmarks import fleet


def test_every_session_is_played_and_delivered():
    found = fleet.simulate(4, 400, seed=1)
    assert found.sessions == 400 and found.turns >= 400
    assert found.controller_us_per_session > 0 and found.simulated_s > 0
    assert 0 < found.prefix_hits <= 1
    assert found.lanes == 16


def test_the_same_seed_gives_the_same_fleet():
    def outcome(seed: int) -> tuple[float, ...]:
        found = fleet.simulate(4, 200, seed)
        return found.turns, found.simulated_s, found.imbalance_mean, found.prefix_hits

    assert outcome(3) == outcome(3)
    assert outcome(3) != outcome(4)


def test_a_choice_that_ignores_load_would_be_seen(monkeypatch):
    fair = fleet.simulate(8, 1600)
    monkeypatch.setattr(fleet, "choose_replica", lambda loads, held_by, _margin: held_by or next(iter(loads)))
    unfair = fleet.simulate(8, 1600)
    assert unfair.imbalance_mean > 4 * fair.imbalance_mean
    assert unfair.simulated_s > fair.simulated_s
