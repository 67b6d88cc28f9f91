"""Updates over all replicas, with Serve's handle and the replicas as test doubles."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.engine_client import EngineInfo
from actors.replica_health import MAX_FAILURES, Health, ReplicaTable
from actors.weight_keeper import WeightKeeper, odd_ones
from rollout.errors import ConflictError, EngineError, RefusedError, UnavailableError, WeightsRefused
from rollout.weights import CheckpointSource, RankWeights, ReplicaWeights, WeightSource

SOURCE = CheckpointSource(path="/new")


class FakeReplica:
    """A TEST DOUBLE of one engine replica."""

    def __init__(self) -> None:
        self.version = 0
        self.checksum = "good"
        self.refuses: str | None = None
        self.fails = False
        self.gave_up = False

    async def describe(self) -> EngineInfo:
        return EngineInfo("m", 10, 1, self.version)

    async def check_weights(self, source: WeightSource) -> None:
        if self.refuses:
            raise WeightsRefused(self.refuses)

    async def update_weights(self, source: WeightSource, version: int) -> ReplicaWeights:
        if self.fails:
            raise EngineError("no")
        self.version = version
        return ReplicaWeights("x", version, [RankWeights(0, self.checksum)], pause_ms=5.0)

    async def give_up(self) -> None:
        self.gave_up = True


class FakeHandle:
    """A TEST DOUBLE of Serve's handle: `options(session_id=…)` names the replica."""

    deployment_name = "weight-keeper-test"

    def __init__(self, replicas: dict[str, FakeReplica], name: str = "") -> None:
        self.replicas, self.name = replicas, name

    def options(self, session_id: str) -> FakeHandle:
        return FakeHandle(self.replicas, session_id)

    def __getattr__(self, method: str) -> Any:
        class Remote:
            remote = staticmethod(getattr(self.replicas[self.name], method))

        return Remote


@pytest.fixture
def replicas() -> dict[str, FakeReplica]:
    return {name: FakeReplica() for name in "abc"}


class Made:
    """A keeper with what it told."""

    def __init__(self, replicas: dict[str, FakeReplica]) -> None:
        self.remembered: list[tuple[int, str]] = []
        self.versions: list[int] = []
        self.keeper = WeightKeeper(FakeHandle(replicas), self.remember, self.versions.append)
        self.keeper.replicas.listed(replicas)

    async def remember(self, version: int, source: WeightSource, state: str) -> None:
        self.remembered.append((version, state))


@pytest.fixture
async def made(replicas: dict[str, FakeReplica]):
    found = Made(replicas)
    yield found
    found.keeper.close()


async def test_all_replicas_take_it(made: Made, replicas: dict[str, FakeReplica]):
    report = await made.keeper.update(SOURCE)
    assert (report.version, len(report.replicas), report.failed, report.pause_ms) == (1, 3, {}, 5.0)
    assert made.remembered == [(1, "pending"), (1, "current")] and made.versions == [1]
    assert {replica.version for replica in replicas.values()} == {1}
    assert (await made.keeper.update(SOURCE)).version == 2


async def test_one_refusal_refuses_all(made: Made, replicas: dict[str, FakeReplica]):
    replicas["b"].refuses = "norm has another shape"
    with pytest.raises(RefusedError, match="nothing has changed: norm has another shape"):
        await made.keeper.update(SOURCE)
    assert made.remembered == [] and made.versions == []
    assert {replica.version for replica in replicas.values()} == {0}


async def test_a_replica_that_fails_is_stale_until_it_is_brought_up(made: Made, replicas: dict[str, FakeReplica]):
    replicas["b"].fails = True
    report = await made.keeper.update(SOURCE)
    assert set(report.failed) == {"b"} and made.versions == [1]
    assert made.keeper.replicas.health("b") is Health.SUSPECT
    replicas["b"].fails = False
    await made.keeper._reconcile("b")
    assert replicas["b"].version == 1 and made.keeper.replicas.health("b") is Health.HEALTHY


async def test_a_replica_with_other_weights_than_the_rest_does_not_count(
    made: Made, replicas: dict[str, FakeReplica]
):
    replicas["c"].checksum = "odd"
    report = await made.keeper.update(SOURCE)
    assert list(report.failed) == ["c"] and "checksums differ" in report.failed["c"]


async def test_if_nobody_takes_it_the_old_ones_stay_and_the_number_is_spent(
    made: Made, replicas: dict[str, FakeReplica]
):
    for replica in replicas.values():
        replica.fails = True
    with pytest.raises(UnavailableError, match="no replica took version 1; version 0 is still served"):
        await made.keeper.update(SOURCE)
    assert made.remembered == [(1, "pending"), (1, "failed")] and made.versions == []
    for replica in replicas.values():
        replica.fails = False
    assert (await made.keeper.update(SOURCE)).version == 2


async def test_a_version_of_the_trainers_own(made: Made):
    assert (await made.keeper.update(SOURCE, 10)).version == 10
    for old in (10, 3):
        with pytest.raises(ConflictError, match=f"version {old} is not new"):
            await made.keeper.update(SOURCE, old)


async def test_updates_come_one_after_the_other(made: Made):
    reports = await asyncio.gather(*(made.keeper.update(SOURCE) for _ in range(4)))
    assert [report.version for report in reports] == [1, 2, 3, 4]


async def test_without_replicas(made: Made):
    made.keeper.replicas.listed([])
    with pytest.raises(UnavailableError, match="no engine replica is running"):
        await made.keeper.update(SOURCE)


async def test_a_restarted_keeper_counts_on_and_brings_back_what_is_current(
    made: Made, replicas: dict[str, FakeReplica]
):
    """A pending update was cut off: one replica has it, and must go back."""
    made.keeper.restore(4, SOURCE, 5)
    replicas["a"].version, replicas["b"].version = 5, 4
    for name in "abc":
        await made.keeper._reconcile(name)
    assert {replica.version for replica in replicas.values()} == {4}
    assert (await made.keeper.update(SOURCE)).version == 6


def test_odd_ones():
    def replica(*checksums: str) -> ReplicaWeights:
        return ReplicaWeights("r", 1, [RankWeights(rank, c) for rank, c in enumerate(checksums)])

    assert odd_ones({}) == [] and odd_ones({"a": replica("x", "y")}) == []
    assert odd_ones({"a": replica("x", "y"), "b": replica("x", "y"), "c": replica("y", "x")}) == ["c"]


def test_the_table_of_replicas():
    table = ReplicaTable()
    table.listed(["a", "b"])
    assert table.to_update() == ["a", "b"], "they have said nothing yet"
    table.answered("a", 0)
    table.answered("b", 0)
    assert table.to_update() == []
    table.current = 1
    table.answered("a", 1)
    assert (table.health("a"), table.health("b")) == (Health.HEALTHY, Health.STALE)
    for number in range(MAX_FAILURES):
        assert table.to_give_up() == []
        table.failed("b", f"reason {number}")
    assert table.to_give_up() == ["b"] and table.status()["b"]["reason"] == f"reason {MAX_FAILURES - 1}"
    table.listed(["a", "c"])
    assert table.names() == ["a", "c"] and table.to_give_up() == []
