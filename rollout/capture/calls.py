"""A captured call: one generation that a client of its own asked for, as the engine saw it.

Invariant, checked when it is made: the ledger would take it. Ids and log-probabilities have one length, versions
cover them, and a call that was cut off holds what had been sampled until then, marked by its finish reason.
"""

from __future__ import annotations

import copy
import math
from array import array
from dataclasses import dataclass, field
from typing import Any

from rollout.engine import FINISH_REASONS, FinishReason, Generation, VersionSpan
from rollout.errors import LedgerError
from rollout.ledger import IDS, LOGPROBS, Ledger
from rollout.tasks import Message

UNKNOWN_ROLE = "unknown"
"""Role of tokens whose message is not known."""


@dataclass(slots=True)
class CapturedCall:
    """One generation: the exact prompt, what was sampled, and when. Raises LedgerError for what does not fit.

    Times are seconds on a clock that all replicas share (`time.time()`). A skew between them costs a fork, never
    a wrong token.
    """

    call_id: str
    """Unique in its session. A request for several choices is several calls."""
    prompt_ids: array[int]
    """int32[P], P ≥ 1: all that the engine was given."""
    token_ids: array[int]
    """int32[T], T ≥ 0: what it sampled, the end-of-turn token included when it was sampled."""
    logprobs: array[float]
    """float32[T], of the distribution that was sampled from (nats)."""
    versions: list[VersionSpan]
    """Weights of the sampled tokens; covers [0, T) without gaps."""
    finish_reason: FinishReason
    """`abort` marks a call that was cut off, for example because its client went away."""
    started: float
    finished: float
    api: str
    """The interface that it came by, for example `chat` or `messages`."""
    correlation_id: str = ""
    """What ties it to the request of a client or gateway, such as an `x-request-id`; carried, never interpreted."""
    messages: list[Message] | None = None
    """The conversation that was asked about, where the interface has one."""
    answer: Message | None = None
    """The assistant message that was given back, where it is known."""
    roles: tuple[str, ...] = field(default=())
    """Of `messages`; taken from there where they are given. () where they are not known."""

    def __post_init__(self) -> None:
        if not self.call_id:
            raise LedgerError("a captured call needs a call_id")
        try:
            self._check()
        except LedgerError as error:
            raise LedgerError(f"captured call {self.call_id!r}: {error}") from None
        if self.messages is not None:
            self.roles = tuple(str(message.get("role") or UNKNOWN_ROLE) for message in self.messages)

    @property
    def cut(self) -> bool:
        """Whether it was cut off: what is here had been sampled until then, and the client may know less of it."""
        return self.finish_reason == "abort"

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds, prompt and sampled."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def seconds(self) -> float:
        """From its start to its end, in the engine."""
        return self.finished - self.started

    @property
    def order(self) -> tuple[float, float, int, str]:
        """Calls of a session in the order of time, whatever order they were reported in.

        Where times are equal, a prompt comes before those that extend it.
        """
        return self.started, self.finished, len(self.prompt_ids), self.call_id

    def generation(self) -> Generation:
        """What was sampled, as the ledger takes it."""
        return Generation(self.token_ids, self.logprobs, self.versions, self.finish_reason)

    def without_messages(self) -> CapturedCall:
        """The same call without its texts: every call of a conversation carries all of it again."""
        bare = copy.copy(self)
        bare.messages = bare.answer = None
        return bare

    def _check(self) -> None:
        for name, values, code in (
            ("prompt_ids", self.prompt_ids, IDS),
            ("token_ids", self.token_ids, IDS),
            ("logprobs", self.logprobs, LOGPROBS),
        ):
            if not isinstance(values, array) or values.typecode != code:
                raise LedgerError(f"{name} is {_kind(values)}; give array({code!r})")
        if self.finish_reason not in FINISH_REASONS:
            raise LedgerError(f"finish_reason is {self.finish_reason!r}; use one of {', '.join(FINISH_REASONS)}")
        # NaN fails this, too.
        if not -math.inf < self.started <= self.finished < math.inf:
            raise LedgerError(f"it cannot have started at {self.started} and finished at {self.finished}")
        if self.messages is not None and not (
            isinstance(self.messages, list) and all(isinstance(message, dict) for message in self.messages)
        ):
            raise LedgerError("messages must be a list of objects, or None where they are not known")
        # The ledger's own checks: what passes here cannot fail when the session is put together.
        ledger = Ledger()
        ledger.open(self.prompt_ids[:1])
        ledger.sample(self.generation(), 0.0)


def _kind(values: Any) -> str:
    return f"array({values.typecode!r})" if isinstance(values, array) else type(values).__name__
