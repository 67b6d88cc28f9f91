"""What runs inside every rank of an engine: loading a checkpoint while counting what was read, and reading back.

vLLM mixes this class into its workers (`worker_extension_cls`); its methods are called by `collective_rpc` and answer
with plain data, one answer a rank.

Invariant: what a rank reports was computed from the tensors that it holds, or that it fed to the loader; never from
what it was told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deployments import rank_loading
from deployments.checkpoint import read_headers, tensor_digest

# The position weights of the checksum repeat after so many elements: a prime, so that it fits no layer's width.
_PERIOD = 65_521


def _request_amx() -> None:
    """Ask the kernel for the AMX tiles that vLLM's CPU attention uses.

    Linux kills a process that uses them unasked. vLLM asks on its way to tensor parallelism only; an engine of one
    rank died of an illegal instruction with its first prompt (vLLM 0.32, Xeon with amx_tile).
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


_request_amx()
# vLLM imports this module in every rank before it loads anything.
rank_loading.register()


class RankWeights:
    """Methods of a vLLM worker. Names are prefixed, as they share its namespace."""

    model_runner: Any
    rank: int

    def rollout_load_checkpoint(self, path: str) -> dict[str, Any]:
        """Load a checkpoint directory in place. Returns what was read: tensors, and the digest of their content."""
        read = _Counted()
        self.model_runner.reload_weights(weights_iterator=read.tensors(Path(path)))
        return {"rank": self.rank, "tensors": read.count, "digest": f"{read.total:016x}"}

    def rollout_read_back(self, path: str | None) -> dict[str, Any]:
        """Checksum of all parameters, and (with `path`) how many are bit for bit as in that checkpoint.

        Compared are those that this rank holds whole under the checkpoint's own name: norms always, and with one rank
        all that vLLM does not fuse. `hidden` counts layers whose matrix the CPU kernels keep in a form of their own.
        """
        model = self.model_runner.get_model()
        compared, differing = compare(model, Path(path)) if path is not None else (0, [])
        return {
            "rank": self.rank,
            "checksum": checksum(model),
            "hidden": hidden(model),
            "compared": compared,
            "differing": differing,
        }


class _Counted:
    """A checkpoint's tensors as an iterator that adds up what it hands out."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0

    def tensors(self, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        by_file: dict[str, list[str]] = {}
        for name, info in read_headers(directory).items():
            by_file.setdefault(info.file, []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    self.total += tensor_digest(name, _bytes(tensor))
                    self.count += 1
                    yield name, tensor


def checksum(model: torch.nn.Module) -> str:
    """Hex digest over names and bits of all parameters: Σ bits · (1 + position mod 65521), modulo 2⁶³, per tensor.

    Computed where the tensor is, in integers, so that it is exact, needs no copy to the host, and notices swapped
    elements, which a plain sum would not; the names keep two tensors apart that changed places.
    """
    total = 0
    for name, tensor in sorted(_tensors(model).items()):
        total += tensor_digest(name, _sum(tensor).to_bytes(16, "little", signed=True))
    return f"{total:016x}"


def compare(model: torch.nn.Module, directory: Path) -> tuple[int, list[str]]:
    """How many parameters equal the checkpoint's tensor of their name and shape, and the names of those that differ.

    The checkpoint's are rounded to the parameter's dtype first, as the loader does.
    """
    from safetensors import safe_open

    held = _tensors(model)
    compared, differing = 0, []
    for name, info in read_headers(directory).items():
        tensor = held.get(name)
        if tensor is None or tuple(tensor.shape) != info.shape:
            continue
        with safe_open(info.file, framework="pt") as opened:
            expected = opened.get_tensor(name).to(tensor.dtype)
        if torch.equal(tensor.cpu(), expected):
            compared += 1
        else:
            differing.append(name)
    return compared, differing


def hidden(model: torch.nn.Module) -> int:
    """Layers that multiply by a matrix which is no longer among the parameters."""
    return sum(
        1
        for module in model.modules()
        if getattr(module, "cpu_linear", None) is not None and _tensor(module, "weight").numel() == 0
    )


def _tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name, None)
    return value if isinstance(value, torch.Tensor) else torch.empty(0)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.numel()}


def _sum(tensor: torch.Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(width)
    weights = torch.arange(1, min(len(bits), _PERIOD) + 1, device=bits.device, dtype=torch.int64)
    total = 0
    for start in range(0, len(bits), _PERIOD):
        piece = bits[start : start + _PERIOD].to(torch.int64)
        total += int((piece * weights[: len(piece)]).sum())
    return total % 2**63


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).reshape(-1).numpy())
