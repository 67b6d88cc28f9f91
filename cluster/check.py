"""`rollout check`: everything about a config that can be proven before a cluster is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.config import ClusterConfig
from rollout.environment import load_environment
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
    """Load the environment and, where the model is a local directory, its tokenizer and renderer."""
    findings = [Finding("config", True, f"cluster {config.name!r}; every vLLM argument is known and well-typed")]
    with import_path(config.pythonpath):
        findings.append(_try("environment", lambda: _environment(config)))
    if os.path.isdir(config.model.path):
        findings.append(_try("renderer", lambda: _renderer(config)))
    else:
        findings.append(Finding("renderer", True, f"not tried: {config.model.path} would have to be downloaded"))
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
    environment = load_environment(config.environment.path, dict(config.environment.args))()
    tools = ToolSet(environment.all_tools())
    names = ", ".join(spec["function"]["name"] for spec in tools.specs) or "no tools"
    unknown = [name for name in environment.mcp_servers if name not in config.mcp_servers]
    if unknown:
        raise RolloutError(f"{config.environment.path} wants MCP servers that the config does not name: {unknown}")
    return f"{config.environment.path}: {names}"


def _renderer(config: ClusterConfig) -> str:
    chat: ChatRenderer = load_renderer(
        config.model.path, config.model.renderer, config.model.renderer_options, config.model.revision
    )
    if chat.name == "default":
        return "default: the chat template itself; a turn whose past the template rewrites becomes a fork"
    return f"{chat.name}: extends sampled tokens, agrees with the chat template"
