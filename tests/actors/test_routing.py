"""Which replica gets a turn: newest weights first, then stickiness within a margin, then the least loaded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.routing import SMALL_FLEET, ReplicaLoad, choose_replica


def loads(**in_flight: int) -> dict[str, ReplicaLoad]:
    return {name: ReplicaLoad(count) for name, count in in_flight.items()}


def test_without_replicas_there_is_none():
    assert choose_replica({}, None, 4) is None
    assert choose_replica({}, "a", 4) is None


def test_a_new_session_goes_to_the_least_loaded_and_ties_to_the_first_by_name():
    assert choose_replica(loads(a=3, b=1, c=2), None, 4) == "b"
    assert choose_replica(loads(c=1, b=1, a=2), None, 4) == "b"


@pytest.mark.parametrize(("held", "chosen"), [(0, "b"), (3, "b"), (4, "a"), (5, "a")])
def test_a_session_stays_until_its_replica_is_a_margin_busier(held: int, chosen: str):
    assert choose_replica(loads(a=0, b=held), "b", 4) == chosen


def test_with_no_margin_only_a_less_loaded_replica_is_stayed_with():
    assert choose_replica(loads(a=1, b=1), "b", 0) == "a"
    assert choose_replica(loads(a=1, b=0), "b", 0) == "b"


def test_a_replica_that_is_gone_holds_nothing():
    assert choose_replica(loads(a=9, b=5), "gone", 100) == "b"


def test_old_weights_are_never_chosen_however_idle():
    replicas = {"a": ReplicaLoad(0, version=1), "b": ReplicaLoad(50, version=2), "c": ReplicaLoad(60, version=2)}
    assert choose_replica(replicas, None, 4) == "b"
    assert choose_replica(replicas, "a", 100) == "b", "not even for the prefix"
    assert choose_replica(replicas, "c", 100) == "c"


replica_maps = st.dictionaries(
    st.sampled_from("abcdef"), st.builds(ReplicaLoad, st.integers(0, 20), st.integers(0, 2)), min_size=1
)


@given(replica_maps, st.none() | st.sampled_from("abcdefg"), st.integers(0, 10))
def test_the_choice_is_current_and_within_the_margin_of_the_best(
    replicas: dict[str, ReplicaLoad], held: str | None, margin: int
):
    chosen = choose_replica(replicas, held, margin)
    assert chosen is not None
    newest = max(load.version for load in replicas.values())
    assert replicas[chosen].version == newest
    least = min(load.in_flight for load in replicas.values() if load.version == newest)
    if chosen == held:
        assert replicas[chosen].in_flight <= least + max(0, margin - 1) or replicas[chosen].in_flight == least
    else:
        assert replicas[chosen].in_flight == least
        if held in replicas and replicas[held].version == newest:
            assert replicas[held].in_flight >= least + margin, "it was left for a reason"


# Large fleets

FLEET = {f"r{number:02d}": ReplicaLoad(number) for number in range(4 * SMALL_FLEET)}


def test_in_a_large_fleet_the_better_of_two_is_taken_and_no_other_is_looked_at():
    assert choose_replica(FLEET, None, 4, lambda names, count: ["r20", "r09"][:count]) == "r09"
    assert choose_replica(FLEET, "r12", 4, lambda names, count: ["r20", "r09"]) == "r12"
    assert choose_replica(FLEET, "r13", 4, lambda names, count: ["r20", "r09"]) == "r09"


def test_the_margin_grows_with_the_load():
    crowded = {name: ReplicaLoad(100 + load.in_flight) for name, load in FLEET.items()}
    assert choose_replica(crowded, "r24", 4, lambda names, count: ["r00", "r31"]) == "r24"
    assert choose_replica(crowded, "r25", 4, lambda names, count: ["r00", "r31"]) == "r00"


def test_workers_with_the_same_view_do_not_all_take_the_same_one():
    idle = {name: ReplicaLoad(0) for name in FLEET}
    chosen = {choose_replica(idle, None, 4) for _ in range(500)}
    assert len(chosen) > len(FLEET) / 2


def test_chance_is_only_asked_for_current_replicas():
    mixed = {name: ReplicaLoad(load.in_flight, version=int(name > "r15")) for name, load in FLEET.items()}
    assert all(mixed[str(choose_replica(mixed, "r00", 4))].version == 1 for _ in range(100))
