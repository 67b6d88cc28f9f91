"""An agent's own tools and the request's, merged once for each request.

Invariant: a name means one thing. The agent's own tools (internal) are run here, the request's (external) by the
client; a request that brings a name of the agent's is refused, and a name that is neither is unknown, to the model
as much as to us. What a caller may not use is not offered, and is not run either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rollout.agents.scopes import Scope, allowed
from rollout.errors import ApiError
from rollout.tool_calls import ToolSet
from rollout.tools import Tool

Kind = Literal["internal", "external", "unknown"]

# OpenAI's own bound on the tools of one request.
MAX_REQUEST_TOOLS = 128


def visible(tools: Iterable[Tool], scopes: Mapping[str, Scope], caller: int) -> list[Tool]:
    """The tools that a caller of this rank may use."""
    return [tool for tool in tools if allowed(scopes.get(tool.name, "all"), caller)]


@dataclass(frozen=True, slots=True)
class MergedTools:
    """The tools of one request."""

    internal: ToolSet
    """The agent's own, those that the caller may use."""
    names: Mapping[str, Kind]
    specs: list[dict[str, Any]] = field(default_factory=list)
    """All of them in OpenAI's form, the agent's first."""

    def kind(self, name: str) -> Kind:
        """Whose a name is. What the caller may not use is as unknown as what nobody has."""
        return self.names.get(name, "unknown")

    @property
    def has_internal(self) -> bool:
        """Whether anything could be run here."""
        return len(self.internal) > 0

    def unknown(self, name: str) -> str:
        """What the model is told of a name that it made up."""
        return f"Error: unknown tool {name!r}; the tools are: {', '.join(self.names) or 'none'}"


def merge(
    tools: Sequence[Tool], scopes: Mapping[str, Scope], caller: int, request_tools: Sequence[dict[str, Any]]
) -> MergedTools:
    """The agent's tools that a caller of this rank may use, and those of the request.

    Raises ApiError that names the tool where the request brings a name twice, or one of the agent's (whether or
    not this caller may use that one: a name must not change its meaning with the caller).
    """
    mine = visible(tools, scopes, caller)
    reserved = {tool.name for tool in tools}
    names: dict[str, Kind] = {tool.name: "internal" for tool in mine}
    for index, spec in enumerate(request_tools):
        name = spec["function"]["name"]
        where = f"tools.{index}.function.name"
        if name in reserved:
            raise ApiError(f"{where}: {name!r} is a tool of this agent; call yours something else", where)
        if name in names:
            raise ApiError(f"{where}: {name!r} is there twice; give each tool a name of its own", where)
        names[name] = "external"
    internal = ToolSet(mine)
    return MergedTools(internal, names, [*internal.specs, *request_tools])


def first_choice(choice: Any, merged: MergedTools) -> Any:
    """A request's `tool_choice`, checked against the tools there are; None where there is nothing to choose.

    Raises ApiError for a choice that names no tool, and for one that demands a tool where there are none.
    """
    if choice is None:
        return None
    field_name = "tool_choice"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise ApiError(f"tool_choice is {choice!r}; use none, auto, required or a function", field_name)
        if merged.specs:
            return choice
        if choice == "required":
            raise ApiError("tool_choice is 'required', but there are no tools; send some", field_name)
        return None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ApiError(
            'tool_choice must be none, auto, required or {"type": "function", "function": {"name": ...}}', field_name
        )
    if merged.kind(name) == "unknown":
        known = ", ".join(merged.names) or "none"
        raise ApiError(f"tool_choice names {name!r}, which is no tool here; the tools are: {known}", field_name)
    return {"type": "function", "function": {"name": name}}


def choice_of_turn(choice: Any, turn: int) -> Any:
    """The `tool_choice` for turn number `turn` (from 1).

    A call that is demanded is demanded once: demanded in every turn, the model could never answer.
    """
    return choice if turn == 1 or choice in (None, "none", "auto") else "auto"
