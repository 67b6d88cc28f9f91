"""Spares a model that lies in a local directory the download step of Ray Serve LLM.

That step is a Ray task on every node, in a process that first imports vLLM: 8 s of a start, for nothing to download.
"""

from __future__ import annotations

from ray.llm._internal.common.callbacks.base import CallbackBase


class LocalModel(CallbackBase):
    """Ray Serve LLM's hook around node initialization."""

    async def on_before_node_init(self) -> None:
        """There is nothing to fetch."""
        self.ctx.run_init_node = False
