"""The section `agents`: environments that are served to applications over OpenAI's protocol."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.config_section import Section
from rollout.agents.spec import NAME, AgentSpec, NamedAgent

AgentName = Annotated[str, Field(pattern=NAME)]
"""A segment of an address."""


class AgentConfig(Section, AgentSpec):
    """One agent: what you train is what you serve. Its fields are those of rollout.agents.spec.AgentSpec."""

    def named(self, name: str) -> NamedAgent:
        """The agent as gateways take it. Raises ValueError for a name that is no segment of an address."""
        return NamedAgent.model_validate({**self.model_dump(), "name": name})
