"""An update of one replica: the order of its steps, and what is left when one fails. vLLM is a test double."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

from deployments import replica_weights
from deployments.checkpoint import content_digest
from deployments.replica_weights import LORA_ID, ReplicaUpdater
from rollout.errors import EngineError, WeightsRefused
from rollout.weights import CheckpointSource, LoraSource, TransferSource


def checkpoint(path: Path, value: float) -> Path:
    path.mkdir()
    save_file({"norm.weight": torch.full((3,), value)}, path / "model.safetensors")
    return path


class FakeEngine:
    """A TEST DOUBLE of AsyncLLM with two ranks; `fail` and `hang`: calls that do; `lie`: what the ranks misreport."""

    def __init__(self, served: Path) -> None:
        self.calls: list[str] = []
        self.loaded = served
        self.fail: set[str] = set()
        self.hang: set[str] = set()
        self.lie: dict[str, Any] = {}
        self.vllm_config = SimpleNamespace(lora_config=None, weight_transfer_config=None)
        self.adapters: list[Any] = []
        # What vLLM's list of served models asks of its engine.
        self.model_config = self.renderer = self.input_processor = None

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fail:
            raise RuntimeError(f"{call} failed")

    async def hanging(self, call: str) -> None:
        self.note(call)
        if call in self.hang:
            await asyncio.sleep(60)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        await self.hanging(f"pause {mode}")

    async def resume_generation(self) -> None:
        await self.hanging("resume")

    async def add_lora(self, request: Any) -> bool:
        self.note(f"adapter {Path(request.lora_path).name}")
        self.adapters.append(request)
        return True

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


async def test_a_pause_that_does_not_come_in_time_is_taken_back(
    updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource, monkeypatch: pytest.MonkeyPatch
):
    """It may come later, and nobody would end it."""
    monkeypatch.setattr(replica_weights, "PAUSE_SECONDS", 0.02)
    engine.hang = {"pause keep"}
    with pytest.raises(EngineError, match="did not pause within"):
        await updater.apply(new, 7)
    assert engine.calls == ["read back", "pause keep", "resume"] and updater.broken is None
    engine.hang = set()
    assert (await updater.apply(new, 8)).version == 8


@pytest.mark.parametrize("how", ["fail", "hang"])
@pytest.mark.parametrize("also", [set(), {"load new"}])
async def test_a_replica_that_cannot_go_on_is_broken(
    updater: ReplicaUpdater,
    engine: FakeEngine,
    new: CheckpointSource,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    also: set[str],
):
    monkeypatch.setattr(replica_weights, "PAUSE_SECONDS", 0.02)
    engine.fail = set(also)
    getattr(engine, how).add("resume")
    with pytest.raises((EngineError, RuntimeError)):
        await updater.apply(new, 7)
    assert updater.broken is not None and "generation could not be resumed" in updater.broken


async def test_one_update_at_a_time(updater: ReplicaUpdater, engine: FakeEngine, new: CheckpointSource):
    await asyncio.gather(updater.apply(new, 1), updater.apply(CheckpointSource(path=str(engine.loaded)), 2))
    first = engine.calls.index("resume")
    assert engine.calls.index("pause keep", first) > first
    assert engine.calls.count("pause keep") == 2


# Adapters


@pytest.fixture
def adapter(engine: FakeEngine, tmp_path: Path) -> LoraSource:
    engine.vllm_config.lora_config = SimpleNamespace(max_cpu_loras=2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    return LoraSource(name="mine", path=str(tmp_path / "a"))


async def test_an_adapter_is_loaded_in_place_and_used_without_loading_it_again(
    updater: ReplicaUpdater, engine: FakeEngine, adapter: LoraSource, new: CheckpointSource
):
    await updater.apply(adapter, 1)
    assert engine.calls[1:4] == ["pause keep", "adapter a", "read back"] and engine.adapters[0].load_inplace
    assert (updater.lora.lora_path, updater.lora.load_inplace) == (adapter.path, False)
    await updater.apply(adapter, 2)
    assert len({request.lora_int_id for request in engine.adapters}) == 1, "a new one takes the place of the old one"
    await updater.apply(new, 3)
    assert updater.lora is None


async def test_vllm_tells_the_policys_adapter_from_those_that_it_serves(
    updater: ReplicaUpdater, engine: FakeEngine, adapter: LoraSource
):
    """vLLM's own list of served models is asked, with its own numbers."""
    client: Any = engine
    served = OpenAIServingModels(client, [BaseModelPath(name="model", model_path="/m")])
    for name in ("mine", "other"):
        await served.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=f"/{name}"))
    await updater.apply(adapter, 1)
    *theirs, ours = engine.adapters
    assert [request.lora_int_id for request in theirs] == [1, 2], "it counts from 1"
    assert ours.lora_int_id == updater.lora.lora_int_id == LORA_ID
    assert np.iinfo(np.int32).max == LORA_ID, "as far away as its arrays of ids allow"
    # A batch is a set of requests, which are equal where their names are.
    assert len({*theirs, ours}) == 3 and updater.lora.lora_name == ours.lora_name


async def test_an_adapter_that_could_be_thrown_out_for_a_served_one_is_refused(
    engine: FakeEngine, adapter: LoraSource
):
    def with_served(count: int) -> ReplicaUpdater:
        return ReplicaUpdater("replica", engine, engine.loaded, lambda _: None, count)

    await with_served(1).check(adapter)
    with pytest.raises(WeightsRefused, match=r"hold 2 adapters, .* has 2; set engine\.vllm\.max_cpu_loras: 3"):
        await with_served(2).check(adapter)


async def test_sources_that_the_engine_is_not_set_up_for(updater: ReplicaUpdater, tmp_path: Path):
    with pytest.raises(WeightsRefused, match="enable_lora"):
        await updater.check(LoraSource(name="a", path=str(tmp_path)))
    with pytest.raises(WeightsRefused, match="weight_transfer_config"):
        await updater.check(TransferSource(backend="nccl"))
