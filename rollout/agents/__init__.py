"""Agents: environments with tools behind OpenAI's protocol. Import from here."""

from __future__ import annotations

from rollout.agents.agent import Agent, AgentLimits
from rollout.agents.chat_engine import ChatEngine, ChatEngineError
from rollout.agents.held_turns import HeldTurns, TurnLost, TurnStore
from rollout.agents.hook_loading import AgentHooks, hook
from rollout.agents.hooks import Ending, Hook, HookError, RequestContext
from rollout.agents.loop import AgentRun, AgentTimeout
from rollout.agents.registry import AgentRegistry
from rollout.agents.scopes import ForbiddenError
from rollout.agents.spec import AgentSpec, NamedAgent
from rollout.agents.stream import Folded

__all__ = [
    "Agent",
    "AgentHooks",
    "AgentLimits",
    "AgentRegistry",
    "AgentRun",
    "AgentSpec",
    "AgentTimeout",
    "ChatEngine",
    "ChatEngineError",
    "Ending",
    "Folded",
    "ForbiddenError",
    "HeldTurns",
    "Hook",
    "HookError",
    "NamedAgent",
    "RequestContext",
    "TurnLost",
    "TurnStore",
    "hook",
]
