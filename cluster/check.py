"""`rollout check`: everything about a config that can be proven before a cluster is started."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.config_agents import AgentConfig
from rollout.agents.spec import make_agent
from rollout.environment import Environment, load_environment
from rollout.errors import RolloutError
from rollout.rendering import ChatRenderer, load_renderer
from rollout.tool_calls import ToolSet


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str


def check_config(config: ClusterConfig) -> list[Finding]:
    """Load the environment, the agents with their hooks and, of a local model, its tokenizer and renderer."""
    findings = [Finding("config", True, f"cluster {config.name!r}; every vLLM argument is known and well-typed")]
    with import_path(config.pythonpath):
        findings.append(_try("environment", lambda: _environment(config)))
        findings += [
            _try(f"agents.{name}", functools.partial(_agent, name, agent, config))
            for name, agent in (config.agents or {}).items()
        ]
    if config.tracing.endpoint is not None:
        findings.append(_try("tracing", lambda: _tracing(config)))
    if os.path.isdir(config.model.path):
        findings.append(_try("renderer", lambda: _renderer(config)))
    else:
        where = "would have to be downloaded; `rollout pull` brings it here beforehand"
        findings.append(Finding("renderer", True, f"not tried: {config.model.path} {where}"))
    return findings


@contextmanager
def import_path(directories: list[str]) -> Iterator[None]:
    """Import from `directories` first, inside the block."""
    before = list(sys.path)
    sys.path[:0] = directories
    try:
        yield
    finally:
        sys.path[:] = before


def _try(what: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, work())
    except RolloutError as error:
        return Finding(what, False, str(error))
    except Exception as error:
        return Finding(what, False, f"{type(error).__name__}: {error}")


def _environment(config: ClusterConfig) -> str:
    if config.environment is None:
        return "none; `rollout run` needs one"
    remote = config.environment.remote
    if config.environment.path is None:
        return f"{remote} (generation {config.environment.generation}); not called"
    environment = load_environment(config.environment.path, dict(config.environment.args))()
    if remote is not None:
        generation = config.environment.generation
        return f"{remote} (generation {generation}), scored by {config.environment.path}; not called"
    tools = ToolSet(environment.all_tools())
    names = ", ".join(spec["function"]["name"] for spec in tools.specs) or "no tools"
    _check_mcp_servers(config.environment.path, environment, config)
    return f"{config.environment.path}: {names}"


def _check_mcp_servers(path: str, environment: Environment, config: ClusterConfig) -> None:
    unknown = [name for name in environment.mcp_servers if name not in config.mcp_servers]
    if unknown:
        raise RolloutError(f"{path} wants MCP servers that the config does not name: {unknown}")


def _tracing(config: ClusterConfig) -> str:
    config.tracing.resolve(config.name)
    return f"to {config.tracing.endpoint}, of {config.tracing.sample_ratio:.0%} of the sessions"


def _agent(name: str, wanted: AgentConfig, config: ClusterConfig) -> str:
    agent = make_agent(wanted.named(name))
    environment = agent.environment()
    _check_mcp_servers(wanted.environment, environment, config)
    tools = [spec["function"]["name"] for spec in ToolSet(environment.all_tools()).specs]
    missing = sorted(set(agent.scopes) - set(tools))
    if missing and not environment.mcp_servers:
        raise RolloutError(f"scopes.{missing[0]} names no tool; it has: {', '.join(tools) or 'none'}")
    hooks = f"; hooks on {', '.join(dict.fromkeys(hook.event for hook in agent.hooks))}" if agent.hooks else ""
    return f"{wanted.environment}: {', '.join(tools) or 'no tools'}{hooks}"


def _renderer(config: ClusterConfig) -> str:
    chat: ChatRenderer = load_renderer(
        config.model.path, config.model.renderer, config.model.renderer_options, config.model.revision
    )
    if chat.name == "default":
        return "default: the chat template itself; a turn whose past the template rewrites becomes a fork"
    return f"{chat.name}: extends sampled tokens, agrees with the chat template"
