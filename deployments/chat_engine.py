"""The model behind the agents, over HTTP: any OpenAI server, the cluster's own first of all.

Invariant: see openai_http; closing the stream ends the completion in the engine. The engine's log lines have the
correlation id of the request that the agent serves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from deployments.openai_http import OpenAIHttp
from rollout.agents.chat_engine import Chunk
from rollout.correlation import correlation_id


class HttpChatEngine(OpenAIHttp):
    """Streams from `{base_url}/v1/chat/completions`. `model` is for requests that name none."""

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[Chunk]:
        """See ChatEngine. Statuses of its own: 502 broken, 503 not reached, 504 silent for too long."""
        wanted = {"model": self.model, **body, "stream": True, "stream_options": {"include_usage": True}}
        chosen = correlation_id.get()
        # No x-request-id: vLLM would call all turns of an agent by one name.
        headers = None if chosen is None else {"X-Correlation-ID": chosen}
        async with self._streaming("/v1/chat/completions", wanted, headers) as chunks:
            async for chunk in chunks:
                yield chunk
