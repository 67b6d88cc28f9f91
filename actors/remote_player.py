"""Rollouts for foreign trainers in a session worker: the worker's environments, MCP servers and chat format, and a
client for each rollout's trainer.

Invariant: `play` returns one answer whatever happens (see rollout.remote.server_rollout); it does not reach the
cluster's engines.
"""

from __future__ import annotations

from typing import Any

from actors.remote_settings import RemoteSettings
from rollout.environment import EnvironmentFactory, load_environment
from rollout.errors import RefusedError
from rollout.mcp_tools import McpServers
from rollout.remote.hosts import AllowedHosts
from rollout.remote.order import RolloutOrder
from rollout.remote.server_rollout import play, tool_specs
from rollout.remote.tokenizers import Tokenizers
from rollout.remote.trainer_client import TrainerClient
from rollout.remote.wire import RolloutResponse
from rollout.rendering import ChatRenderer


class RemotePlayer:
    """One worker's. Belongs to its event loop."""

    def __init__(self, settings: RemoteSettings | None, chat: ChatRenderer, mcp: McpServers) -> None:
        """`settings` None: this cluster is no rollout server, and nobody asks."""
        self._settings = settings
        self._mcp = mcp
        self._environment: EnvironmentFactory | None = None
        if settings is not None:
            self._hosts = AllowedHosts(settings.allowed_hosts)
            self._tokenizers = Tokenizers(chat, settings.model_names, settings.tokenizers)

    async def play(self, order: RolloutOrder, queue_s: float) -> RolloutResponse:
        """One rollout, to its end. `queue_s`: seconds that it has waited for its start."""
        settings = self._known()
        return await play(
            order,
            # Inside: an environment that cannot be loaded is an answer too.
            environment=lambda: self._load()(),
            limits=settings.limits,
            tokenizers=self._tokenizers,
            client=lambda: TrainerClient(order.server_url, order.generation, self._hosts, api_key=order.api_key),
            mcp=self._mcp,
            queue_s=queue_s,
        )

    async def tools(self) -> list[dict[str, Any]]:
        """The tools that rollouts are played with, in OpenAI's form. Raises RolloutError."""
        self._known()
        return await tool_specs(self._load(), self._mcp)

    def _known(self) -> RemoteSettings:
        if self._settings is None:
            raise RefusedError("this cluster plays no remote rollouts; set remote_rollout.enabled: true")
        return self._settings

    def _load(self) -> EnvironmentFactory:
        if self._environment is None:
            settings = self._known()
            self._environment = load_environment(settings.environment, settings.environment_args)
        return self._environment
