"""Counting in vLLM's own loader, on real safetensors files.

No engine is started: the loader's iterator is drawn as a model's `load_weights` would, on a bare torch module.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader

from deployments import rank_loading
from deployments.rank_loading import LoadCount, ProgressLoader, RankFile, layer_of, register

LAYERS, WIDTH = 3, 8
EMBED_BYTES, LAYER_BYTES = 16 * WIDTH * 4, 2 * WIDTH * WIDTH * 4 + WIDTH * 4
TOTAL_BYTES = EMBED_BYTES + LAYERS * LAYER_BYTES + WIDTH * 4


class Layer(torch.nn.Module):
    """Holds two matrices of the checkpoint as one, as vLLM fuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.qk_proj = torch.nn.Parameter(torch.zeros(2 * WIDTH, WIDTH))
        self.norm = torch.nn.Parameter(torch.zeros(WIDTH))


class Model(torch.nn.Module):
    def __init__(self, layers: range = range(LAYERS)) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(16, WIDTH)
        self.model.layers = torch.nn.ModuleDict({str(n): Layer() for n in layers})
        self.model.norm = torch.nn.Parameter(torch.zeros(WIDTH))


def tensors() -> dict[str, torch.Tensor]:
    found = {"model.embed_tokens.weight": torch.ones(16, WIDTH), "model.norm": torch.ones(WIDTH)}
    for n in range(LAYERS):
        found[f"model.layers.{n}.q_proj"] = torch.full((WIDTH, WIDTH), float(n))
        found[f"model.layers.{n}.k_proj"] = torch.full((WIDTH, WIDTH), float(n))
        found[f"model.layers.{n}.norm"] = torch.ones(WIDTH)
    return found


def write(directory: Path, parts: list[dict[str, torch.Tensor]]) -> Path:
    directory.mkdir()
    index = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file(part, directory / name)
        index |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files, and a layer whose tensors lie in both."""
    names = sorted(tensors())
    cut = names.index("model.layers.1.norm")
    parts = [{name: tensors()[name] for name in part} for part in (names[:cut], names[cut:])]
    return write(tmp_path / "checkpoint", parts)


@pytest.fixture
def progress(tmp_path: Path) -> Path:
    path = tmp_path / "progress"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has loaded nothing, and writes every figure."""
    register()
    rank_loading._LOADED.clear()
    monkeypatch.setattr(rank_loading, "WRITE_EVERY_S", 0.0)


def loader(progress: Path | str | None, **extra: Any) -> ProgressLoader:
    if progress is not None:
        extra["progress_dir"] = str(progress)
    found = get_model_loader(LoadConfig(load_format="progress", model_loader_extra_config=extra))
    assert isinstance(found, ProgressLoader)
    return found


def weights(loader: ProgressLoader, checkpoint: Path, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return loader.get_all_weights(SimpleNamespace(model=str(checkpoint), revision=None), model)


def figures(progress: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((progress / f"rank-{rank}.json").read_text())


def test_it_is_registered_once_and_takes_vllms_place(caplog: pytest.LogCaptureFixture, progress: Path):
    register()
    assert "already registered" not in caplog.text
    inner = loader(progress).load_config
    assert (inner.load_format, inner.model_loader_extra_config) == ("auto", {})
    assert loader(progress, progress_load_format="safetensors").load_config.load_format == "safetensors"


def test_keys_that_nobody_knows_are_refused_as_vllm_does():
    with pytest.raises(ValueError, match="progres_dir"):
        loader(None, progres_dir="/x")
    with pytest.raises(ValueError, match=r"progress_dir must be text, got int"):
        get_model_loader(LoadConfig(load_format="progress", model_loader_extra_config={"progress_dir": 3}))
    assert loader(None, enable_multithread_load=True).load_config.model_loader_extra_config == {
        "enable_multithread_load": True
    }


def test_a_tensor_counts_when_the_loader_comes_back_for_the_next(checkpoint: Path, progress: Path):
    model = Model()
    seen: list[tuple[str, dict[str, Any]]] = []
    for name, tensor in weights(loader(progress), checkpoint, model):
        assert torch.equal(tensor, tensors()[name])
        seen.append((name, figures(progress)))
    assert [name for name, _ in seen] == sorted(tensors())
    first, last = seen[0][1], figures(progress)
    assert (first["layers_loaded"], first["bytes_read"], first["vram_mb"]) == (0, 0, 0.0)
    assert (first["layers_total"], first["bytes_total"], first["done"]) == (LAYERS, TOTAL_BYTES, False)
    assert seen[1][1]["bytes_read"] == EMBED_BYTES
    assert [told["layers_loaded"] for _, told in seen] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert last == {
        "rank": 0, "device": "cpu", "layers_loaded": LAYERS, "layers_total": LAYERS,
        "vram_mb": round(TOTAL_BYTES / 2**20, 3), "bytes_read": TOTAL_BYTES, "bytes_total": TOTAL_BYTES,
        "done": True, "reload": False,
    }  # fmt: skip


def test_layers_across_files_in_any_order_are_counted_when_complete(tmp_path: Path, progress: Path):
    names = sorted(tensors(), key=lambda name: name[::-1])
    path = write(tmp_path / "mixed", [{name: tensors()[name] for name in names[n::3]} for n in range(3)])
    came: list[str] = []
    for name, _ in weights(loader(progress), path, Model()):
        whole = sum(
            all(other in came for other in tensors() if other.startswith(f"model.layers.{n}.")) for n in range(LAYERS)
        )
        assert figures(progress)["layers_loaded"] == whole
        came.append(name)
    assert figures(progress)["layers_loaded"] == LAYERS


def test_device_bytes_are_those_that_this_rank_holds(checkpoint: Path, progress: Path):
    model = Model()
    for layer in model.model.layers.values():
        layer.qk_proj = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH))
    held = sum(parameter.numel() * 4 for parameter in model.parameters())
    for name, _ in weights(loader(progress), checkpoint, model):
        if name == "model.layers.1.k_proj":
            one_layer = (WIDTH * WIDTH + WIDTH) * 4
            assert figures(progress)["vram_mb"] == round((EMBED_BYTES + one_layer) / 2**20, 3)
    assert figures(progress)["bytes_read"] == TOTAL_BYTES > held
    assert figures(progress)["vram_mb"] == round(held / 2**20, 3)


def test_a_pipelines_rank_counts_its_own_layers(checkpoint: Path, progress: Path):
    for _ in weights(loader(progress), checkpoint, Model(range(1, 3))):
        assert figures(progress)["layers_total"] == 2
    assert figures(progress)["layers_loaded"] == 2


def test_names_that_the_model_maps_itself(checkpoint: Path, progress: Path):
    model = Model()
    outer = torch.nn.Module()
    outer.language_model = model
    outer.hf_to_vllm_mapper = SimpleNamespace(map_name=lambda name: f"language_model.{name}")
    layers = [figures(progress) for _ in weights(loader(progress), checkpoint, outer)]
    assert layers[-1]["vram_mb"] == round((TOTAL_BYTES - WIDTH * 4) / 2**20, 3), "all but the last tensor"


def test_a_reload_keeps_the_first_loads_totals_and_says_that_it_is_one(checkpoint: Path, progress: Path):
    model = Model()
    list(weights(loader(progress), checkpoint, model))
    first = figures(progress)
    for parameter in model.parameters():
        # As vLLM's kernels may leave them, and worse than `meta`.
        parameter.data = torch.empty(0)
    # vLLM makes a new loader for it.
    began, *_ = [figures(progress) for _ in weights(loader(progress), checkpoint, model)]
    assert began["reload"] and began["bytes_read"] == 0 and began["layers_loaded"] == 0
    assert figures(progress) == {**first, "reload": True}


def test_a_second_model_is_added_to_the_first(checkpoint: Path, progress: Path):
    target, draft = Model(), Model()
    list(weights(loader(progress), checkpoint, target))
    told = [figures(progress) for _ in weights(loader(progress), checkpoint, draft)]
    assert told[0]["bytes_read"] == TOTAL_BYTES and told[0]["bytes_total"] == 2 * TOTAL_BYTES and not told[0]["done"]
    assert (figures(progress)["layers_loaded"], figures(progress)["done"]) == (2 * LAYERS, True)


def test_files_of_other_ranks_are_left_alone(checkpoint: Path, progress: Path, monkeypatch: pytest.MonkeyPatch):
    for number in (0, 3):
        monkeypatch.setattr(rank_loading, "_rank", lambda number=number: number)
        list(weights(loader(progress), checkpoint, Model()))
    assert sorted(path.name for path in progress.iterdir()) == ["rank-0.json", "rank-3.json"]
    assert figures(progress, 3)["rank"] == 3


def test_experts_that_this_rank_skips_are_not_waited_for(tmp_path: Path, progress: Path):
    names = [f"model.layers.0.mlp.experts.{n}.w.weight" for n in range(4)]
    path = write(tmp_path / "experts", [{name: torch.ones(2, 2) for name in names}])
    found = loader(progress)
    found.local_expert_ids = {1, 2}
    model = Model(range(1))
    assert [name for name, _ in weights(found, path, model)] == names[1:3]
    assert figures(progress)["bytes_total"] == 32 and figures(progress)["layers_loaded"] == 1


def test_a_load_that_breaks_off_is_not_said_to_be_done(checkpoint: Path, progress: Path):
    iterator = weights(loader(progress), checkpoint, Model())
    for _ in range(3):
        next(iterator)
    iterator.close()
    assert not figures(progress)["done"] and figures(progress)["layers_loaded"] == 0


def test_a_load_that_fails_says_why(checkpoint: Path, progress: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that is cut, its header whole; then a model that does not take a tensor."""
    (first, *_) = sorted(checkpoint.glob("*.safetensors"))
    whole = first.read_bytes()
    found, config = loader(progress), SimpleNamespace(model=str(checkpoint), revision=None, quantization=None)
    for name in ("_init_ep_weight_filter", "_init_mm_encoder_only_weight_filter"):
        monkeypatch.setattr(found, name, lambda *_: None)
    first.write_bytes(whole[:-10])
    model: Any = Model()
    model.load_weights = lambda pairs: {name for name, _ in pairs}
    with pytest.raises(Exception, match=r"incomplete|not fully covered"):
        found.load_weights(model, config)
    assert "SafetensorError" in (progress / "rank-0.error").read_text()

    def refuse(pairs: Any) -> None:
        next(iter(pairs))
        raise ValueError("no parameter of that shape" + "!" * 5_000)

    first.write_bytes(whole)
    model.load_weights = refuse
    with pytest.raises(ValueError, match="no parameter"):
        found.load_weights(model, config)
    said = (progress / "rank-0.error").read_text()
    assert said.startswith("ValueError: no parameter of that shape!") and len(said) == rank_loading.MAX_ERROR_CHARS
    RankFile(None, 0).failed(ValueError("nowhere to write it"))
    RankFile(str(progress / "none"), 0).failed(ValueError("no folder"))


@pytest.mark.parametrize("trouble", ["no folder", "a file in its place", "no directory given"])
def test_a_load_never_fails_for_its_files(
    checkpoint: Path, progress: Path, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
):
    blocked = tmp_path / "file"
    blocked.touch()
    where = {"no folder": tmp_path / "none", "a file in its place": blocked, "no directory given": None}[trouble]
    with caplog.at_level(logging.DEBUG):
        assert len(list(weights(loader(where), checkpoint, Model()))) == len(tensors())
    told = [record for record in caplog.records if "cannot be written" in record.message]
    assert len(told) == (0 if where is None else 1)


def test_a_load_never_fails_for_its_counting(
    checkpoint: Path, progress: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a mistake")

    for name in ("placed", "finish", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(LoadCount, name, broken)
            assert len(list(weights(loader(progress), checkpoint, Model()))) == len(tensors())
    assert caplog.text.count("a mistake") == 3, "said once each"


def test_a_full_disk_is_survived(progress: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    file = RankFile(str(progress), 0)
    monkeypatch.setattr(Path, "write_text", full)
    file.write(lambda: {"rank": 0}, now=True)
    monkeypatch.undo()
    file.write(lambda: {"rank": 0}, now=True)
    assert figures(progress) == {"rank": 0}


def test_figures_are_written_now_and_then_and_at_the_end(progress: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_loading, "WRITE_EVERY_S", 0.05)
    now = [0.0]
    file = RankFile(str(progress), 0, clock=lambda: now[0])
    seen = []
    for step in range(10):
        now[0] = step * 0.02
        file.write(lambda step=step: {"step": step})
        seen.append(figures(progress)["step"])
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    file.write(lambda: {"step": 99}, now=True)
    assert figures(progress)["step"] == 99
    assert [path.name for path in progress.iterdir()] == ["rank-0.json"], "nothing half written is left"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.experts.3.w1.weight", "model.layers.7"),
        ("transformer.h.0.attn.bias", "transformer.h.0"),
        ("h.11.ln_1.weight", "h.11"),
        ("visual.blocks.2.norm.weight", "visual.blocks.2"),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("visual.merger.mlp.0.weight", None),
        ("model.layers.7", None),
        ("layers.x.weight", None),
    ],
)
def test_layers_by_their_names(name: str, layer: str | None):
    assert layer_of(name) == layer


def test_what_headers_do_not_tell_is_not_guessed():
    count = LoadCount(None, {"model.layers.0.w": 8})
    count.placed("model.layers.0.w", 8)
    assert (count.layers_total, count.bytes_total, count.bytes_read) == (None, None, 8)
    count.finish()
    assert (count.layers_total, count.bytes_total, count.device_bytes) == (None, 8, 8)
