"""Ray Serve's request router for engines: a call goes to exactly the replica that it names.

The name travels as the call's `session_id`. Calls without a name go to the replica with the shortest queue, as
Serve itself would send them.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class LaneRouter(RequestRouter):
    """Routes to the replica that `session_id` names."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's notification of the running replicas."""
        # Serve pickles this class by value, so a module-level import would give it a board of its own.
        from actors.replica_board import BOARD

        super().update_replicas(replicas)
        BOARD.publish(self._deployment_id.name, frozenset(r.replica_id.unique_id for r in replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank: the named replica alone, or all of them for a call without a name.

        A name that is not running yields nothing, and Serve asks again with backoff; the lane gives the call up
        as soon as the board no longer lists the replica.
        """
        named = pending_request.metadata.session_id if pending_request is not None else ""
        if not named:
            return [candidate_replicas]
        return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == named]]
