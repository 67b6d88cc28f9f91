"""The state of loading: what listeners are told, early, late and slow ones, and what is forgotten."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest

from rollout.loading import (
    FORGET_FAILED_S,
    FORGET_S,
    MAX_MESSAGE_CHARS,
    MAX_RANKS,
    MAX_REPLICAS,
    LoadingEvent,
    LoadingState,
    merge,
)

READY: dict[str, Any] = {"stage": "ready"}
WARMING_UP: dict[str, Any] = {"stage": "warming_up"}


def rank(number: int = 0, layers: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "stage": "loading_to_vram", "rank": number, "device": "cpu", "layers_loaded": layers, "layers_total": 4,
        "vram_mb": 10.0 * layers, "bytes_read": 100 * layers, "bytes_total": 400, **more,
    }  # fmt: skip


def error(message: str = "no memory") -> dict[str, Any]:
    return {"stage": "error", "message": message}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> LoadingState:
    return LoadingState(2, clock=clock, first_id=1)


def stages(events: list[LoadingEvent] | Any) -> list[str]:
    return [event.data["stage"] for event in events]


def test_an_event_has_the_fields_of_the_contract(state: LoadingState):
    state.report("a", [rank(1, 3, pid=7)])
    (event,) = state.since(0)
    assert event.data == {
        "stage": "loading_to_vram", "replica": "a", "rank": 1, "device": "cpu", "layers_loaded": 3,
        "layers_total": 4, "vram_mb": 30.0, "bytes_read": 300, "bytes_total": 400,
    }  # fmt: skip
    assert not event.final and pickle.loads(pickle.dumps(event)) == event


def test_a_late_listener_is_told_the_newest_of_every_rank_and_then_what_follows(state: LoadingState):
    for layers in (1, 2, 3):
        state.report("a", [rank(0, layers), rank(1, layers - 1)])
    state.report("b", [rank(0, 4), WARMING_UP])
    told = state.since(0)
    assert [(e.data["replica"], e.data.get("rank"), e.data.get("layers_loaded")) for e in told] == [
        ("a", 0, 3), ("a", 1, 2), ("b", 0, 4), ("b", None, None),
    ]  # fmt: skip
    assert state.since(told[-1].id) == []
    state.report("a", [rank(1, 3)])
    assert [e.data["layers_loaded"] for e in state.since(told[-1].id)] == [3]


def test_ids_only_grow_and_a_new_state_goes_on_above_the_old_one():
    old = LoadingState()
    for layers in range(4):
        old.report("a", [rank(0, layers)])
    new = LoadingState()
    new.report("a", [rank()])
    assert new.since(0)[0].id > old.last_id
    assert new.last_id < 2**53 and abs(new.last_id / 1e6 - time.time()) < 60


def test_an_id_that_was_never_given_is_told_everything(state: LoadingState):
    state.report("a", [rank()])
    assert state.since(state.last_id) == []
    assert stages(state.since(state.last_id + 1)) == ["loading_to_vram"]


def test_the_same_again_is_no_news(state: LoadingState):
    assert state.report("a", [rank(), WARMING_UP])
    before = state.last_id
    assert not state.report("a", [rank(), WARMING_UP]) and not state.report("a", [])
    assert state.last_id == before


def test_figures_never_go_back(state: LoadingState):
    state.report("a", [rank(0, 3)])
    assert not state.report("a", [rank(0, 2)])
    assert state.since(0)[0].data["layers_loaded"] == 3


def test_ready_comes_once_all_are(state: LoadingState):
    assert state.snapshot().phase == "nothing"
    state.report("a", [rank(), READY])
    assert state.snapshot().phase == "loading" and "ready" not in stages(state.since(0))
    state.report("b", [rank(), READY])
    snapshot = state.snapshot()
    assert (snapshot.phase, snapshot.ready, snapshot.expected) == ("ready", 2, 2)
    assert snapshot.events[-1].data == {"stage": "ready"} and snapshot.events[-1].final


def test_a_slow_listener_sees_every_rank_before_ready(state: LoadingState):
    state.report("a", [rank(0, 1)])
    seen = state.since(0)[-1].id
    state.report("a", [rank(0, 4), WARMING_UP, READY])
    state.report("b", [rank(0, 4), READY])
    told = state.since(seen)
    assert stages(told) == ["loading_to_vram", "warming_up", "loading_to_vram", "ready"]
    assert [event.id for event in told] == sorted(event.id for event in told)


def test_a_ready_that_is_no_longer_true_is_withdrawn_and_comes_again_as_the_newest(state: LoadingState, clock: Clock):
    state.report("a", [rank(), READY])
    state.report("b", [rank(), READY])
    first = state.since(0)[-1].id
    clock.now += FORGET_S
    state.report("a", [])
    clock.now += 1
    state.report("c", [rank(0, 2)])
    assert state.snapshot().phase == "loading" and "ready" not in stages(state.since(0))
    assert {event.data["replica"] for event in state.since(0)} == {"a", "c"}, "b gave no sign and is forgotten"
    state.report("c", [READY])
    assert state.since(0)[-1].data == READY and state.since(0)[-1].id > first


def test_one_more_than_expected_may_load_while_all_is_ready(state: LoadingState):
    for name in "ab":
        state.report(name, [READY])
    state.report("c", [rank()])
    assert state.snapshot().phase == "ready"
    assert stages(state.since(0)) == ["loading_to_vram", "ready"], "the end is the newest"


def test_weights_that_are_loaded_later_do_not_disturb(state: LoadingState):
    for name in "ab":
        state.report(name, [rank(0, 4), READY])
    before = state.since(0)
    assert not state.report("a", [rank(0, 1, layers_total=9), WARMING_UP])
    assert state.since(0) == before


def test_a_replica_that_starts_again_begins_anew(state: LoadingState):
    state.report("a", [rank(0, 4), READY])
    assert state.report("a", [{"stage": "starting"}])
    assert state.since(0) == [] and state.snapshot().phase == "loading"
    state.report("a", [rank(0, 1)])
    assert state.since(0)[0].data["layers_loaded"] == 1


def test_a_replica_that_has_said_nothing_yet_is_loading(state: LoadingState):
    assert not state.report("a", [{"stage": "starting"}])
    assert state.snapshot().phase == "loading" and state.since(0) == []


def test_an_error_is_the_newest_and_stays_until_something_takes_its_place(state: LoadingState):
    state.report("a", [rank()])
    state.report("b", [rank(), error("x" * 9_999)])
    assert state.snapshot().phase == "failed"
    assert state.since(0)[-1].data == {"stage": "error", "replica": "b", "message": "x" * MAX_MESSAGE_CHARS}
    seen = state.last_id
    state.report("a", [rank(0, 2)])
    assert stages(state.since(seen)) == ["loading_to_vram", "error"]
    assert not state.report("b", [READY]), "what has failed cannot become ready"
    state.report("b2", [])
    assert state.snapshot().phase == "loading"
    assert {event.data["replica"] for event in state.since(0)} == {"a"}


def test_a_replica_that_was_expected_anyway_takes_no_failed_ones_place(state: LoadingState):
    state.report("a", [error()])
    state.report("b", [rank()])
    assert state.snapshot().phase == "failed"
    state.report("a2", [rank()])
    assert state.snapshot().phase == "loading"


def test_a_second_error_follows_when_the_first_is_replaced(state: LoadingState):
    state.report("a", [error("first")])
    state.report("b", [error("second")])
    assert state.since(0)[-1].data["message"] == "first"
    assert state.report("a2", [rank()])
    assert state.since(0)[-1].data["message"] == "second"


def test_errors_are_kept_longer_than_replicas(state: LoadingState, clock: Clock):
    state.report("a", [error()])
    state.report("b", [rank()])
    clock.now = FORGET_S + 1
    assert state.snapshot().phase == "failed" and stages(state.since(0)) == ["error"]
    clock.now = FORGET_FAILED_S + 1
    assert state.snapshot().phase == "nothing" and state.since(0) == []


def test_what_is_expected_may_change(state: LoadingState):
    state.report("a", [READY])
    assert state.expect(1) and state.since(0)[-1].data == READY
    assert not state.expect(2) and state.since(0) == []
    with pytest.raises(ValueError, match="expected"):
        state.expect(0)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"stage": "flying"}, "stage: 'flying' is not one of starting, downloading"),
        ({}, "stage: None"),
        ({"stage": "error"}, "error needs message"),
        ({"stage": "downloading", "bytes_total": 1}, "downloading needs bytes_downloaded, speed_mbps"),
    ],
)
def test_an_event_that_is_none_is_refused_and_nothing_is_taken(state: LoadingState, event: dict, message: str):
    with pytest.raises(ValueError, match=message):
        state.report("a", [rank(), event])
    assert state.snapshot().phase == "nothing"


def test_memory_is_bounded(clock: Clock):
    state = LoadingState(1, clock=clock, first_id=1)
    for number in range(MAX_REPLICAS + 5):
        clock.now += 0.001
        state.report(f"r{number}", [rank()])
    assert len(state.since(0)) == MAX_REPLICAS and state.since(0)[0].data["replica"] == "r5"
    small = LoadingState(1, clock=clock, first_id=1)
    small.report("a", [rank(number) for number in range(MAX_RANKS + 5)])
    assert len(small.since(0)) == MAX_RANKS


def test_ranks_are_merged_by_the_one_furthest_behind(state: LoadingState):
    state.report("a", [rank(0, 4), rank(1, 1)])
    state.report("b", [rank(0, 4)])
    merged = merge(state.since(0), "a")
    assert merged is not None
    assert (merged.ranks, merged.layers_loaded, merged.layers_total) == (2, 1, 4)
    assert (merged.vram_mb, merged.fraction) == (50.0, 500 / 800)
    assert merge(state.since(0), "c") is None


def test_what_is_not_known_of_a_rank_is_not_known_of_the_replica(state: LoadingState):
    state.report("a", [rank(0, 4), rank(1, layers_loaded=None, layers_total=None, bytes_total=None)])
    merged = merge(state.since(0), "a")
    assert merged is not None and merged.fraction is None and merged.layers_total is None
