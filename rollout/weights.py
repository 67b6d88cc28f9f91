"""What a trainer sends when it has new weights, and what comes back when every rank of every replica carries them.

Invariant: a version number names one state of the weights for ever; it is never given twice, not even after a
failed update or a restart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointSource(_Source):
    """A directory of safetensors files that the engines can read, of the served model's names and shapes."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str = Field(min_length=1, max_length=4096)
    """Absolute path, on a disk that all engines see."""


class LoraSource(_Source):
    """A LoRA adapter on top of the weights that are loaded. Needs `engine.vllm.enable_lora: true`."""

    kind: Literal["lora"] = "lora"
    name: str = Field(min_length=1, max_length=256)
    path: str = Field(min_length=1, max_length=4096)
    """Absolute path of the adapter's directory."""


class TransferSource(_Source):
    """Tensors straight from the trainer's GPUs, by vLLM's weight transfer (`engine.vllm.weight_transfer_config`).

    The trainer's side sends at the same time; see docs/protocols/weights.md.
    """

    kind: Literal["transfer"] = "transfer"
    backend: Literal["nccl", "ipc"] = "nccl"
    init_info: dict[str, Any] = Field(default_factory=dict)
    """Given to the engines' transfer group before the first update; empty: it is set up already."""
    update_info: dict[str, Any] = Field(default_factory=dict)
    """Names, shapes and dtypes of what is being sent, in vLLM's form."""


WeightSource = Annotated[CheckpointSource | LoraSource | TransferSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class RankWeights:
    """What one rank of one replica says that it carries, read back after the load."""

    rank: int
    checksum: str
    """Hex digest over the bits of all its parameters; equal on the same rank of every replica."""
    compared: int = 0
    """Parameters found bit for bit as in the checkpoint (those that this rank holds whole)."""


@dataclass(frozen=True)
class ReplicaWeights:
    """One replica after an update (or as it is, with no times)."""

    replica: str
    version: int
    ranks: list[RankWeights] = field(default_factory=list)
    pause_ms: float = 0.0
    """How long generation stood still."""
    load_ms: float = 0.0
    """Of which, loading."""
    verify_ms: float = 0.0
    """Of which, reading back."""


@dataclass(frozen=True)
class WeightReport:
    """An update that is done: the version is current, and every replica named here carries it."""

    version: int
    seconds: float
    pause_ms: float
    """The longest pause of a replica."""
    replicas: list[ReplicaWeights]
    failed: dict[str, str] = field(default_factory=dict)
    """Replicas that do not carry it, with the reason. They get no traffic until they do."""
