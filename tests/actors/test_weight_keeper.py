"""Updates over all replicas, with Serve's handle and the replicas as test doubles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from actors import weight_keeper
from actors.engine_client import EngineInfo
from actors.replica_health import MAX_FAILURES, Health, ReplicaTable
from actors.weight_keeper import WeightKeeper, odd_ones
from rollout.errors import ConflictError, EngineError, RefusedError, UnavailableError, WeightsRefused
from rollout.weights import CheckpointSource, RankWeights, ReplicaWeights, TransferSource, WeightSource

SOURCE = CheckpointSource(path="/new")
OTHER = CheckpointSource(path="/other")


class FakeReplica:
    """A TEST DOUBLE of one engine replica."""

    def __init__(self) -> None:
        self.version = 0
        self.checksum = "good"
        self.refuses: str | None = None
        self.fails = False
        self.gave_up = False
        self.loads = 0
        self.hangs = False
        self.on_give_up: Callable[[], None] = lambda: None

    async def describe(self) -> EngineInfo:
        return EngineInfo("m", 10, 1, self.version)

    async def check_weights(self, source: WeightSource) -> None:
        if self.refuses:
            raise WeightsRefused(self.refuses)

    async def update_weights(self, source: WeightSource, version: int) -> ReplicaWeights:
        if self.fails:
            raise EngineError("no")
        while self.hangs:
            await asyncio.sleep(0.001)
        self.version = version
        self.loads += 1
        return ReplicaWeights("x", version, [RankWeights(0, self.checksum)], pause_ms=5.0)

    async def weights(self) -> ReplicaWeights:
        if self.fails:
            raise EngineError("no")
        return ReplicaWeights("x", self.version, [RankWeights(0, self.checksum)])

    async def give_up(self) -> None:
        self.gave_up = True
        self.on_give_up()


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
        self.unfit: list[frozenset[str]] = []
        self.keeper = WeightKeeper(
            FakeHandle(replicas), self.remember, self.versions.append, on_unfit=self.unfit.append
        )
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
    assert made.unfit == [{"c"}], "it says that it carries the newest version, and must get no sessions"
    assert made.keeper.replicas.health("c") is Health.SUSPECT


async def test_a_replica_with_other_weights_must_load_them_again_although_it_says_the_right_version(
    made: Made, replicas: dict[str, FakeReplica]
):
    replicas["c"].checksum = "odd"
    await made.keeper.update(SOURCE)
    assert (await replicas["c"].describe()).version == 1
    replicas["c"].checksum = "good"
    await made.keeper._round()
    assert replicas["c"].loads == 2 and made.keeper.replicas.health("c") is Health.HEALTHY
    assert made.unfit == [{"c"}, frozenset()]


async def test_a_replica_that_loads_other_weights_again_and_again_is_given_up(
    made: Made, replicas: dict[str, FakeReplica]
):
    replicas["c"].checksum = "odd"
    await made.keeper.update(SOURCE)
    for _ in range(MAX_FAILURES - 1):
        assert not replicas["c"].gave_up
        await made.keeper._round()
    assert replicas["c"].gave_up and not replicas["a"].gave_up
    assert made.unfit == [{"c"}] and made.keeper.replicas.serving() == []
    made.keeper.replicas.listed("ab")
    await made.keeper._round()
    assert made.unfit[-1] == frozenset(), "Serve has replaced it"


async def test_an_update_that_is_cut_off_leaves_no_replica_trusted(made: Made, replicas: dict[str, FakeReplica]):
    await made.keeper.update(SOURCE)
    replicas["b"].hangs = True
    updating = asyncio.create_task(made.keeper.update(OTHER))
    while replicas["a"].version != 2:
        await asyncio.sleep(0)
    updating.cancel()
    await asyncio.gather(updating, return_exceptions=True)
    assert made.keeper.version == 1
    assert set(made.keeper.replicas.to_update()) == set("abc"), "they may carry either"
    replicas["b"].hangs = False
    await made.keeper._round()
    assert {replica.version for replica in replicas.values()} == {1} and made.keeper.replicas.to_update() == []


async def test_a_replica_that_has_lost_what_came_over_the_wire_waits_for_the_next_update(
    made: Made, replicas: dict[str, FakeReplica]
):
    await made.keeper.update(TransferSource())
    replicas["b"].version = 0
    made.keeper.replicas.listed("ac")
    made.keeper.replicas.listed("abc")
    for _ in range(MAX_FAILURES + 1):
        await made.keeper._round()
    assert made.keeper.replicas.health("b") is Health.STALE and not replicas["b"].gave_up
    assert (replicas["b"].loads, replicas["b"].version) == (1, 0)
    report = await made.keeper.update(TransferSource())
    assert len(report.replicas) == 3 and made.keeper.replicas.health("b") is Health.HEALTHY


async def test_a_replica_that_received_other_tensors_waits_for_the_next_update_without_sessions(
    made: Made, replicas: dict[str, FakeReplica]
):
    replicas["c"].checksum = "odd"
    await made.keeper.update(TransferSource())
    for _ in range(MAX_FAILURES + 1):
        await made.keeper._round()
    assert made.unfit == [{"c"}] and not replicas["c"].gave_up
    replicas["c"].checksum = "good"
    await made.keeper.update(TransferSource())
    assert made.unfit == [{"c"}, frozenset()]


async def test_the_keeper_outlives_a_replica_that_goes_while_another_is_given_up(
    made: Made, replicas: dict[str, FakeReplica], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(weight_keeper, "RECONCILE_S", 0.001)
    await made.keeper.update(SOURCE)
    for name in "ab":
        replicas[name].version, replicas[name].fails = 0, True
        for _ in range(MAX_FAILURES):
            made.keeper.replicas.failed(name, "it is tired")
    replicas["a"].on_give_up = lambda: made.keeper.replicas.listed("ac")
    keeping = asyncio.create_task(made.keeper.keep())
    async with asyncio.timeout(5):
        while not replicas["b"].gave_up:
            await asyncio.sleep(0.001)
    assert not keeping.done()
    keeping.cancel()


async def test_a_round_that_fails_is_told_and_followed_by_the_next(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(weight_keeper, "RECONCILE_S", 0.001)
    rounds = []

    async def one_round() -> None:
        rounds.append(True)
        raise KeyError("surprise")

    monkeypatch.setattr(made.keeper, "_round", one_round)
    keeping = asyncio.create_task(made.keeper.keep())
    async with asyncio.timeout(5):
        while len(rounds) < 2:
            await asyncio.sleep(0.001)
    keeping.cancel()
    assert "could not be looked after" in caplog.text and "surprise" in caplog.text


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
            await made.keeper.update(OTHER, old)


async def test_an_update_whose_answer_was_lost_is_told_again_and_not_done_again(
    made: Made, replicas: dict[str, FakeReplica]
):
    first = await made.keeper.update(SOURCE, 10)
    assert await made.keeper.update(SOURCE, 10) == first
    assert [replica.loads for replica in replicas.values()] == [1, 1, 1] and made.versions == [10]
    assert (await made.keeper.update(SOURCE, 11)).version == 11, "the same source may come under a new number"


async def test_it_is_told_again_by_a_controller_that_was_started_again(made: Made, replicas: dict[str, FakeReplica]):
    made.keeper.restore(10, SOURCE, 10)
    replicas["a"].version, replicas["b"].version, replicas["c"].fails = 10, 9, True
    report = await made.keeper.update(SOURCE, 10)
    assert (report.version, [replica.version for replica in report.replicas]) == (10, [10])
    assert report.failed == {"b": "it carries version 9", "c": "EngineError: no"}
    assert made.remembered == [] and replicas["a"].loads == 0


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
