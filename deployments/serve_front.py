"""The front where Ray Serve brings the cluster up.

Invariant: it asks the controller of its own cluster. Serve's replicas, and what they start, belong to Serve's Ray
namespace, in which a bare name would be looked up.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from actors.front import ASK_TIMEOUT_S, Front
from actors.front_config import SLOTS, FrontSettings


class ServeFront(Front):
    """A front whose controller is named with its namespace."""

    def __init__(self, settings: FrontSettings, controller: str, namespace: str) -> None:
        """`namespace`: the cluster's name."""
        super().__init__(settings, controller)
        self._namespace = namespace

    async def _ask(self) -> list[str]:
        handle: Any = ray.get_actor(self._controller, self._namespace)
        async with asyncio.timeout(ASK_TIMEOUT_S):
            found: list[str] = await handle.serving.remote()
        # A fleet may have more engines than HAProxy has places. Rollouts use them all; HTTP these.
        return sorted(found)[:SLOTS]
