"""The bounds of a session. Everything that waits has a deadline; every list has a length.

Each bound ends a session with a `stop_reason` of its own (or, for tools, an error message to the model),
so that no limit is ever mistaken for another.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Limits of one session. Times are seconds, sizes tokens or characters as named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_turns: int = Field(default=8, ge=1, le=1000)
    """Most generations of one session; reached with tool calls outstanding, it ends as `max_turns`."""

    max_response_tokens: int = Field(default=8192, ge=1)
    """Most tokens after the first prompt (sampled and observed, all segments); ends as `max_tokens`."""

    engine_seconds: float = Field(default=300.0, gt=0)
    """Deadline of one generation, its queueing included; ends as `deadline`."""

    tool_seconds: float = Field(default=30.0, gt=0)
    """Deadline of one tool call; the model is told, the session goes on."""

    environment_seconds: float = Field(default=60.0, gt=0)
    """Deadline of each call into the environment (set-up, reply, reward); ends as `error`."""

    session_seconds: float = Field(default=1800.0, gt=0)
    """Deadline of the whole session from its start in the worker; ends as `deadline`."""

    max_tool_calls_per_turn: int = Field(default=16, ge=1)
    """Calls beyond this in one turn are answered with an error."""

    max_tool_output_chars: int = Field(default=16_384, ge=16)
    """A longer tool result is an error to the model: a silently cut one would be read as the whole."""

    max_tool_errors: int | None = Field(default=None, ge=1)
    """With this many failed calls the session ends as `tool_error`; None: the model may try for ever."""
