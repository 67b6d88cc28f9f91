"""The way of a remote rollout's calls to its worker, with handles that die (test doubles of Ray's)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from actors import foreign_calls
from actors.foreign_calls import RayForeignCalls
from rollout.errors import ConflictError, NotFoundError, UnavailableError
from rollout.remote.wire import CompletionRequest, RolloutResponse

REQUEST = CompletionRequest(rollout_id="r", messages=[{"role": "user", "content": "x"}])


class Method:
    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work

    def remote(self, *arguments: Any) -> Any:
        async def answer() -> Any:
            return self._work(*arguments)

        return answer()


class Worker:
    """A handle. `failure`: what every call of it raises."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[str] = []
        self.foreign_complete = Method(self._answer)
        self.foreign_completed = Method(self._answer)

    def _answer(self, rollout_id: str, _body: Any) -> str:
        self.calls.append(rollout_id)
        if self.failure is not None:
            raise self.failure
        return f"answer to {rollout_id}"


class Calls(RayForeignCalls):
    """With a controller that names its workers from a list, one state after the other."""

    def __init__(self, *states: dict[str, Worker] | Exception) -> None:
        super().__init__("cluster")
        self.states = list(states)
        self.asked = 0

    async def _ask(self) -> dict[str, Any]:
        self.asked += 1
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return dict(state)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_calls, "ASK_AGAIN_S", 0.0)


def died() -> RayActorError:
    return RayActorError()


async def test_the_controller_is_asked_for_its_workers_once():
    worker = Worker()
    calls = Calls({"w": worker})
    for _ in range(3):
        assert await calls.complete("w", "r", REQUEST) == "answer to r"  # type: ignore[comparison-overlap]
    await calls.completed("w", "r", RolloutResponse(rollout_id="r", status="COMPLETED"))
    assert calls.asked == 1 and worker.calls == ["r"] * 4


async def test_a_dead_worker_is_looked_for_once_more():
    dead, alive = Worker(died()), Worker()
    calls = Calls({"w": dead}, {"w": alive})
    assert await calls.complete("w", "r", REQUEST) == "answer to r"  # type: ignore[comparison-overlap]
    assert calls.asked == 2
    gone = Calls({"w": Worker(died())}, {})
    with pytest.raises(NotFoundError):
        await gone.complete("w", "r", REQUEST)
    still = Calls({"w": Worker(died())})
    with pytest.raises(NotFoundError, match="is gone"):
        await still.complete("w", "r", REQUEST)


async def test_a_worker_that_nobody_knows_is_not_found_and_the_controller_is_spared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign_calls, "ASK_AGAIN_S", 0.05)
    calls = Calls({})
    for _ in range(2):
        asked = (calls.complete("nobody", "r", REQUEST) for _ in range(20))
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(failure, NotFoundError) for failure in found)
    assert calls.asked <= 4


async def test_a_worker_that_is_younger_than_the_list_is_found():
    calls = Calls({"w": Worker()}, {"w": Worker(), "new": Worker()})
    await calls.complete("w", "r", REQUEST)
    assert await calls.complete("new", "r", REQUEST) == "answer to r"  # type: ignore[comparison-overlap]


async def test_a_controller_that_is_away_is_not_taken_for_a_lost_rollout():
    calls = Calls(UnavailableError("the controller does not answer"), {"w": Worker()})
    with pytest.raises(UnavailableError):
        await calls.complete("w", "r", REQUEST)
    await calls.complete("w", "r", REQUEST)


async def test_what_the_worker_raises_is_raised():
    failure = RayTaskError("foreign_complete", "trace", ConflictError("the rollout has ended"))
    calls = Calls({"w": Worker(failure)})
    with pytest.raises(ConflictError, match="has ended"):
        await calls.complete("w", "r", REQUEST)
