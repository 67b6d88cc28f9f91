"""What the session loop asks of whoever speaks the assistant's turns.

Invariant: the loop never sees a token. A model keeps the ledger of what it sampled, or of what it was told was
sampled; the loop keeps the messages. `rollout.token_model` speaks to an engine in tokens; `rollout.remote` asks a
trainer somewhere else in messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.ledger import Segment
from rollout.limits import Limits
from rollout.rendering import ParsedTurn
from rollout.tasks import Message
from rollout.trajectory import StopReason


@dataclass(slots=True)
class ModelTurn:
    """One assistant turn."""

    parsed: ParsedTurn
    message: Message
    """The turn as it goes into the history."""
    num_tokens: int
    """Tokens sampled in it; 0 where nobody said how many."""
    ending: StopReason | None = None
    """Why the turn was cut. A cut turn is not acted on: half a tool call is none. None: it is whole."""


class SessionModel(Protocol):
    """One session's assistant. Used by one task at a time: open, turn, advance, turn, …"""

    @property
    def segments(self) -> list[Segment]:
        """What is known of the session's tokens; empty where the model has none."""

    @property
    def engine_seconds(self) -> float:
        """Seconds spent waiting for generations so far, failed ones included."""

    async def open(self, messages: Sequence[Message], specs: list[dict[str, Any]], limits: Limits) -> None:
        """Take the opening messages and the tools in OpenAI's form. Raises RolloutError."""

    async def turn(self, index: int, messages: Sequence[Message], *, deadline: float) -> ModelTurn:
        """The next assistant turn, number `index` from 0. `deadline` is a time on the event loop's clock.

        Raises EngineTimeout, EngineDied, EngineRefused or another RolloutError.
        """

    async def advance(
        self, messages: Sequence[Message], new_messages: Sequence[Message], *, seconds: float
    ) -> StopReason | None:
        """Take in what the world said to the last turn (`messages` ends with `new_messages`), which took `seconds`.

        Returns the ending that forbids another turn, or None.
        """
