"""Hooks that tests name by their import paths."""

from __future__ import annotations

from typing import Any

from rollout.agents import AgentHooks, RequestContext, hook

HEARD: list[str] = []


@hook("request")
async def first(context: RequestContext, body: dict[str, Any]) -> None:
    HEARD.append("first")


@hook("request")
def polite(context: RequestContext, body: dict[str, Any]) -> dict[str, Any]:
    """Add a word to what was asked."""
    HEARD.append("polite")
    *before, last = body["messages"]
    return {**body, "messages": [*before, {**last, "content": f"Please: {last['content']}"}]}


class Audit(AgentHooks):
    """Three events of one request."""

    def before_tool_call(self, context: RequestContext, call: Any) -> None:
        HEARD.append(f"before {call.name}")

    async def after_tool_call(self, context: RequestContext, result: Any) -> None:
        HEARD.append(f"after {result.content}")

    def finalize(self, context: RequestContext, ending: Any) -> None:
        HEARD.append(f"finalize {ending.finish_reason}")


class Empty(AgentHooks):
    """No method with the name of an event."""

    def helper(self) -> None:
        """Not one."""


class NeedsArguments(AgentHooks):
    def __init__(self, path: str) -> None:
        self.path = path

    def request(self, context: RequestContext, body: Any) -> None:
        """Never called."""


class Lookalike:
    """Has an event's name, and is no hook."""

    def request(self, context: Any, body: Any) -> None:
        """Never called."""


def unmarked(context: RequestContext, value: Any) -> None:
    """A function that is no hook."""


@hook("message")
def takes_one(context: RequestContext) -> None:
    """The wrong number of arguments."""


NUMBER = 5
