"""A rollout that a foreign trainer ordered, whichever generation it speaks: what is kept, compared and played.

Invariant: an order is complete (nothing of it depends on the request's generation any more but how it is answered),
and two orders have one digest if and only if they ask for the same. With which key the trainer is called is no part
of that: a trainer may make a new one for each attempt.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from rollout.remote.wire import Generation, InitRequest, RolloutRequest, RolloutResponse
from rollout.tasks import Message


class RolloutOrder(BaseModel):
    """One rollout to play for a trainer. Goes through Ray, and as JSON into the journal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: Generation
    rollout_id: str
    key: str
    """By which a repeated request is known: rollout_id, or B's idempotency_key."""
    server_url: str
    messages: list[Message]
    params: dict[str, Any] = Field(default_factory=dict)
    """How the trainer wants its model sampled. It comes back in every call; in B it may hold anything."""
    max_turns: int
    max_tokens_total: int
    metadata: dict[str, Any] = Field(default_factory=dict)
    api_key: str | None = Field(default=None, repr=False)
    """Bearer of the calls to the trainer."""
    tokenizer_name: str | None = None
    """None: the cluster's own."""
    tokenizer_revision: str | None = None
    tool_server_url: str | None = None
    """Passed on to the environment, which may know what to do with it; never called by us."""

    @classmethod
    def of(cls, request: RolloutRequest | InitRequest) -> RolloutOrder:
        """The order that a request makes."""
        common: dict[str, Any] = {
            "rollout_id": request.rollout_id,
            "server_url": request.server_url,
            "messages": request.messages,
            "max_turns": request.max_turns,
            "max_tokens_total": request.max_tokens_total,
            "metadata": request.metadata,
            "tool_server_url": request.tool_server_url,
        }
        if isinstance(request, InitRequest):
            return cls(
                generation="B",
                key=request.key,
                params=request.completion_params,
                api_key=request.api_key,
                **common,
            )
        return cls(
            generation="A",
            key=request.rollout_id,
            params=request.sampling_params.model_dump(),
            api_key=request.callback_api_key,
            tokenizer_name=request.tokenizer_name,
            tokenizer_revision=request.tokenizer_revision,
            **common,
        )

    def digest(self) -> str:
        """Hexadecimal. Of everything but the names by which an order is found and the trainer's key; the order of
        names in JSON does not count."""
        fields = self.model_copy(update={"api_key": None}).model_dump(mode="json", exclude={"rollout_id", "key"})
        data = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(data.encode()).hexdigest()

    @property
    def host(self) -> str:
        """The trainer's host name or address, without its port."""
        try:
            return (urlsplit(self.server_url).hostname or "").rstrip(".")
        except ValueError:
            return ""

    def without_history(self) -> RolloutOrder:
        """What is still needed when it has been played: in B, to whom to report, and with which key."""
        key = self.api_key if self.generation == "B" else None
        return self.model_copy(update={"messages": [], "metadata": {}, "params": {}, "api_key": key})


@dataclass(slots=True)
class RolloutTicket:
    """An order was taken, now or before."""

    rollout_id: str
    """Of the order that is played: a repetition under an idempotency key gets the first one's."""
    repeated: bool = False


@dataclass(slots=True)
class RolloutCounts:
    """How many rollouts there are for foreign trainers."""

    queued: int
    running: int
    unreported: int
    """Played, and their trainer does not know yet."""
    completed: int
    """That ended since the cluster was started or its controller came back."""
    failed: int
    """Of these, those that ended as ERROR."""


class RemoteRollouts(Protocol):
    """What the gateway asks of a cluster that is a rollout server. All raise ApiError."""

    async def remote_accept(self, order: RolloutOrder) -> RolloutTicket:
        """Take an order; the same again joins the first.

        Raises NotFoundError where the cluster is no rollout server, RefusedError (422) for a server_url that is not
        allowed, ConflictError for another order under the same id, BusyError where the queue is full.
        """

    async def remote_result(self, rollout_id: str, timeout: float) -> RolloutResponse | None:
        """How a rollout ended; None if it has not within `timeout` seconds. Raises NotFoundError."""

    async def remote_tools(self) -> list[dict[str, Any]]:
        """The tools that rollouts are played with, in OpenAI's form."""

    async def remote_counts(self) -> RolloutCounts:
        """How many there are."""
