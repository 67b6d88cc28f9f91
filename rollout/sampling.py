"""Sampling parameters: vLLM's own names and meanings, those that make sense for training.

What would break the record is not here: `n` (groups do that), `logprobs` (always the sampled token's),
`detokenize`, `prompt_logprobs`. Field docs follow vLLM's SamplingParams
(https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# vLLM takes seeds of 64 bits, signed.
_SEED_BITS = 63


class StructuredOutputs(BaseModel):
    """A constraint on what may be sampled: exactly one of these (vLLM's StructuredOutputsParams)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    json_schema: dict[str, Any] | str | None = None
    """JSON schema (vLLM's `json`)."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of json_schema, regex, choice, grammar (got {given or 'none'})")
        return self


class Sampling(BaseModel):
    """How the policy is sampled. Log-probabilities in the record are of this very distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """0 is greedy. Log-probabilities are after the temperature."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    """0 considers all tokens."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=2.0)
    max_tokens: int = Field(default=1024, ge=1)
    """Most tokens of one turn; a turn cut by it ends the session as `length`."""
    min_tokens: int = Field(default=0, ge=0)
    """No end-of-turn before this many tokens of a turn."""
    stop: list[str] = Field(default_factory=list, max_length=16)
    """Strings that end a turn. The tokens of the string stay in the record: they were sampled."""
    stop_token_ids: list[int] = Field(default_factory=list, max_length=64)
    """Added to the renderer's end-of-turn tokens."""
    ignore_eos: bool = False
    """Do not stop at end-of-turn tokens (for benchmarks of fixed length)."""
    seed: int | None = Field(default=None, ge=0, lt=2**_SEED_BITS)
    """Base of a seed per turn (see `turn_seed`); None samples freely."""
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = Field(default=None, min_length=1)
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Sampling:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string, which would end every turn at once")
        return self

    def to_vllm(self) -> dict[str, Any]:
        """Keyword arguments for vLLM's SamplingParams: only what differs from vLLM's own defaults."""
        kwargs = self.model_dump(exclude_defaults=True, exclude={"structured_outputs", "seed"})
        kwargs["max_tokens"] = self.max_tokens
        if self.structured_outputs is not None:
            constraint = self.structured_outputs.model_dump(exclude_none=True)
            if "json_schema" in constraint:
                constraint["json"] = constraint.pop("json_schema")
            kwargs["structured_outputs"] = constraint
        return kwargs


def turn_parameters(
    sampling: Sampling, budget: int, *, stop_token_ids: Sequence[int], sample: str, turn: int
) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for one turn of at most `budget` tokens.

    `stop_token_ids` end a turn of this model; `sample` names the sample within its run, for the turn's seed.
    """
    parameters = sampling.to_vllm()
    parameters["max_tokens"] = budget
    if parameters.get("min_tokens", 0) > budget:
        parameters["min_tokens"] = budget
    if not sampling.ignore_eos:
        parameters["stop_token_ids"] = [*stop_token_ids, *sampling.stop_token_ids]
    if sampling.seed is not None:
        parameters["seed"] = turn_seed(sampling.seed, sample, turn)
    return parameters


def turn_seed(base: int, trajectory_key: str, turn: int) -> int:
    """A seed for one turn of one sample: reproducible, and different within a group.

    With one seed for all, the n samples of a group would be the same text and carry no learning signal.
    """
    digest = hashlib.blake2b(f"{base}/{trajectory_key}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)
