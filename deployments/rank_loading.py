"""Counts what a rank of an engine loads, while vLLM loads it: layers, bytes of the checkpoint, bytes of the device.

It runs in the rank's process as a model loader of vLLM (`load_format="progress"`), and writes its figures into a
small file that the replica reads (`deployments.replica_loading`).

A layer is all tensors below one number of a stack (`model.layers.7.…`), counted when it is complete. What lies
outside of the stacks (embeddings, norms, the output matrix) is in the bytes and in no layer, so that `layers_total`
is the number that the model's card gives. The stacks of an image encoder count too. With pipeline parallelism a
rank's layers are its own.

Invariant: a tensor counts after vLLM has placed it, and a load never fails because of its counting: a full disk, a
missing folder or a mistake in here costs the figures and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from deployments.checkpoint import TensorInfo, read_headers
from rollout.errors import WeightsRefused

logger = logging.getLogger(__name__)

LOAD_FORMAT = "progress"
# Our keys of `model_loader_extra_config`; vLLM's loader refuses those that it does not know.
DIRECTORY_KEY = "progress_dir"
FORMAT_KEY = "progress_load_format"
# Figures are written at most so often: a file replaced 20 times a second costs a load nothing.
WRITE_EVERY_S = 0.05
# A rank that cannot load writes why into a file with this ending.
ERROR_SUFFIX = ".error"
MAX_ERROR_CHARS = 1_000
MIB = 2**20

# How models call their stacks. Numbers below other names are parts of a layer (`experts.3`) or of none (`mlp.2`).
_LAYER = re.compile(r"(?:[^.]+\.)*?(?:layers|layer|h|blocks|block)\.\d+(?=\.)")

Figures = dict[str, Any]
"""What a rank's file holds: the fields of the stage `loading_to_vram`, and `done`, `reload`."""


def layer_of(name: str) -> str | None:
    """The layer that a tensor belongs to: its name up to the number in a stack (`model.layers.7`); None: to none."""
    found = _LAYER.match(name)
    return found.group() if found is not None else None


class LoadCount:
    """The figures of one load of one checkpoint into one model. Knows names and sizes, no tensors."""

    def __init__(
        self, checkpoint: Mapping[str, int] | None, held: Mapping[str, int], renamed: Callable[[str], str] = str
    ) -> None:
        """`checkpoint`: bytes of each tensor by its name; None: not known before it is read.

        `held`: bytes of each parameter that this rank holds, by its name. `renamed`: from the one name to the other.
        """
        self.layers_loaded = 0
        self.bytes_read = 0
        self.device_bytes = 0
        self.done = False
        self._sizes = checkpoint
        self._renamed = renamed
        layers = (layer_of(renamed(name)) for name in checkpoint or ())
        self._missing = Counter(layer for layer in layers if layer is not None)
        self._of_layer: Counter[str] = Counter()
        self._outside: dict[str, int] = {}
        for name, size in held.items():
            layer = layer_of(name)
            if layer is None:
                self._outside[name] = size
            else:
                self._of_layer[layer] += size
        self._to_read = sum((checkpoint or {}).values())
        self._held_total = sum(held.values())
        # A pipeline's rank skips what belongs to others. Where no name agrees, all of the checkpoint's count.
        own = self._missing.keys() & self._of_layer.keys()
        self._layers = frozenset(own or self._missing.keys())

    @property
    def layers_total(self) -> int | None:
        """None: the checkpoint does not tell beforehand."""
        return None if self._sizes is None else len(self._layers)

    @property
    def bytes_total(self) -> int | None:
        """Bytes that are to be read; None: the checkpoint does not tell beforehand."""
        if self.done:
            return self.bytes_read
        # More is read than was to be where a model brings a second source of weights.
        return None if self._sizes is None else max(self._to_read, self.bytes_read)

    def placed(self, name: str, size: int) -> None:
        """A tensor of the checkpoint is where it belongs. `size`: its bytes."""
        self.bytes_read += size if self._sizes is None else self._sizes.get(name, size)
        held_as = self._renamed(name)
        self.device_bytes += self._outside.pop(held_as, 0)
        layer = layer_of(held_as)
        if layer is None or layer not in self._missing:
            return
        self._missing[layer] -= 1
        if self._missing[layer] == 0 and layer in self._layers:
            self.layers_loaded += 1
            self.device_bytes += self._of_layer.pop(layer, 0)

    def finish(self) -> None:
        """The loader has nothing more: what has not come by now is not needed, and all parameters are placed."""
        self.done = True
        self.layers_loaded = len(self._layers)
        self.device_bytes = self._held_total


class RankFile:
    """The file of one rank, replaced as a whole, so that a reader never meets half of it."""

    def __init__(self, directory: str | None, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`directory`: None: figures go nowhere."""
        self._path = None if directory is None else Path(directory) / f"rank-{rank}.json"
        self._clock = clock
        self._written_at = float("-inf")
        self._told = False

    def write(self, figures: Callable[[], Figures], *, now: bool = False) -> None:
        """Write what `figures` gives, unless that was done a moment ago. Never raises OSError."""
        if self._path is None or (not now and self._clock() - self._written_at < WRITE_EVERY_S):
            return
        self._written_at = self._clock()
        fresh = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            fresh.write_text(json.dumps(figures()))
            fresh.replace(self._path)
        except OSError as failure:
            if not self._told:
                # The replica removes the folder once it is ready, and weights may be loaded again later.
                level = logging.DEBUG if isinstance(failure, FileNotFoundError) else logging.WARNING
                logger.log(level, "the progress of loading cannot be written to %s: %s", self._path, failure)
            self._told = True

    def failed(self, failure: BaseException) -> None:
        """Say why this rank's load failed, beside its figures. Never raises OSError.

        vLLM tells the engine that a rank died, and not of what.
        """
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.with_suffix(ERROR_SUFFIX).write_text(
                    f"{type(failure).__name__}: {failure}"[:MAX_ERROR_CHARS], errors="replace"
                )


# Bytes of the parameters of each model as they were when it was loaded first: vLLM's kernels may keep matrices in
# forms of their own afterwards, and while weights are loaded anew the parameters have no memory at all.
_HELD: WeakKeyDictionary[torch.nn.Module, dict[str, int]] = WeakKeyDictionary()
# What this process has loaded: an engine may load a second, drafting, model, whose figures are added to the first's.
_LOADED: WeakKeyDictionary[torch.nn.Module, LoadCount] = WeakKeyDictionary()


class ProgressLoader(DefaultModelLoader):
    """vLLM's own loader for files, counting. Takes two more keys in `model_loader_extra_config`:

    `progress_dir`: directory for the ranks' files (it must exist; without the key nothing is written);
    `progress_load_format`: the format that vLLM's loader gets in place of ours, "auto" by default as in vLLM.
    """

    def __init__(self, load_config: Any) -> None:
        """Raises ValueError for keys that neither vLLM's loader nor this one knows."""
        extra = load_config.model_loader_extra_config
        extra = dict(extra) if isinstance(extra, dict) else extra
        self._directory: str | None = None
        inner = "auto"
        if isinstance(extra, dict):
            self._directory = _text(extra, DIRECTORY_KEY)
            inner = _text(extra, FORMAT_KEY) or inner
        super().__init__(dataclasses.replace(load_config, load_format=inner, model_loader_extra_config=extra))
        self._files: list[str] = []

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """vLLM's iterator over the checkpoint; it comes back for the next tensor when it has placed the last."""
        counting: _Counting | None = None
        self._files = []
        for name, tensor in super().get_all_weights(model_config, model):
            size = tensor.numel() * tensor.element_size()
            if counting is None:
                # Only now is it known which files are read.
                counting = self._begin(model)
            yield name, tensor
            # Not kept alive until the next one is read: two large tensors would need the memory of both.
            del tensor
            if not counting.placed(name, size):
                counting = _Counting.off()
        if counting is None:
            counting = self._begin(model)
        counting.finish()

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """vLLM's own; a failure is told on its way."""
        try:
            super().load_weights(model, model_config)
        except Exception as failure:
            RankFile(self._directory, _rank()).failed(failure)
            raise

    def _prepare_weights(self, *arguments: Any, **keywords: Any) -> tuple[str, list[str], bool, str]:
        found = super()._prepare_weights(*arguments, **keywords)
        if found[2]:
            self._files += found[1]
        return found

    def _begin(self, model: torch.nn.Module) -> _Counting:
        try:
            reload = model in _HELD
            if not reload:
                _HELD[model] = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
            count = LoadCount(self._sizes(), _HELD[model], _renamed(model))
            earlier = [] if reload else list(_LOADED.values())
            if not reload:
                _LOADED[model] = count
            return _Counting([*earlier, count], RankFile(self._directory, _rank()), _device(model), reload)
        except Exception as failure:
            logger.warning("loading is not counted: %s: %s", type(failure).__name__, failure)
            return _Counting.off()

    def _sizes(self) -> dict[str, int] | None:
        """Bytes of every tensor that this rank will read, by its name in the checkpoint; None: not known."""
        if not self._files:
            return None
        sizes = {}
        try:
            for folder in sorted({Path(file).parent for file in self._files}):
                names = {Path(file).name for file in self._files if Path(file).parent == folder}
                for name, info in read_headers(folder).items():
                    if Path(info.file).name in names and not should_skip_weight(name, self.local_expert_ids):
                        sizes[name] = _size(info)
        except WeightsRefused as failure:
            logger.warning("how much there is to load is not known: %s", failure)
            return None
        return sizes


class _Counting:
    """One load on its way into the rank's file. Whatever goes wrong in here ends the counting, not the load."""

    def __init__(self, counts: list[LoadCount], file: RankFile, device: str, reload: bool) -> None:
        """`counts`: of all that this process loads, the one on its way last."""
        self._counts = counts
        self._file = file
        self._device = device
        self._reload = reload
        file.write(self._figures, now=True)

    @classmethod
    def off(cls) -> _Counting:
        """Counts nothing."""
        return _Off([], RankFile(None, 0), "", False)

    def placed(self, name: str, size: int) -> bool:
        """See LoadCount. False: the counting has failed and should stop."""
        try:
            self._counts[-1].placed(name, size)
            self._file.write(self._figures)
            return True
        except Exception as failure:
            logger.warning("loading is not counted any more: %s: %s", type(failure).__name__, failure)
            return False

    def finish(self) -> None:
        """See LoadCount."""
        try:
            self._counts[-1].finish()
            self._file.write(self._figures, now=True)
        except Exception as failure:
            logger.warning("the end of loading was not counted: %s: %s", type(failure).__name__, failure)

    def _figures(self) -> Figures:
        counts = self._counts
        return {
            "rank": _rank(),
            "device": self._device,
            "layers_loaded": sum(count.layers_loaded for count in counts) if _all(counts, "layers_total") else None,
            "layers_total": _sum(counts, "layers_total"),
            "vram_mb": round(sum(count.device_bytes for count in counts) / MIB, 3),
            "bytes_read": sum(count.bytes_read for count in counts),
            "bytes_total": _sum(counts, "bytes_total"),
            "done": counts[-1].done,
            "reload": self._reload,
        }


class _Off(_Counting):
    def placed(self, name: str, size: int) -> bool:
        return True

    def finish(self) -> None:
        return


def register() -> None:
    """Make `load_format="progress"` known to vLLM in this process. Called again it does nothing."""
    global _registered
    if not _registered:
        register_model_loader(LOAD_FORMAT)(ProgressLoader)
        _registered = True


_registered = False


def _text(extra: dict[str, Any], key: str) -> str | None:
    """Take a key of ours out. Raises ValueError where it is no text."""
    value = extra.pop(key, None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"model_loader_extra_config.{key} must be text, got {type(value).__name__}")
    return value


def _size(info: TensorInfo) -> int:
    return info.end - info.start


def _rank() -> int:
    """This process's number within its engine."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _device(model: torch.nn.Module) -> str:
    """Where the parameters are; while they are nowhere (`meta`), where they are going to be."""
    found = next((str(parameter.device) for parameter in model.parameters()), "cpu")
    if found != "meta":
        return found
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _renamed(model: torch.nn.Module) -> Callable[[str], str]:
    """From a tensor's name in the checkpoint to that in the model, as far as the model says so itself."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return str
    return lambda name: mapper.map_name(name) or name


def _all(counts: Iterable[LoadCount], figure: str) -> bool:
    return all(getattr(count, figure) is not None for count in counts)


def _sum(counts: list[LoadCount], figure: str) -> int | None:
    return sum(getattr(count, figure) for count in counts) if _all(counts, figure) else None
