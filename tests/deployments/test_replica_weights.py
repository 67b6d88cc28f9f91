"""An update of one replica: the order of its steps, and what is left when one fails. vLLM is a test double."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoint import content_digest
from deployments.replica_weights import ReplicaUpdater
from rollout.errors import EngineError, WeightsRefused
from rollout.weights import CheckpointSource, LoraSource, TransferSource


def checkpoint(path: Path, value: float) -> Path:
    path.mkdir()
    save_file({"norm.weight": torch.full((3,), value)}, path / "model.safetensors")
    return path


class FakeEngine:
    """A TEST DOUBLE of AsyncLLM with two ranks; `fail` names calls that raise, `lie` what the ranks misreport."""

    def __init__(self, served: Path) -> None:
        self.calls: list[str] = []
        self.loaded = served
        self.fail: set[str] = set()
        self.lie: dict[str, Any] = {}
        self.vllm_config = SimpleNamespace(lora_config=None, weight_transfer_config=None)

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fail:
            raise RuntimeError(f"{call} failed")

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.note(f"pause {mode}")

    async def resume_generation(self) -> None:
        self.note("resume")

    async def update_weight_version(self, version: str) -> None:
        self.note(f"version {version}")

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        (path,) = args
        if method == "rollout_load_checkpoint":
            self.note(f"load {Path(path).name}")
            self.loaded = Path(path)
            digest = self.lie.get("digest", content_digest(self.loaded))
            return [{"rank": rank, "tensors": 1, "digest": digest} for rank in (0, 1)]
        self.note("read back")
        told = {"checksum": content_digest(self.loaded), "hidden": 0, "compared": 1, "differing": []}
        if path is not None:
            told |= self.lie
        return [{"rank": rank, **told} for rank in (1, 0)]


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(checkpoint(tmp_path / "served", 1.0))


@pytest.fixture
def updater(engine: FakeEngine) -> ReplicaUpdater:
    return ReplicaUpdater("replica", engine, engine.loaded, lambda v: engine.calls.append(f"told {v}"))


@pytest.fixture
def new(tmp_path: Path) -> CheckpointSource:
    return CheckpointSource(path=str(checkpoint(tmp_path / "new", 2.0)))


async def test_the_order_of_an_update(updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource):
    report = await updater.apply(new, 7)
    assert engine.calls == [
        "read back", "pause keep", "load new", "read back", "version 7", "told 7", "resume",
    ]  # fmt: skip
    assert (report.replica, report.version) == ("replica", 7)
    assert [rank.rank for rank in report.ranks] == [0, 1]
    assert report.pause_ms >= report.load_ms + report.verify_ms > 0
    assert (await updater.current()).version == 7


async def test_refused_weights_touch_nothing(updater: ReplicaUpdater, engine: FakeEngine, tmp_path: Path):
    with pytest.raises(WeightsRefused):
        await updater.apply(CheckpointSource(path=str(tmp_path / "nowhere")), 1)
    assert engine.calls == []


@pytest.mark.parametrize(
    "lie",
    [
        {"digest": "other"},
        {"differing": ["norm.weight"]},
        {"checksum": "as before"},
    ],
    ids=["other tensors were read", "a parameter differs", "nothing changed"],
)
async def test_ranks_that_do_not_carry_it_go_back(
    updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource, lie: dict[str, Any]
):
    if "checksum" in lie:
        lie = {"checksum": content_digest(engine.loaded)}
    engine.lie = lie
    original = engine.collective_rpc

    async def honest_about_the_old(method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        engine.lie = lie if args[0] is None or Path(args[0]).name == "new" else {}
        return await original(method, args)

    engine.collective_rpc = honest_about_the_old  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        await updater.apply(new, 7)
    assert engine.loaded.name == "served" and engine.calls[-1] == "resume"
    assert engine.calls[-2] == "version 0" and "told 7" not in engine.calls
    assert updater.broken is None


@pytest.mark.parametrize("step", ["load new", "version 7"])
async def test_a_step_that_raises_goes_back(
    updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource, step: str
):
    engine.fail = {step}
    with pytest.raises(RuntimeError, match="failed"):
        await updater.apply(new, 7)
    assert engine.loaded.name == "served" and engine.calls[-1] == "resume" and updater.broken is None
    engine.fail = set()
    assert (await updater.apply(new, 8)).version == 8


async def test_a_replica_that_cannot_go_back_is_broken_and_stays_frozen(
    updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource
):
    engine.fail = {"load new", "load served"}
    with pytest.raises(RuntimeError):
        await updater.apply(new, 7)
    assert updater.broken is not None and "load served failed" in updater.broken
    assert "resume" not in engine.calls


async def test_one_update_at_a_time(updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource):
    await asyncio.gather(updater.apply(new, 1), updater.apply(CheckpointSource(path=str(engine.loaded)), 2))
    first = engine.calls.index("resume")
    assert engine.calls.index("pause keep", first) > first
    assert engine.calls.count("pause keep") == 2


async def test_sources_that_the_engine_is_not_set_up_for(updater: ReplicaUpdater, tmp_path: Path):
    with pytest.raises(WeightsRefused, match="enable_lora"):
        await updater.check(LoraSource(name="a", path=str(tmp_path)))
    with pytest.raises(WeightsRefused, match="weight_transfer_config"):
        await updater.check(TransferSource(backend="nccl"))
