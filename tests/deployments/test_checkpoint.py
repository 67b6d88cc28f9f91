"""Checkpoints are looked at before anything loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoint import check_checkpoint, content_digest, read_headers
from rollout.errors import WeightsRefused

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3).to(torch.bfloat16),
    "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return write(tmp_path / "served", TENSORS)


def write(directory: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / name)
    return directory


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = dict(TENSORS)
    for key, value in tensors.items():
        name = {"norm": "model.norm.weight", "embed": "model.embed_tokens.weight"}.get(key, key)
        found.pop(name, None)
        if value is not None:
            found[name] = value
    return found


def test_other_values_fit(tmp_path: Path, served: Path):
    check_checkpoint(write(tmp_path / "new", changed(norm=torch.zeros(3, dtype=torch.bfloat16))), served)
    check_checkpoint(write(tmp_path / "float", changed(norm=torch.zeros(3))), served)


def test_an_output_matrix_may_be_there_or_not(tmp_path: Path, served: Path):
    new = write(tmp_path / "new", changed(**{"lm_head.weight": torch.zeros(4, 3)}))
    check_checkpoint(new, served)
    check_checkpoint(served, new)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(norm=None), "model.norm.weight is missing"),
        (changed(extra=torch.zeros(1)), "extra is not a tensor of the served model"),
        (changed(norm=torch.zeros(4, dtype=torch.bfloat16)), r"model.norm.weight has shape \[4\].*\[3\]"),
        (changed(norm=torch.zeros(3, dtype=torch.int8)), "model.norm.weight has dtype I8"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, served: Path, tensors: dict, message: str):
    with pytest.raises(WeightsRefused, match=message):
        check_checkpoint(write(tmp_path / "new", tensors), served)


def test_many_problems_are_counted(tmp_path: Path, served: Path):
    extra = {f"x{n}": torch.zeros(1) for n in range(9)}
    with pytest.raises(WeightsRefused, match="and 5 more"):
        check_checkpoint(write(tmp_path / "new", {**TENSORS, **extra}), served)


def test_directories_that_are_none(tmp_path: Path, served: Path):
    for path, message in [
        (tmp_path / "nowhere", "does not exist"),
        (served / "model.safetensors", "is not a directory"),
        (tmp_path, "holds no safetensors"),
    ]:
        with pytest.raises(WeightsRefused, match=message):
            read_headers(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:5], lambda b: b"\xff" * 40])
def test_damaged_files(served: Path, damage):
    file = served / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightsRefused, match=r"is not complete|is not a safetensors file"):
        read_headers(served)


def test_shards(tmp_path: Path, served: Path):
    names = list(TENSORS)
    for number, name in enumerate(names):
        write(tmp_path / "new", {name: TENSORS[name]}, f"part-{number}.safetensors")
    index = {"weight_map": {name: f"part-{number}.safetensors" for number, name in enumerate(names)}}
    (tmp_path / "new" / "model.safetensors.index.json").write_text(json.dumps(index))
    check_checkpoint(tmp_path / "new", served)
    assert content_digest(tmp_path / "new") == content_digest(served), "the same tensors, in other files"
    (tmp_path / "new" / "part-1.safetensors").unlink()
    with pytest.raises(WeightsRefused, match=r"not complete: part-1.safetensors"):
        check_checkpoint(tmp_path / "new", served)


def test_the_digest_notices_one_bit_and_swapped_names(tmp_path: Path, served: Path):
    flipped = TENSORS["model.norm.weight"].clone()
    flipped.view(torch.int16)[1] ^= 1
    digests = {
        content_digest(served),
        content_digest(write(tmp_path / "bit", changed(norm=flipped))),
        content_digest(write(tmp_path / "a", {"x": torch.zeros(2), "y": torch.ones(2)})),
        content_digest(write(tmp_path / "b", {"y": torch.zeros(2), "x": torch.ones(2)})),
    }
    assert len(digests) == 4
