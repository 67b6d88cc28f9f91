"""Remote rollouts over a real journal: restarts, lost workers, callbacks. Workers and trainers are doubles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from actors import journal_remote
from actors import remote_service as module
from actors.journal import Journal
from actors.remote_service import RemoteService
from actors.remote_settings import RemoteSettings
from rollout.errors import (
    BusyError,
    ConflictError,
    JournalError,
    NotFoundError,
    RefusedError,
    RolloutError,
    UnavailableError,
)
from rollout.limits import Limits
from rollout.remote.failures import RemoteFailure
from rollout.remote.order import RolloutOrder
from rollout.remote.tokenizers import LOAD_SECONDS
from rollout.remote.trainer_client import TrainerBusy
from rollout.remote.wire import RolloutResponse
from tests.actors.test_remote_book import answer
from tests.actors.test_remote_book import order as plain_order


def order(rollout_id: str = "r", generation: str = "A", **fields: Any) -> RolloutOrder:
    return plain_order(rollout_id, generation, server_url="http://127.0.0.1:9", **fields)


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Worker:
    """Plays what it is told to end."""

    def __init__(self) -> None:
        self.ends: dict[str, asyncio.Future[RolloutResponse]] = {}
        self.waited: dict[str, float] = {}
        self.tools: list[Any] | Exception = [{"type": "function"}]
        self.play_remote = _Method(self._play)
        self.remote_tools = _Method(self._list)

    async def _play(self, wanted: RolloutOrder, queue_s: float) -> RolloutResponse:
        self.waited[wanted.rollout_id] = queue_s
        self.ends[wanted.rollout_id] = asyncio.get_running_loop().create_future()
        return await self.ends[wanted.rollout_id]

    async def _list(self) -> list[Any]:
        if isinstance(self.tools, Exception):
            raise self.tools
        return self.tools

    def end(self, name: str, response: RolloutResponse | None = None) -> None:
        self.ends[name].set_result(response or answer(name))


class Trainers:
    """Takes callbacks; `failures` come first."""

    def __init__(self) -> None:
        self.told: list[RolloutResponse] = []
        self.keys: list[str | None] = []
        self.failures: list[Exception] = []
        self.tries = 0
        self.stalls = 0

    def client(self, wanted: RolloutOrder, hosts: Any) -> Any:
        self.keys.append(wanted.api_key)
        return self

    async def completed(self, response: RolloutResponse) -> None:
        self.tries += 1
        if self.stalls:
            self.stalls -= 1
            await asyncio.sleep(60)
        if self.failures:
            raise self.failures.pop(0)
        self.told.append(response)

    async def close(self) -> None:
        pass


class House:
    """A service over a journal that outlives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workers = {"w0": Worker(), "w1": Worker()}
        self.loads = {"w0": 5, "w1": 0}
        self.trainers = Trainers()
        self.settings: RemoteSettings | None = RemoteSettings(
            "m:E", limits=Limits(session_seconds=5), max_concurrent=2, max_queued=3
        )
        self.now = 0.0
        self.given_up: list[Any] = []
        self.service: RemoteService
        self.journal: Journal

    async def open(self) -> RemoteService:
        import time

        self.journal = Journal(self.path, sync=False)
        self.service = RemoteService(
            self.settings,
            write=self.journal.write,
            workers=lambda: {name: (worker, self.loads[name]) for name, worker in self.workers.items()},
            make_client=self.trainers.client,
            give_up=self.given_up.append,
            clock=lambda: time.time() + self.now,
        )
        await self.service.begin(journal_remote.recover(self.journal))
        return self.service

    def die(self) -> None:
        """As a process does: nothing is said to anybody."""
        if self.service._loop is not None:
            self.service._loop.cancel()
        for task in self.service._tasks:
            task.cancel()
        self.journal.close()
        self.workers = {"w2": Worker()}
        self.loads = {"w2": 0}

    def states(self) -> dict[str, str]:
        rows = self.journal.read("SELECT rollout_id, state FROM remote_rollouts")
        return dict(rows)

    @property
    def playing(self) -> dict[str, str]:
        return {name: key for key, worker in self.workers.items() for name in worker.ends}


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(module, "TICK_S", 0.01)
    made = House(tmp_path / "journal.sqlite")
    await made.open()
    yield made
    if made.service._loop is not None:
        made.service._loop.cancel()
    for task in made.service._tasks:
        task.cancel()
    made.journal.close()


async def test_a_rollout_goes_to_the_least_busy_worker_and_everybody_who_asks_hears_the_answer(house: House):
    ticket = await house.service.accept(order())
    assert (ticket.rollout_id, ticket.repeated) == ("r", False)
    assert (await house.service.accept(order())).repeated
    waiting = [asyncio.create_task(house.service.result("r", 5.0)) for _ in range(3)]
    await until(lambda: house.playing)
    assert house.playing == {"r": "w1"} and house.states() == {"r": "running"}
    assert await house.service.result("r", 0.01) is None
    house.workers["w1"].end("r")
    assert [response.final_messages[0]["content"] for response in await asyncio.gather(*waiting) if response] == [
        "5",
        "5",
        "5",
    ]
    assert house.states() == {"r": "reported"}
    assert (await house.service.result("r", 0.0)) is not None, "the answer is stored"
    assert (await house.service.counts()).completed == 1


async def test_more_than_may_run_wait_and_more_than_may_wait_are_sent_away(house: House):
    for name in "abc":
        await house.service.accept(order(name))
    await until(lambda: len(house.playing) == 2)
    for name in "de":
        await house.service.accept(order(name))
    with pytest.raises(BusyError):
        await house.service.accept(order("f"))
    counts = await house.service.counts()
    assert (counts.running, counts.queued) == (2, 3)
    house.workers[house.playing["a"]].end("a")
    await until(lambda: "c" in house.playing)
    assert house.workers[house.playing["c"]].waited["c"] > 0


async def test_another_body_and_another_host(house: House):
    await house.service.accept(order())
    with pytest.raises(ConflictError):
        await house.service.accept(order(text="other"))
    with pytest.raises(RefusedError, match="allowed_hosts") as caught:
        await house.service.accept(plain_order("x", server_url="http://10.0.0.1"))
    assert caught.value.field == "server_url"
    with pytest.raises(NotFoundError):
        await house.service.result("x", 0.0)


async def test_a_worker_that_dies_ends_its_rollouts_and_they_are_not_played_again(house: House):
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    house.workers["w1"].ends["r"].set_exception(RuntimeError("The actor died\nwith a stack"))
    await until(lambda: house.trainers.told)
    (told,) = house.trainers.told
    assert told.status == "ERROR" and told.extra_fields["error_category"] == "internal_error"
    assert "stack" not in (told.error_message or "")
    assert house.workers["w0"].ends == {} and house.trainers.keys == ["k"]


async def test_a_worker_that_says_nothing_is_not_waited_for(house: House, monkeypatch: pytest.MonkeyPatch):
    assert house.settings is not None
    monkeypatch.setattr(module, "WORKER_MARGIN_S", 0.05 - house.settings.worker_seconds)
    await house.service.accept(order())
    response = await house.service.result("r", 5.0)
    assert response is not None and "in time" in (response.error_message or "")
    assert len(house.given_up) == 1, "no call of it may follow"


async def test_a_worker_has_time_for_what_lies_outside_the_session(house: House):
    assert house.settings is not None
    limits = house.settings.limits
    needed = LOAD_SECONDS + limits.session_seconds + 2 * limits.environment_seconds
    assert house.settings.worker_seconds >= needed, "a tokenizer is loaded, the session played, scored and closed"


async def test_without_workers_rollouts_wait_for_one(house: House):
    kept, house.workers = house.workers, {}
    await house.service.accept(order())
    await asyncio.sleep(0.05)
    assert house.states() == {"r": "queued"}
    with pytest.raises(UnavailableError):
        await house.service.tools()
    house.workers = kept
    await until(lambda: house.playing)


async def test_a_trainer_that_is_down_is_told_when_it_is_back(house: House):
    house.trainers.failures = [RemoteFailure("network_error", "down"), RemoteFailure("trainer_server_error", "500")]
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.trainers.tries == 1)
    assert (await house.service.counts()).unreported == 1
    await until(lambda: house.states() == {"r": "finished"})
    house.now = 10.0
    await until(lambda: house.trainers.tries == 2)
    house.now = 100.0
    await until(lambda: house.states() == {"r": "reported"})
    assert len(house.trainers.told) == 1


async def test_a_trainer_that_refuses_is_not_asked_again(house: House):
    house.trainers.failures = [RemoteFailure("trainer_client_error", "refused with status 404")]
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.states() == {"r": "reported"})
    house.now = 1_000.0
    await asyncio.sleep(0.05)
    assert house.trainers.tries == 1
    entry = journal_remote.recover(house.journal)[0]
    assert entry.report_error == "refused with status 404" and entry.order.api_key is None


async def test_after_a_restart_nothing_is_played_twice_and_nothing_is_lost(house: House):
    for name, generation in (("a", "B"), ("b", "A"), ("c", "A"), ("d", "B")):
        await house.service.accept(order(name, generation))
    await until(lambda: set(house.playing) == {"a", "b"})
    house.die()
    service = await house.open()
    lost = await service.result("b", 1.0)
    assert lost is not None and lost.status == "ERROR" and "restarted" in (lost.error_message or "")
    await until(lambda: set(house.playing) == {"c", "d"})
    await until(lambda: [told.rollout_id for told in house.trainers.told] == ["a"])
    assert (await service.accept(order("a", "B"))).repeated
    house.workers["w2"].end("c")
    assert (await service.result("c", 1.0)) is not None
    house.workers["w2"].end("d")
    await until(lambda: len(house.trainers.told) == 2)


async def test_an_answer_that_was_not_reported_survives_a_restart(house: House):
    house.trainers.failures = [RemoteFailure("network_error", "down")]
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.trainers.tries == 1)
    house.die()
    await house.open()
    await until(lambda: house.trainers.told)
    assert house.trainers.told[0].final_messages == answer().final_messages


async def test_what_waits_too_long_is_ended(house: House):
    house.workers = {}
    await house.service.accept(order())
    house.now = 601.0
    response = await house.service.result("r", 5.0)
    assert response is not None and response.extra_fields["error_category"] == "rate_limited"


async def test_old_answers_leave_the_journal(house: House):
    await house.service.accept(order())
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.states() == {"r": "reported"})
    house.now = 4_000.0
    await until(lambda: house.states() == {})
    with pytest.raises(NotFoundError):
        await house.service.result("r", 0.0)


async def test_a_cluster_that_is_taken_down_tells_its_trainers(house: House):
    await house.service.accept(order("a", "B"))
    await house.service.accept(order("b"))
    await until(lambda: len(house.playing) == 2)
    waiting = asyncio.create_task(house.service.result("b", 5.0))
    await asyncio.sleep(0)
    await house.service.close()
    assert [told.status for told in house.trainers.told] == ["ERROR"]
    response = await waiting
    assert response is not None and "stopped" in (response.error_message or "")
    with pytest.raises(UnavailableError):
        await house.service.accept(order("c"))


async def test_what_was_being_told_when_the_cluster_went_down_is_told_in_the_farewell(house: House):
    house.trainers.stalls = 1
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.trainers.tries == 1)
    await house.service.close()
    assert [told.status for told in house.trainers.told] == ["COMPLETED"]
    assert house.states() == {"r": "reported"}


async def test_what_is_played_when_the_cluster_goes_down_is_taken_back_first(house: House):
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    await house.service.close()
    assert len(house.given_up) == 1


async def test_a_trainer_that_stalls_holds_up_nobody_elses_report(house: House, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_REPORTING", 3)
    monkeypatch.setattr(module, "MAX_REPORTING_OF_HOST", 2)
    house.settings = RemoteSettings("m:E", max_concurrent=10, max_queued=3)
    await house.service.close()
    await house.open()
    house.trainers.stalls = 2
    for name in "abc":
        await house.service.accept(order(name, "B"))
    await house.service.accept(plain_order("x", "B", server_url="http://localhost:9"))
    await until(lambda: len(house.playing) == 4)
    for name in "abcx":
        house.workers[house.playing[name]].end(name)
        await until(lambda name=name: house.states()[name] != "running")
    await until(lambda: house.states()["x"] == "reported")
    assert [told.rollout_id for told in house.trainers.told] == ["x"]
    assert house.trainers.tries == 3, "the third of the host that stalls waits for a place"


async def test_a_trainer_that_is_busy_is_told_when_it_wants_to_be(house: House):
    house.trainers.failures = [TrainerBusy(200.0)]
    await house.service.accept(order("r", "B"))
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.trainers.tries == 1)
    house.now = 190.0
    await asyncio.sleep(0.05)
    assert house.trainers.tries == 1
    house.now = 201.0
    await until(lambda: house.trainers.told)


async def test_a_key_that_is_made_anew_is_used_and_written_down(house: House):
    house.trainers.failures = [RemoteFailure("network_error", "down")]
    await house.service.accept(order("r", "B"))
    assert (await house.service.accept(order("r", "B", api_key="new"))).repeated
    assert journal_remote.recover(house.journal)[0].order.api_key == "new"
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.trainers.tries == 1)
    assert (await house.service.accept(order("r", "B", api_key="newest"))).repeated
    house.now = 10.0
    await until(lambda: house.trainers.told)
    assert house.trainers.keys == ["new", "newest"]


async def test_the_key_of_a_is_not_in_the_journal_after_the_end(house: House):
    await house.service.accept(order(callback_api_key="sesame"))
    assert "sesame" in str(house.journal.read("SELECT * FROM remote_rollouts"))
    await until(lambda: house.playing)
    house.workers["w1"].end("r")
    await until(lambda: house.states() == {"r": "reported"})
    assert "sesame" not in str(house.journal.read("SELECT * FROM remote_rollouts"))


async def test_nothing_is_taken_that_is_not_written_down(house: House, monkeypatch: pytest.MonkeyPatch):
    async def fail(*_: Any) -> None:
        raise JournalError("disk full")

    monkeypatch.setattr(house.service, "_write", fail)
    with pytest.raises(JournalError):
        await house.service.accept(order())
    assert (await house.service.counts()).queued == 0


async def test_an_answer_that_is_not_on_disk_is_told_to_nobody(house: House, monkeypatch: pytest.MonkeyPatch):
    await house.service.accept(order())
    await until(lambda: house.playing)

    async def fail(*_: Any) -> None:
        raise JournalError("disk full")

    monkeypatch.setattr(house.service, "_write", fail)
    waiting = asyncio.create_task(house.service.result("r", 5.0))
    await asyncio.sleep(0)
    house.workers["w1"].end("r")
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await house.service.accept(order("x"))


async def test_tools_are_asked_once_and_their_failure_is_told(house: House):
    house.workers["w1"].tools = RolloutError("the environment cannot be imported")
    with pytest.raises(RolloutError, match="imported"):
        await house.service.tools()
    house.workers["w1"].tools = ValueError("secret")
    with pytest.raises(UnavailableError, match="log"):
        await house.service.tools()
    house.workers["w1"].tools = [{"type": "function"}]
    assert await house.service.tools() == [{"type": "function"}]
    house.workers["w1"].tools = []
    assert await house.service.tools() == [{"type": "function"}]


async def test_a_cluster_that_is_no_rollout_server(tmp_path: Path):
    house = House(tmp_path / "j.sqlite")
    house.settings = None
    service = await house.open()
    for ask in (service.accept(order()), service.result("r", 0.0), service.tools(), service.counts()):
        with pytest.raises(NotFoundError, match=r"remote_rollout\.enabled"):
            await ask
    await service.close()
    house.journal.close()
