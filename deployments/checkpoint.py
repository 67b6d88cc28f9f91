"""Looking at a checkpoint before anything loads it: is it whole, and does it fit the model that is served?

Invariant: a directory that passes can be loaded without leaving half of it in the engines: every file is complete,
every tensor is there, with the name, shape and kind of number of the served checkpoint's.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import WeightsRefused

INDEX = "model.safetensors.index.json"
# Problems named in one refusal.
MAX_NAMED = 4
# A header beyond this is no header (the format's own limit, https://huggingface.co/docs/safetensors).
MAX_HEADER_BYTES = 100 * 2**20
# With tied embeddings a checkpoint may hold the output matrix, or leave it out.
_TIED = "lm_head.weight"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    """Bytes from the beginning of the file."""
    end: int


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint directory, without reading their data. Raises WeightsRefused."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist on the engine's machine"
        raise WeightsRefused(f"{directory} {what}; give a directory of safetensors that all engines see")
    tensors: dict[str, TensorInfo] = {}
    for file in _files(directory):
        tensors.update(_header(file))
    return tensors


def check_checkpoint(new: Path, served: Path) -> None:
    """Raises WeightsRefused where `new` is not whole, or does not fit what is loaded from `served`."""
    fresh, old = read_headers(new), read_headers(served)
    problems = [f"{name} is missing" for name in sorted(old.keys() - fresh.keys() - {_TIED})]
    problems += [
        f"{name} is not a tensor of the served model" for name in sorted(fresh.keys() - old.keys() - {_TIED})
    ]
    for name in sorted(fresh.keys() & old.keys()):
        mine, theirs = fresh[name], old[name]
        if mine.shape != theirs.shape:
            problems.append(f"{name} has shape {list(mine.shape)}, the served model has {list(theirs.shape)}")
        elif mine.dtype != theirs.dtype and not {mine.dtype, theirs.dtype} <= _FLOATS:
            problems.append(f"{name} has dtype {mine.dtype}, the served model has {theirs.dtype}")
    if problems:
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise WeightsRefused(f"{new} does not fit the served model: {'; '.join(problems[:MAX_NAMED])}{more}")


def tensor_digest(name: str, data: Any) -> int:
    """A number for a tensor's name and bytes (32 bits). Digests of a checkpoint's tensors add up in any order."""
    return zlib.crc32(data, zlib.crc32(name.encode()))


def content_digest(directory: Path) -> str:
    """Digest of all tensors' names and bytes, whichever files they are in. One pass, 1 MiB at a time."""
    total = 0
    for name, info in read_headers(directory).items():
        crc = zlib.crc32(name.encode())
        for piece in _pieces(info):
            crc = zlib.crc32(piece, crc)
        total += crc
    return f"{total:016x}"


def _pieces(info: TensorInfo) -> Iterator[bytes]:
    with open(info.file, "rb") as file:
        file.seek(info.start)
        left = info.end - info.start
        while left:
            piece = file.read(min(left, 2**20))
            if not piece:
                raise WeightsRefused(f"{info.file} became shorter while it was read")
            left -= len(piece)
            yield piece


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        found = sorted(directory.glob("*.safetensors"))
        if not found:
            raise WeightsRefused(f"{directory} holds no safetensors files")
        return found
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, OSError) as failure:
        raise WeightsRefused(f"{index} cannot be read: {failure}") from None
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise WeightsRefused(f"{directory} is not complete: {', '.join(missing[:MAX_NAMED])} of its index is missing")
    return [directory / name for name in names]


def _header(file: Path) -> dict[str, TensorInfo]:
    """The header of one file, checked against its length. Raises WeightsRefused."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            tensors[name] = TensorInfo(
                tuple(entry["shape"]), entry["dtype"], str(file), 8 + length + start, 8 + length + end
            )
        needed = max((info.end for info in tensors.values()), default=8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as failure:
        raise WeightsRefused(f"{file} is not a safetensors file: {failure}") from None
    if size != needed:
        raise WeightsRefused(f"{file} has {size} bytes and should have {needed}: it is not complete")
    return tensors
