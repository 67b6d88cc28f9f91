"""The supervisor: starts controller, loading board and front where Ray Serve brings the cluster up, and watches them.

`rollout up` does this from outside and leaves. A cluster that `serve deploy` or KubeRay makes has nobody outside, so
one replica of a small deployment does it, on the head node.

Invariant: it owns what it starts. Ray ends those actors when the supervisor ends, and their names admit no second of
them, so two controllers never write one journal, and nothing outlives the application. Every failure at the start is
the deployment's message, and Serve tries again for ever; a controller that stays silent or unready for too long is
such a failure too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import Any

from actors.front_config import FrontSettings
from actors.loading_board import BOARD_NAME
from actors.messages import ControllerSettings
from actors.ray_backend import CONTROLLER
from rollout.errors import RolloutError, UnavailableError

logger = logging.getLogger(__name__)

APP = "controller"
DEPLOYMENT = "supervisor"
FRONT = "front"
# A resource that Ray gives to the head node alone. The journal's volume is there, and so is the cluster's address.
ON_HEAD = {"node:__internal_head__": 0.001}
# Calls that the controller holds at once; each trainer that waits for a batch is one.
CALLS = 4096
# Serve starts a new supervisor when the old one has ended; Ray may take this long to end what that one owned.
FREE_SECONDS = 60.0
FRONT_SECONDS = 30.0
# Beyond the deadlines of the controller's own, which know better what was missing.
MARGIN_SECONDS = 60.0
ASK_SECONDS = 10.0
# A controller that has not answered for so long is wedged. Ray starts a dead one again within seconds.
SILENT_SECONDS = 120.0
STOP_SECONDS = 8.0
HEALTH_PERIOD_SECONDS = 10.0
# GPU nodes may take an hour to come: Serve never stops trying.
START_ATTEMPTS = 1_000_000
# How often Serve is asked how many engines it is to run: `num_replicas` may be changed at any time.
TARGET_PERIOD_SECONDS = 5.0


@dataclass(frozen=True)
class SupervisorSpec:
    """What the supervisor starts."""

    cluster: str
    """The cluster's name, which is the Ray namespace of what is started."""
    controller: ControllerSettings = field(repr=False)
    engines: int
    """Replicas that the loading board waits for until Serve has said how many it is to run."""
    front: FrontSettings | None = None
    """None: there is no front. Its folder is made where it runs."""


class Supervisor:
    """The deployment's one replica."""

    async def __init__(self, spec: SupervisorSpec) -> None:  # type: ignore[misc]
        """Start everything and wait until it can take work. Raises RolloutError with what is missing."""
        self._spec = spec
        self._started: list[Any] = []
        self._controller: Any = None
        self._front: Any = None
        self._following: asyncio.Task[None] | None = None
        try:
            await self._start()
        except BaseException:
            self._end()
            raise
        self._heard = self._ready = asyncio.get_running_loop().time()

    async def check_health(self) -> None:
        """Raises UnavailableError where the controller has failed for good; Serve then starts all of this anew."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ASK_SECONDS):
                told = await self._controller.status.remote()
                self._heard = loop.time()
                if told["ready"]:
                    # Raises where a loop of the controller's has failed.
                    await self._controller.weights.remote()
                    self._ready = loop.time()
        except Exception as failure:
            logger.warning("the controller did not answer: %s", _said(failure))
        if (silent := loop.time() - self._heard) > SILENT_SECONDS:
            raise UnavailableError(f"the controller has not answered for {silent:.0f} s")
        if (unready := loop.time() - self._ready) > self._spec.controller.start_timeout + SILENT_SECONDS:
            raise UnavailableError(f"the controller has not been ready for {unready:.0f} s")

    async def __del__(self) -> None:
        """Serve awaits this before it ends the replica on purpose."""
        await self.close()

    async def close(self) -> None:
        """Stop listening, close workers and journal, end what was started. Takes STOP_SECONDS at most for each."""
        for actor in (self._front, self._controller):
            if actor is not None:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(STOP_SECONDS):
                        await actor.stop.remote()
        self._end()

    async def _start(self) -> None:
        import ray

        from actors.controller import Controller
        from actors.front import Front, make_folder
        from actors.loading_board import OPTIONS as BOARD_OPTIONS
        from actors.loading_board import LoadingBoard

        spec = self._spec
        await self._until_names_are_free()
        common: dict[str, Any] = {
            "namespace": spec.cluster,
            "num_cpus": 0,
            "resources": ON_HEAD,
            "max_restarts": -1,
        }
        board = ray.remote(LoadingBoard).options(**{**BOARD_OPTIONS, **common}).remote(spec.engines)
        self._started.append(board)
        self._following = asyncio.create_task(self._follow_target(board))
        options = {**common, "name": CONTROLLER, "max_concurrency": CALLS}
        self._controller = ray.remote(Controller).options(**options).remote(spec.controller)
        self._started.append(self._controller)
        if spec.front is not None:
            settings = replace(spec.front, folder=make_folder())
            options = {**common, "name": FRONT}
            self._front = ray.remote(Front).options(**options).remote(settings, CONTROLLER, spec.cluster)
            self._started.append(self._front)
            # Before the engines are there: who waits for them hears how far they are.
            await _answer(self._front.start.remote(), FRONT_SECONDS, "the front did not start")
        patience = spec.controller.start_timeout + MARGIN_SECONDS
        await _answer(self._controller.spawn_workers.remote(), patience, "the session workers did not start")
        await _answer(self._controller.connect.remote(), patience, "the session workers reached no engine")
        logger.info("cluster %s is ready", spec.cluster)

    async def _until_names_are_free(self) -> None:
        """Wait for the end of what an earlier supervisor started. Raises UnavailableError if it does not end."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FREE_SECONDS
        while taken := [name for name in (CONTROLLER, FRONT, BOARD_NAME) if self._is_taken(name)]:
            if loop.time() > deadline:
                raise UnavailableError(
                    f"Ray namespace {self._spec.cluster} has a {' and a '.join(taken)} already; was the cluster "
                    "started with `rollout up` as well? Stop it with `rollout down`"
                )
            await asyncio.sleep(0.5)

    def _is_taken(self, name: str) -> bool:
        import ray

        try:
            ray.get_actor(name, self._spec.cluster)
        except ValueError:
            return False
        return True

    async def _follow_target(self, board: Any) -> None:
        """Tell the board how many engines Serve is to run, for ever and over all failures."""
        worker = self._spec.controller.worker
        failing = False
        while True:
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    target = await serve_target(worker.app, worker.deployment)
                    # Scaled to nothing, or not deployed yet: the board knows of no replica then, and need not wait.
                    if target:
                        # Also what is no news: a board that Ray has started anew expects what it was made with.
                        await board.expect.remote(target)
                failing = False
            except Exception as failure:
                if not failing:
                    logger.warning("the board is not told how many engines there are to be: %s", _said(failure))
                failing = True
            await asyncio.sleep(TARGET_PERIOD_SECONDS)

    def _end(self) -> None:
        import ray

        if self._following is not None:
            self._following.cancel()
        for actor in self._started:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._started = []


async def serve_target(app: str, deployment: str) -> int | None:
    """How many replicas Serve is to run of a deployment, as its configuration says now; None: it knows no such one.

    Serve tells it in its REST API, whose answer this is; `serve.status()` counts only the replicas that there are.
    Raises what Ray raises.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    # Ray looks it up with a blocking call.
    controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    found = await controller.get_serve_instance_details.remote()
    known = found["applications"].get(app, {}).get("deployments", {}).get(deployment)
    return None if known is None else int(known["target_num_replicas"])


def _said(failure: BaseException) -> str:
    return str(failure) or type(failure).__name__


async def _answer(reference: Awaitable[Any], seconds: float, what: str) -> Any:
    """What a call returns. Raises RolloutError: what was raised there, or that there was no answer in time."""
    try:
        async with asyncio.timeout(seconds):
            return await reference
    except TimeoutError:
        raise UnavailableError(f"{what} within {seconds:g} s") from None
    except Exception as failure:
        # Ray's own text is a stack of the other process.
        cause = getattr(failure, "cause", failure)
        raise (cause if isinstance(cause, RolloutError) else UnavailableError(f"{what}: {cause}")) from None


def build_supervisor_app(spec: SupervisorSpec) -> Any:
    """The Serve application, for `serve.run(app, name=APP, route_prefix=None)`."""
    from ray import serve

    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=3 * ASK_SECONDS,
        graceful_shutdown_timeout_s=3 * STOP_SECONDS,
        max_constructor_retry_count=START_ATTEMPTS,
    )
    return deployment(Supervisor).bind(spec)
