"""Calls to the controller: what a caller that goes away ends, and how a dead controller looks. Ray is doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.ray_backend import RayBackend
from rollout.api import LeaseRequest
from rollout.errors import UnavailableError
from rollout.weights import CheckpointSource


class Silent(RayActorError):
    """Without a word."""

    def __str__(self) -> str:
        return ""


class FakeController:
    """A TEST DOUBLE of the controller's handle: every call waits, or raises `failure`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failure: Exception | None = None

    def __getattr__(self, method: str) -> Any:
        class Remote:
            remote = staticmethod(lambda *_: self._call(method))

        return Remote

    def _call(self, method: str) -> asyncio.Future[Any]:
        self.calls.append(method)
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.failure is not None:
            told.set_exception(self.failure)
        return told


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> FakeController:
    made = FakeController()
    monkeypatch.setattr(ray, "get_actor", lambda *_: made)
    return made


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    told: list[Any] = []
    monkeypatch.setattr(ray, "cancel", lambda reference, force: told.append(reference))
    return told


@pytest.mark.parametrize(
    ("call", "ends"),
    [
        (lambda b: b.lease("r", LeaseRequest(groups=1)), True),
        (lambda b: b.watch("r", 5.0), True),
        (lambda b: b.remote_result("x", 5.0), True),
        (lambda b: b.submit("r", []), False),
        (lambda b: b.acknowledge("l"), False),
        (lambda b: b.forget("r"), False),
        (lambda b: b.update_weights(CheckpointSource(path="/new"), 3), False),
        (lambda b: b.close_session("s", False), False),
    ],
    ids=["lease", "watch", "remote_result", "submit", "acknowledge", "forget", "update_weights", "close_session"],
)
async def test_a_caller_that_goes_away_ends_what_waits_and_no_change(
    controller: FakeController, cancelled: list[Any], call: Callable[[RayBackend], Any], ends: bool
):
    calling = asyncio.create_task(call(RayBackend()))
    await asyncio.sleep(0.01)
    assert len(controller.calls) == 1
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert calling.cancelled() and len(cancelled) == ends


async def test_a_controller_that_died_without_a_word_is_unavailable(controller: FakeController):
    controller.failure = Silent()
    with pytest.raises(UnavailableError, match="the controller is gone: Silent"):
        await RayBackend(patience=0.0).runs()
