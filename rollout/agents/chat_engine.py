"""What an agent needs of a model: one streamed chat completion.

Invariant: the agent loop knows no HTTP. An engine is handed in; whatever goes wrong with it is a ChatEngineError
with a status, never a chunk that looks like an answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from rollout.errors import EngineError

Chunk = dict[str, Any]
"""A parsed `chat.completion.chunk` of OpenAI's API."""

# Statuses of an engine that are about the caller's request; any other failure of it is the server's own.
_CALLERS = (400, 413, 422, 429)
_PASSED_ON = (503, 504)


class ChatEngineError(EngineError):
    """The model could not answer. `status` is what the engine said, or the HTTP status that fits best.

    `retry_after`: seconds after which the engine wants to be asked again; None: it did not say.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(status, message, retry_after)
        self.status = status
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    @property
    def told_status(self) -> int:
        """The HTTP status for the agent's caller: an engine's 401 or 404 is no fault of theirs."""
        return self.status if self.status in _CALLERS + _PASSED_ON else 502


class ChatEngine(Protocol):
    """Streams one chat completion."""

    def stream(self, body: dict[str, Any]) -> AsyncIterator[Chunk]:
        """The chunks of one completion, usage included. `body` is OpenAI's request without `stream`.

        Closing or cancelling the iterator ends the completion in the engine. Raises ChatEngineError.
        """
        ...
