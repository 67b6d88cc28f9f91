"""The model for plain inference, over HTTP: vLLM's `/v1/completions`, at the cluster's own address first of all.

Invariant: see openai_http. What is streamed is what vLLM sends, token ids included where they were asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from deployments.openai_http import OpenAIHttp
from rollout.agents.chat_engine import Chunk


class HttpCompletions(OpenAIHttp):
    """Streams from `{base_url}/v1/completions`: a rollout.inference.CompletionEngine."""

    def open(
        self, body: Mapping[str, Any], correlation_id: str | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Chunk]]:
        """See CompletionEngine. Statuses of its own: 502 broken, 503 not reached, 504 silent for too long.

        vLLM names its request after `X-Request-Id`; `X-Correlation-ID` is what this cluster's engines log.
        """
        headers = None
        if correlation_id is not None:
            headers = {"X-Correlation-ID": correlation_id, "X-Request-Id": correlation_id}
        return self._streaming("/v1/completions", {"model": self.model, **body, "stream": True}, headers)
