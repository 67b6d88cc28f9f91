"""What a remote rollout server is told of a session: the task, the bounds, and the way back to this trainer.

Invariant: the server is told the run's own sampling and limits, as far as the protocol has words for them; what the
protocol bounds more tightly than we do is cut to its bounds here, and holds here all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rollout.errors import RemoteError
from rollout.limits import Limits
from rollout.remote.wire import MAX_TOKENS, InitRequest, RolloutRequest, SamplingParams
from rollout.sampling import Sampling
from rollout.tasks import Task

# The protocol's own bounds of generation A.
MAX_TURNS_A, MAX_TOKENS_A = 100, 32_768


@dataclass(frozen=True, slots=True)
class Order:
    """One session, as a server must know it."""

    rollout_id: str
    server_url: str
    """Where it asks for turns."""
    key: str = field(repr=False)
    """With which it asks."""
    task: Task
    sampling: Sampling
    limits: Limits
    tokenizer: str
    """Model directory or hub name; generation A counts tokens with it."""
    revision: str | None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server may need to play and to score: the task's own metadata, and beside it its data."""
        return {"task_id": self.task.task_id, "data": self.task.data, **self.task.metadata}


def request_a(order: Order) -> RolloutRequest:
    """For generations A and A1. Raises RemoteError for a task that the protocol has no words for."""
    sampling, limits = order.sampling, order.limits
    try:
        return RolloutRequest(
            rollout_id=order.rollout_id,
            server_url=order.server_url,
            messages=order.task.messages,
            sampling_params=SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=min(sampling.max_tokens, MAX_TOKENS_A),
                stop=sampling.stop or None,
                logprobs=True,
            ),
            max_turns=min(limits.max_turns, MAX_TURNS_A),
            max_tokens_total=min(limits.max_response_tokens, MAX_TOKENS),
            metadata=order.metadata,
            callback_api_key=order.key,
            tokenizer_name=order.tokenizer,
            tokenizer_revision=order.revision,
        )
    except ValidationError as failure:
        raise _not_sayable(failure) from None


def request_b(order: Order) -> InitRequest:
    """For generation B. Raises RemoteError for a task that the protocol has no words for."""
    sampling, limits = order.sampling, order.limits
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "logprobs": True,
    }
    if sampling.stop:
        params["stop"] = sampling.stop
    try:
        return InitRequest(
            rollout_id=order.rollout_id,
            server_url=order.server_url,
            messages=order.task.messages,
            completion_params=params,
            max_turns=limits.max_turns,
            max_tokens_total=limits.max_response_tokens,
            metadata=order.metadata,
            api_key=order.key,
        )
    except ValidationError as failure:
        raise _not_sayable(failure) from None


def _not_sayable(failure: ValidationError) -> RemoteError:
    first = failure.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return RemoteError(f"the task cannot be said in the remote rollout protocol: {place}: {what}")
