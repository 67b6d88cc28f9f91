"""What a rank says of its weights: a checksum that notices everything, and a comparison bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoint import content_digest
from deployments.rank_weights import _PERIOD, RankWeights, checksum, compare, hidden


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(7, 5, dtype=torch.bfloat16)
        self.second = torch.nn.Linear(7, 5, dtype=torch.bfloat16)


class Worker(RankWeights):
    """A worker as vLLM would mix it, around a bare module."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rank = 1
        self.model_runner = self
        self.model = model

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self, weights_iterator) -> None:
        self.model.load_state_dict(dict(weights_iterator), strict=False)


@pytest.fixture
def model() -> Model:
    return Model()


def bits(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.data.view(torch.int16)


def test_the_checksum_is_of_the_content(model: Model):
    assert checksum(model) == checksum(Model())


def test_it_notices_a_bit_a_permutation_and_two_tensors_that_changed_places(model: Model):
    seen = {checksum(model)}
    bits(model.first.weight)[2, 3] ^= 1
    seen.add(checksum(model))
    bits(model.first.weight)[2, 3] ^= 1
    model.first.weight.data = model.first.weight.data.flip(1)
    seen.add(checksum(model))
    model.first.weight.data = model.first.weight.data.flip(1)
    model.first, model.second = model.second, model.first
    seen.add(checksum(model))
    assert len(seen) == 4


def test_tensors_longer_than_the_period():
    long = torch.nn.Module()
    long.weight = torch.nn.Parameter(torch.zeros(2 * _PERIOD + 3))
    before = checksum(long)
    long.weight.data[_PERIOD + 1] = 1.0
    assert checksum(long) != before


def test_loading_counts_what_was_read_and_reads_back(model: Model, tmp_path: Path):
    tensors = {"first.weight": torch.full((5, 7), 0.1), "second.bias": torch.full((5,), 2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    worker = Worker(model)
    before = worker.rollout_read_back(None)
    assert worker.rollout_load_checkpoint(str(tmp_path)) == {
        "rank": 1, "tensors": 2, "digest": content_digest(tmp_path),
    }  # fmt: skip
    after = worker.rollout_read_back(str(tmp_path))
    assert (after["compared"], after["differing"]) == (2, []), "rounded as the loader rounds"
    assert after["checksum"] != before["checksum"]


def test_a_parameter_that_differs_is_named_and_one_of_another_shape_left_out(model: Model, tmp_path: Path):
    tensors = {"first.weight": torch.zeros(5, 7), "second.weight": torch.zeros(3, 7), "elsewhere": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert compare(model, tmp_path) == (0, ["first.weight"])


def test_matrices_that_the_kernels_hid_are_counted(model: Model):
    assert hidden(model) == 0
    model.first.cpu_linear = lambda *_: None
    assert hidden(model) == 0
    model.first.weight = torch.nn.Parameter(torch.empty(0))
    assert hidden(model) == 1
