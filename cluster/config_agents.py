"""The section `agents`: environments that are served to applications over OpenAI's protocol."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from cluster.config_section import Section
from rollout.agents.agent import AgentLimits


class AgentConfig(Section):
    """One agent: what you train is what you serve."""

    environment: str
    """`module:Class`, as in `environment.path`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    description: str = Field(default="", max_length=2_000)
    """For whoever lists the agents. The system prompt is never shown."""
    limits: AgentLimits = Field(default_factory=AgentLimits)
    scopes: dict[str, Literal["all", "owner", "admin"]] = Field(default_factory=dict)
    """Who may use a tool, by the tool's name; those not named are for all."""
    show_tool_calls: bool = False
    """Show the agent's own tool calls in streams, as extra chunks."""

    @field_validator("environment")
    @classmethod
    def _module_and_class(cls, value: str) -> str:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
            raise ValueError("must be module:Class, such as examples.calculator.environment:Calculator")
        return value
