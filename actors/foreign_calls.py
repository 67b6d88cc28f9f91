"""The way of a remote rollout's calls from a gateway to the session worker that holds it.

Invariant: gateways hold no state but the workers' handles, which the controller knows at any time: a handle that is
dead is asked for again, once, and a worker that is gone is said to be gone.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from actors.ray_backend import CONTROLLER
from rollout.errors import NotFoundError, RolloutError, UnavailableError
from rollout.remote.wire import CompletionRequest, CompletionResponse, RolloutResponse

# A generation has a deadline of its own (limits.engine_seconds); this one is for workers that do not answer at all.
CALL_SECONDS = 3_600.0
REPORT_SECONDS = 60.0
# The controller is asked for its workers at most so often.
ASK_AGAIN_S = 0.5
HANDLES_SECONDS = 10.0


class ForeignCalls(Protocol):
    """What a gateway asks of the workers."""

    async def complete(self, worker: str, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        """See ForeignRollouts.complete."""

    async def completed(self, worker: str, rollout_id: str, report: RolloutResponse) -> None:
        """See ForeignRollouts.completed."""


class RayForeignCalls:
    """ForeignCalls over Ray."""

    def __init__(self, namespace: str) -> None:
        """`namespace`: the cluster's name."""
        self._namespace = namespace
        self._handles: dict[str, Any] = {}
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def complete(self, worker: str, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        """See ForeignCalls. Raises what the worker raises, NotFoundError without it, UnavailableError in between."""
        return await self._call(worker, "foreign_complete", CALL_SECONDS, rollout_id, request)

    async def completed(self, worker: str, rollout_id: str, report: RolloutResponse) -> None:
        """See ForeignCalls."""
        await self._call(worker, "foreign_completed", REPORT_SECONDS, rollout_id, report)

    async def _call(self, worker: str, name: str, seconds: float, *arguments: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        for fresh in (False, True):
            handle = await self._handle(worker, fresh)
            try:
                async with asyncio.timeout(seconds):
                    return await getattr(handle, name).remote(*arguments)
            except TimeoutError:
                raise UnavailableError(f"the session worker did not answer within {seconds:g} s") from None
            except RayTaskError as failure:
                raise failure.cause if isinstance(failure.cause, RolloutError) else failure from None
            except RayActorError:
                # Dead, or another one has its name since the controller was started again.
                self._handles.pop(worker, None)
        raise NotFoundError(
            "the session worker that held this rollout is gone, and the rollout with it", "rollout_id"
        )

    async def _handle(self, worker: str, fresh: bool) -> Any:
        if not fresh and (known := self._handles.get(worker)) is not None:
            return known
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        async with self._asking:
            if (known := self._handles.get(worker)) is not None:
                return known
            if self._asked_at <= arrived:
                # Those who wait for this share the answer. A worker may be younger than the last one.
                await asyncio.sleep(max(0.0, self._asked_at + ASK_AGAIN_S - loop.time()))
                self._handles, self._asked_at = await self._ask(), loop.time()
        try:
            return self._handles[worker]
        except KeyError:
            raise NotFoundError(f"there is no session worker {worker!r}, and no rollout in it", "worker") from None

    async def _ask(self) -> dict[str, Any]:
        import ray
        from ray.exceptions import RayError

        try:
            controller = await asyncio.to_thread(ray.get_actor, CONTROLLER, self._namespace)
            async with asyncio.timeout(HANDLES_SECONDS):
                return await controller.worker_handles.remote()
        except (ValueError, TimeoutError, RayError) as failure:
            text = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            raise UnavailableError(f"the controller does not answer: {text}") from None
