"""An agent as plain data: what a configuration file and a request that adds an agent say of one.

Invariant: it names code by import path and brings none. What is behind the paths is looked up where the agent is
served (`make_agent`), and whatever is wrong with it is told with the field.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout.agents.agent import Agent, AgentLimits
from rollout.agents.hook_loading import IMPORT_PATH, MAX_PATH_CHARS, HookRef, load_hooks
from rollout.agents.scopes import Scope
from rollout.environment import load_environment
from rollout.errors import EnvironmentError_, RefusedError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"
"""Of an agent: one segment of a URL."""
MAX_DESCRIPTION_CHARS = 2_000
MAX_NAMES = 1_000
MAX_HOOKS = 100
# Characters of an agent as JSON: gateways and the controller hold all of them, the journal too.
MAX_SPEC_CHARS = 65_536
# A key's name, or a token's subject as the gate names it. `jwt:` alone is everybody whose token has no subject.
_OWNER = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63}|jwt:.{1,128})$"

ToolName = Annotated[str, Field(min_length=1, max_length=256)]
Owner = Annotated[str, Field(pattern=_OWNER)]


class AgentSpec(BaseModel):
    """One agent: what you train is what you serve."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    environment: str = Field(max_length=MAX_PATH_CHARS)
    """`module:Class`, as in `environment.path`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    description: str = Field(default="", max_length=MAX_DESCRIPTION_CHARS)
    """For whoever lists the agents. The system prompt is never shown."""
    limits: AgentLimits = Field(default_factory=AgentLimits)
    scopes: dict[ToolName, Scope] = Field(default_factory=dict, max_length=MAX_NAMES)
    """Who may use a tool, by the tool's name: `all`, `owner` (who is listed under `owners`) or `admin`; each may what
    those before it may. Tools not named are for all."""
    owners: list[Owner] = Field(default_factory=list, max_length=MAX_NAMES)
    """Callers that have the scope `owner` with this agent: a key's name, or `jwt:SUBJECT` for a token's subject."""
    hooks: list[HookRef] = Field(default_factory=list, max_length=MAX_HOOKS)
    """Functions and classes around request, turn and tool call: `module:name` or {path, priority}."""
    show_tool_calls: bool = False
    """Show the agent's own tool calls in streams, as extra chunks."""

    @field_validator("environment")
    @classmethod
    def _module_and_class(cls, value: str) -> str:
        if not re.fullmatch(IMPORT_PATH, value):
            raise ValueError("must be module:Class, such as examples.calculator.environment:Calculator")
        return value

    @model_validator(mode="after")
    def _owners_exist(self) -> AgentSpec:
        owned = sorted(tool for tool, scope in self.scopes.items() if scope == "owner")
        if owned and not self.owners:
            raise ValueError(f"scopes.{owned[0]} is for owners, and there are none; list them under `owners`")
        return self


class NamedAgent(AgentSpec):
    """An agent with its name, as a request that adds one gives it."""

    name: str = Field(pattern=NAME)
    """The segment of its address: /agents/NAME/v1."""

    @model_validator(mode="after")
    def _bounded(self) -> NamedAgent:
        try:
            json.dumps(self.args, allow_nan=False, default=str)
        except ValueError as failure:
            raise ValueError(f"args: {failure}") from None
        if len(self.model_dump_json()) > MAX_SPEC_CHARS:
            raise ValueError(f"the agent has more than {MAX_SPEC_CHARS} characters as JSON; give it smaller `args`")
        return self


def make_agent(spec: NamedAgent, where: str = "") -> Agent:
    """The agent, with its code loaded. `where`: put before the names of fields.

    Raises RefusedError that names the field: an environment or a hook that cannot be loaded here. May take as long
    as the imports.
    """
    try:
        environment = load_environment(spec.environment, dict(spec.args))
    except EnvironmentError_ as failure:
        field = f"{where}environment"
        raise RefusedError(f"{field}: {failure}", field) from failure
    return Agent(
        name=spec.name,
        environment=environment,
        description=spec.description,
        limits=spec.limits,
        scopes=dict(spec.scopes),
        owners=frozenset(spec.owners),
        hooks=tuple(load_hooks(spec.hooks, f"{where}hooks")),
        show_tool_calls=spec.show_tool_calls,
    )


def broken_agent(spec: NamedAgent, why: str) -> Agent:
    """Stands for an agent that cannot be loaded here: it is listed, and every request to it is told why."""

    def fail() -> Any:
        raise EnvironmentError_(f"agent {spec.name!r} cannot be loaded on this gateway: {why}")

    return Agent(spec.name, fail, spec.description, spec.limits)
