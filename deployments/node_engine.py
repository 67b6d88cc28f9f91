"""The engine of a cluster of several nodes: its own HTTP server is reached from the node of the front.

Invariant: it listens at its node's address in the cluster and at no other, so that a second network of the machine
does not see it. Who may come is for the access keys, and for the network's policy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deployments.engine import RolloutEngine
from deployments.openai_server import ServingSpec


class NodeEngine(RolloutEngine):
    """RolloutEngine that serves at the address of its own node, which is known only where the replica runs."""

    async def __init__(  # type: ignore[misc]
        self, llm_config: Any, *, serving: ServingSpec | None = None, **options: Any
    ) -> None:
        """See RolloutEngine; the host of `serving` is ignored."""
        if serving is not None:
            serving = replace(serving, host=node_address())
        await super().__init__(llm_config, serving=serving, **options)


def node_address() -> str:
    """The address under which Ray knows this node."""
    import ray

    return ray.util.get_node_ip_address()
