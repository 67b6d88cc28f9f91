"""The agents of a gateway, from what the configuration says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.agents.agent import Agent, AgentLimits
from rollout.agents.registry import AgentRegistry
from rollout.agents.scopes import Scope
from rollout.environment import load_environment
from rollout.mcp_config import McpServerConfig
from rollout.mcp_tools import McpServers


@dataclass(frozen=True)
class AgentSpec:
    """One agent, as it travels to the gateways."""

    name: str
    environment: str
    """`module:Class` on the import path."""
    args: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    limits: AgentLimits = field(default_factory=AgentLimits)
    scopes: Mapping[str, Scope] = field(default_factory=dict)
    show_tool_calls: bool = False


def make_registry(specs: Sequence[AgentSpec], mcp_servers: Mapping[str, McpServerConfig]) -> AgentRegistry:
    """The agents by name. Raises ConfigError for an environment that cannot be loaded."""
    agents = [
        Agent(
            name=spec.name,
            environment=load_environment(spec.environment, spec.args),
            description=spec.description,
            limits=spec.limits,
            scopes=spec.scopes,
            show_tool_calls=spec.show_tool_calls,
        )
        for spec in specs
    ]
    return AgentRegistry(agents, mcp=McpServers(dict(mcp_servers)) if mcp_servers else None)
