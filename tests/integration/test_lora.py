"""Adapters end to end: one that is served under its own name, beside those that a trainer brings as the policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from cluster import state
from cluster.ports import free_ports
from rollout import Limits, RolloutClient, Sampling, Task
from rollout.errors import RefusedError
from rollout.weights import LoraSource
from tests.conftest import MODEL, ROOT
from tests.integration.conftest import CONFIG, UP_SECONDS, rollout

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600, func_only=True)]

NAME = "adapters"
RANK = 4
TARGETS = ("q_proj", "v_proj", "down_proj")
# Of the factors' entries: an adapter as strong as the model's own matrices, so that nobody takes it for another one.
STRENGTH = 0.2
TOKENS = 16
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


def adapter(directory: Path, seed: int) -> Path:
    """A random LoRA adapter of the demo model, in PEFT's format."""
    directory.mkdir()
    torch.manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    with safe_open(MODEL / "model.safetensors", "pt") as model:
        for key in model.keys():  # noqa: SIM118
            name = key.removesuffix(".weight")
            if name.rpartition(".")[2] in TARGETS:
                rows, columns = model.get_slice(key).get_shape()
                factors[f"base_model.model.{name}.lora_A.weight"] = STRENGTH * torch.randn(RANK, columns)
                factors[f"base_model.model.{name}.lora_B.weight"] = STRENGTH * torch.randn(rows, RANK)
    assert factors
    save_file(factors, directory / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**told, "target_modules": list(TARGETS)}))
    return directory


@dataclass
class Adapters:
    """A running cluster that serves the adapter `own`."""

    address: str
    folder: Path

    def says(self, model: str, prompt: Any = None) -> list[int]:
        """The tokens that are most likely to follow `prompt` (ids, or text)."""
        asked = {"model": model, "prompt": prompt or "12 + 30 =", "max_tokens": TOKENS, "temperature": 0}
        answer = httpx.post(
            f"{self.address}/v1/completions", json={**asked, "ignore_eos": True, "return_token_ids": True}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def rolls_out(self) -> dict[str, Any]:
        """The one row of a rollout of one turn that always takes the likeliest token."""
        with RolloutClient(self.address) as client:
            table = client.rollout(
                [Task(task_id="sum", messages=QUESTION, data={"answer": "42"})],
                environment={"path": "examples.calculator.environment:Calculator"},
                sampling=Sampling(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True),
                limits=Limits(max_turns=1),
                group_size=1,
            )
        (row,) = table.to_pylist()
        assert row["error"] is None
        return row

    def push(self, name: str, path: Path) -> int:
        """A trainer's new policy; its version."""
        with RolloutClient(self.address) as client:
            report = client.update_weights(LoraSource(name=name, path=str(path)))
        assert report.failed == {}
        return report.version


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapters]:
    folder = tmp_path_factory.mktemp("adapters")
    (port,) = free_ports(1)
    config = yaml.safe_load(CONFIG.read_text())
    config |= {"name": NAME, "gateway": {"port": port}, "pythonpath": [str(ROOT)], "model": {"path": str(MODEL)}}
    config["workers"] = {"count": 1, "sessions": 8}
    config["engine"]["vllm"] |= {
        "max_num_seqs": 16,
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 8,
        "lora_modules": [{"name": "own", "path": str(adapter(folder / "own", 1))}],
    }
    del config["remote_rollout"]
    path = folder / "adapters.yaml"
    path.write_text(yaml.safe_dump(config))
    up = rollout("up", path, timeout=UP_SECONDS)
    assert up.returncode == 0, up.stdout + up.stderr
    started = state.load(NAME)
    assert started is not None
    yield Adapters(f"http://127.0.0.1:{port}", folder)
    down = rollout("down", NAME)
    assert down.returncode == 0, down.stdout + down.stderr
    assert list(state.processes(started)) == []


def test_a_served_adapter_and_the_policys_do_not_meet(adapters: Adapters):
    """The policy's has the same name as the served one, as nobody keeps a trainer from it."""
    plain, own, first = adapters.says("model"), adapters.says("own"), adapters.rolls_out()
    assert plain != own, "the served adapter is another model"
    assert first["response_ids"] == adapters.says("model", first["prompt_ids"])
    assert set(first["policy_versions"]) == {0}
    policies = [adapter(adapters.folder / f"policy-{seed}", seed) for seed in (2, 3)]
    said = []
    for number, path in enumerate((*policies, policies[0]), 1):
        assert adapters.push("own", path) == number
        said.append(adapters.says("model"))
        assert adapters.says("own") == own, "before and after"
        row = adapters.rolls_out()
        assert set(row["policy_versions"]) == {number}
        assert row["prompt_ids"] == first["prompt_ids"] and row["response_ids"] != first["response_ids"]
        assert row["response_ids"] == adapters.says("model", row["prompt_ids"])
        assert row["response_ids"] != adapters.says("own", row["prompt_ids"])
    assert len({tuple(tokens) for tokens in (plain, own, *said)}) == 4, "two policies, each another model"
    assert said[0] == said[2], "the first one came back"


def test_both_are_served_in_one_batch(adapters: Adapters):
    asked = ["model", "own"] * 8
    alone = {name: adapters.says(name) for name in set(asked)}
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(adapters.says, asked))
    # Sums of larger batches are rounded otherwise, so that single tokens may differ; whole answers do not.
    for name, answer in zip(asked, answers, strict=True):
        other = alone["own" if name == "model" else "model"]
        alike, mixed = (sum(a == b for a, b in zip(answer, of, strict=True)) for of in (alone[name], other))
        assert alike > mixed
    assert adapters.says("own") == alone["own"]


def test_an_adapter_that_does_not_fit_is_refused_and_both_go_on(adapters: Adapters):
    before = {name: adapters.says(name) for name in ("model", "own")}
    with pytest.raises(RefusedError):
        adapters.push("own", adapters.folder / "nowhere")
    assert {name: adapters.says(name) for name in before} == before
