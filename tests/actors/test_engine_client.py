"""The engine client: stickiness, failover, suspects, and waiting for a replica, against a fake Serve handle."""

from __future__ import annotations

import asyncio
import itertools
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors import engine_client
from actors.engine_client import MAX_RESENDS, EngineClient, EngineInfo
from actors.lanes import Answer
from actors.replica_board import BOARD
from rollout.engine import GenerateRequest, Generation, VersionSpan
from rollout.errors import EngineDied, EngineError, EngineRefused, EngineTimeout

INFO = EngineInfo(model="tiny", max_model_len=128, tensor_parallel_size=2, version=0)
Behaviour = Callable[[GenerateRequest], Exception | str | None]
"""What becomes of a request: an exception or text as its answer; None for no answer."""


@dataclass
class Batch:
    answers: list[Answer]
    in_flight: int
    version: int


class Stream:
    """What `results.remote` returns: an async iterator that can be cancelled."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Batch:
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Replica:
    """An engine replica, as far as lanes see it."""

    name: str
    behave: Behaviour = lambda request: "fine"
    version: int = 0
    load: int = 0
    dead: bool = False
    streams: dict[str, Stream] = field(default_factory=dict)
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def submit(self, lane_id: str, requests: Sequence[GenerateRequest]) -> None:
        if self.dead:
            raise RuntimeError("ActorDiedError")
        for request in requests:
            self.requests.append(request)
            outcome = self.behave(request)
            if self.dead:
                return
            if isinstance(outcome, str):
                self.report(lane_id, (request.request_id, generation(outcome)))
            elif outcome is not None:
                self.report(lane_id, (request.request_id, outcome))

    async def cancel(self, lane_id: str, request_ids: Sequence[str]) -> None:
        self.cancelled += request_ids

    def results(self, lane_id: str) -> Stream:
        stream = self.streams[lane_id] = Stream()
        if self.dead:
            stream.queue.put_nowait(RuntimeError("ActorDiedError"))
        else:
            stream.queue.put_nowait(Batch([], self.load, self.version))
        return stream

    def report(self, lane_id: str, *answers: Answer) -> None:
        self.streams[lane_id].queue.put_nowait(Batch(list(answers), self.load, self.version))

    def report_to_all(self) -> None:
        for lane_id in self.streams:
            self.report(lane_id)

    def die(self) -> None:
        self.dead = True
        self.break_streams()

    def break_streams(self) -> None:
        for stream in self.streams.values():
            stream.queue.put_nowait(RuntimeError("ActorDiedError"))


def generation(text: str) -> Generation:
    ids = array("i", list(text.encode()))
    return Generation(ids, array("f", [-1.0] * len(ids)), [VersionSpan(0, 0, len(ids))], "stop")


@dataclass
class Method:
    """`handle.submit` and the like."""

    call: Callable[..., Any]

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class Handle:
    """A Serve deployment handle: `options` addresses one replica by name."""

    serial = itertools.count()

    def __init__(self, *names: str) -> None:
        # The board is the process's; a name of its own keeps tests apart.
        self.deployment_name = f"engine-{next(self.serial)}"
        self.replicas = {name: Replica(name) for name in names}
        self.opened: list[tuple[str, bool]] = []
        self.describe = Method(self._describe)
        self.ready = asyncio.Event()

    async def _describe(self) -> EngineInfo:
        await self.ready.wait()
        return INFO

    def options(self, *, session_id: str, stream: bool = False) -> Any:
        self.opened.append((session_id, stream))
        replica = self.replicas[session_id]

        class Bound:
            submit = Method(replica.submit)
            cancel = Method(replica.cancel)
            results = Method(replica.results)

        return Bound()

    def publish(self, *names: str) -> None:
        """From another thread, as Serve's router does."""
        thread = threading.Thread(target=BOARD.publish, args=(self.deployment_name, frozenset(names)))
        thread.start()
        thread.join(5)


@dataclass
class Rig:
    handle: Handle
    client: EngineClient

    def __getitem__(self, name: str) -> Replica:
        return self.handle.replicas[name]

    def served(self) -> dict[str, int]:
        return {name: len(replica.requests) for name, replica in self.handle.replicas.items()}

    async def generate(self, session: str = "s", timeout: float = 5.0) -> Generation:
        return await self.client.generate([1, 2, 3], {"max_tokens": 4}, session_id=session, timeout=timeout)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    made: list[EngineClient] = []

    async def start(*names: str, margin: int = 4, listed: Sequence[str] | None = None) -> Rig:
        handle = Handle(*names)
        client = EngineClient(handle, worker_id="worker-7", sticky_margin=margin)
        made.append(client)
        handle.ready.set()
        await client.connect(5)
        listed = names if listed is None else listed
        handle.publish(*listed)
        await until(lambda: set(client.replicas) == set(listed))
        return Rig(handle, client)

    yield start
    for client in made:
        client.close()


@pytest.fixture
def short_suspicion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "SUSPECT_S", 0.05)
    monkeypatch.setattr(engine_client, "POLL_S", 0.01)


# Connecting


async def test_connecting_learns_what_the_engine_is():
    handle = Handle()
    client = EngineClient(handle, worker_id="w", sticky_margin=4)
    with pytest.raises(RuntimeError, match="connect"):
        _ = client.max_model_len
    with pytest.raises(EngineTimeout, match=r"no engine replica became ready within 0\.02 s"):
        await client.connect(0.02)
    handle.ready.set()
    assert await client.connect(5) == INFO
    assert client.max_model_len == 128
    assert client.replicas == {}


async def test_what_was_published_before_connecting_is_known():
    handle = Handle("a")
    handle.ready.set()
    handle.publish("a")
    client = EngineClient(handle, worker_id="w", sticky_margin=4)
    await client.connect(5)
    await until(lambda: set(client.replicas) == {"a"})
    client.close()


async def test_a_lane_calls_the_replica_that_it_names(start: Any):
    rig = await start("a", "b")
    assert sorted(rig.handle.opened) == [("a", False), ("a", True), ("b", False), ("b", True)]


# Turns


async def test_a_turn_reaches_the_engine_as_it_is(start: Any):
    rig = await start("a")
    answer = await rig.generate()
    assert (bytes(answer.token_ids.tolist()), answer.replica) == (b"fine", "a")
    await rig.client.generate(array("i", [9]), {"max_tokens": 1}, session_id="s", timeout=5)
    first, second = rig["a"].requests
    assert (first.prompt_ids, first.sampling) == (array("i", [1, 2, 3]), {"max_tokens": 4})
    assert (second.prompt_ids, second.sampling) == (array("i", [9]), {"max_tokens": 1})
    assert first.request_id != second.request_id
    assert first.request_id.startswith("worker-7-") and second.request_id.endswith("-1")
    assert rig.client.resends == 0


async def test_a_session_stays_with_the_replica_that_holds_its_prefix(start: Any):
    rig = await start("a", "b")
    rig["b"].load = 1
    rig["b"].report_to_all()
    await until(lambda: rig.client.replicas["b"].in_flight == 1)
    await rig.generate("s")
    assert rig.served() == {"a": 1, "b": 0}
    rig["a"].load, rig["b"].load = 3, 0
    rig["a"].report_to_all()
    rig["b"].report_to_all()
    await until(lambda: {name: load.in_flight for name, load in rig.client.replicas.items()} == {"a": 3, "b": 0})
    await rig.generate("s")
    assert rig.served() == {"a": 2, "b": 0}, "3 more is within the margin of 4"
    await rig.generate("other")
    assert rig.served() == {"a": 2, "b": 1}, "a new session goes to the least loaded"


async def test_a_session_moves_when_its_replica_is_a_margin_busier_and_then_stays_there(start: Any):
    rig = await start("a", "b", margin=2)
    await rig.generate("s")
    assert rig.served() == {"a": 1, "b": 0}
    rig["a"].load = 2
    rig["a"].report_to_all()
    await until(lambda: rig.client.replicas["a"].in_flight == 2)
    await rig.generate("s")
    rig["a"].load = 0
    rig["a"].report_to_all()
    await until(lambda: rig.client.replicas["a"].in_flight == 0)
    await rig.generate("s")
    assert rig.served() == {"a": 1, "b": 2}


async def test_a_forgotten_session_begins_anew(start: Any):
    rig = await start("a", "b")
    await rig.generate("s")
    rig["a"].load = 1
    rig["a"].report_to_all()
    await until(lambda: rig.client.replicas["a"].in_flight == 1)
    rig.client.forget("s")
    rig.client.forget("never seen")
    await rig.generate("s")
    assert rig.served() == {"a": 1, "b": 1}


async def test_only_replicas_with_the_newest_weights_are_used(start: Any):
    rig = await start("a", "b")
    await rig.generate("s")
    rig["b"].version, rig["b"].load = 1, 50
    rig["b"].report_to_all()
    await until(lambda: rig.client.replicas["b"].version == 1)
    await rig.generate("s")
    assert rig.served() == {"a": 1, "b": 1}


async def test_replicas_to_avoid_get_nothing_even_with_the_newest_weights(start: Any):
    rig = await start("a", "b")
    await rig.generate("s")
    rig.client.avoid(frozenset({"a"}))
    await rig.generate("s")
    assert rig.served() == {"a": 1, "b": 1} and set(rig.client.replicas) == {"b"}
    rig.client.avoid(frozenset({"a", "b"}))
    turn = asyncio.create_task(rig.generate("s"))
    await asyncio.sleep(0.02)
    assert not turn.done(), "it waits"
    rig.client.avoid(frozenset({"b"}))
    await turn
    assert rig.served() == {"a": 2, "b": 1}


@pytest.mark.parametrize("error", [EngineRefused("too long"), EngineError("odd")])
async def test_an_answer_that_is_an_error_is_not_sent_again(start: Any, error: EngineError):
    rig = await start("a", "b")
    rig["a"].behave = lambda request: error
    with pytest.raises(type(error), match=str(error)):
        await rig.generate()
    assert (rig.served(), rig.client.resends) == ({"a": 1, "b": 0}, 0)
    assert set(rig.client.replicas) == {"a", "b"}


async def test_giving_up_stops_the_engine(start: Any):
    rig = await start("a")
    rig["a"].behave = lambda request: None
    turn = asyncio.create_task(rig.generate())
    await until(lambda: rig["a"].requests)
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    await until(lambda: [name[-2:] for name in rig["a"].cancelled] == ["-0"])


async def test_no_answer_in_time_is_a_timeout_and_stops_the_engine(start: Any):
    rig = await start("a")
    rig["a"].behave = lambda request: None
    with pytest.raises(EngineTimeout, match=r"no answer within 0\.05 s"):
        await rig.generate(timeout=0.05)
    await until(lambda: [name[-2:] for name in rig["a"].cancelled] == ["-0"])
    assert rig.client.resends == 0


# Deaths


async def test_when_a_replica_dies_its_turns_go_elsewhere_and_are_counted(start: Any):
    rig = await start("a", "b", margin=100)
    rig["a"].behave = rig["b"].behave = lambda request: None
    turns = [asyncio.create_task(rig.generate(f"s{n}")) for n in range(6)]
    await until(lambda: sum(rig.served().values()) == 6)
    assert rig.served() == {"a": 3, "b": 3}
    rig["b"].behave = lambda request: "again"
    rig["a"].die()
    await until(lambda: rig.served()["b"] == 6)
    assert rig.client.resends == 3
    for lane_id in rig["b"].streams:
        rig["b"].report(lane_id, *((r.request_id, generation("first")) for r in rig["b"].requests[:3]))
    answers = await asyncio.gather(*turns)
    assert sorted(bytes(a.token_ids.tolist()) for a in answers) == [b"again"] * 3 + [b"first"] * 3
    assert {a.replica for a in answers} == {"b"}
    ids = [r.request_id for name in "ab" for r in rig[name].requests]
    assert len(set(ids)) == 9, "a turn that is sent again has another id"
    assert set(rig.client.replicas) == {"b"}
    await rig.generate("s0")
    assert rig.served() == {"a": 3, "b": 7}, "the session now stays with its new replica"


async def test_a_replica_that_takes_no_requests_is_left_too(start: Any):
    rig = await start("a", "b")
    rig["a"].dead = True
    assert (await rig.generate()).replica == "b"
    assert (rig.served(), rig.client.resends) == ({"a": 0, "b": 1}, 1)


async def test_a_replica_that_is_retired_gives_its_turns_back_at_once(start: Any):
    rig = await start("a", "b")
    rig["a"].behave = lambda request: None
    turn = asyncio.create_task(rig.generate())
    await until(lambda: rig["a"].requests)
    rig.handle.publish("b")
    assert (await turn).replica == "b"
    assert rig.client.resends == 1
    assert set(rig.client.replicas) == {"b"}
    (stream,) = rig["a"].streams.values()
    await until(lambda: stream.cancelled)


async def test_a_replica_that_is_published_again_is_used_again(start: Any):
    rig = await start("a")
    rig.handle.publish()
    await until(lambda: not rig.client.replicas)
    rig.handle.publish("a")
    assert (await rig.generate()).replica == "a"
    assert len(rig["a"].streams) == 2, "with a lane of its own"


async def test_an_engine_that_reports_its_death_gets_nothing_for_a_while(start: Any, short_suspicion: None):
    rig = await start("a", "b")
    rig["a"].behave = lambda request: EngineDied("CUDA error")
    assert (await rig.generate("s")).replica == "b"
    assert (rig.served(), rig.client.resends) == ({"a": 1, "b": 1}, 1)
    assert set(rig.client.replicas) == {"b"}
    rig["a"].behave = lambda request: "fine"
    await until(lambda: set(rig.client.replicas) == {"a", "b"})
    assert (await rig.generate("new")).replica == "a"
    assert len(rig["a"].streams) == 1, "its lane was never broken"


async def test_a_broken_lane_of_a_listed_replica_is_opened_again_after_a_pause(start: Any, short_suspicion: None):
    rig = await start("a")
    rig["a"].break_streams()
    await until(lambda: not rig.client.replicas)
    assert (await rig.generate()).replica == "a"
    first, second = rig["a"].streams
    assert first != second and rig["a"].streams[first].cancelled
    assert rig.client.resends == 0, "nothing was under way"


async def test_a_context_that_kills_every_engine_ends_somewhere(start: Any):
    names = [f"replica-{n}" for n in range(MAX_RESENDS + 3)]
    rig = await start(*names)
    for replica in rig.handle.replicas.values():
        replica.behave = lambda request, replica=replica: replica.die()
    with pytest.raises(EngineDied, match=f"{MAX_RESENDS + 1} replicas died over this turn; the last: .*went away"):
        await rig.generate()
    assert sorted(rig.served().values()) == [0, 0] + [1] * (MAX_RESENDS + 1)
    assert rig.client.resends == MAX_RESENDS


# Waiting for a replica


async def test_a_turn_waits_for_a_replica(start: Any, monkeypatch: pytest.MonkeyPatch):
    # So long that only the announcement can have woken it.
    monkeypatch.setattr(engine_client, "POLL_S", 60.0)
    rig = await start("a", listed=[])
    turns = [asyncio.create_task(rig.generate(f"s{n}")) for n in range(3)]
    await asyncio.sleep(0.02)
    assert not any(turn.done() for turn in turns)
    rig.handle.publish("a")
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*turns)
    assert [a.replica for a in answers] == ["a"] * 3
    assert rig.client.resends == 0


async def test_without_a_replica_a_turn_ends_at_its_deadline(start: Any):
    rig = await start(listed=[])
    started = asyncio.get_running_loop().time()
    with pytest.raises(EngineTimeout, match=r"no answer within 0\.06 s"):
        await rig.generate(timeout=0.06)
    assert 0.06 <= asyncio.get_running_loop().time() - started < 3


async def test_a_timeout_after_a_death_names_the_death_as_its_cause(start: Any):
    rig = await start("a")
    rig["a"].behave = lambda request: EngineDied("CUDA error")
    with pytest.raises(EngineTimeout) as caught:
        await rig.generate(timeout=0.05)
    assert isinstance(caught.value.__cause__, EngineDied)
    assert "CUDA error" in str(caught.value.__cause__)
    assert len(rig["a"].requests) == 1, "it was not asked again while it was suspect"


async def test_the_deadline_is_of_the_whole_turn_resends_included(start: Any):
    rig = await start("a", "b")
    for replica in rig.handle.replicas.values():
        replica.behave = lambda request: None
    turn = asyncio.create_task(rig.generate(timeout=0.15))
    started = asyncio.get_running_loop().time()
    await until(lambda: rig["a"].requests)
    await asyncio.sleep(0.08)
    rig["a"].die()
    with pytest.raises(EngineTimeout, match=r"no answer within 0\.15 s"):
        await turn
    assert rig.served() == {"a": 1, "b": 1}
    assert 0.15 <= asyncio.get_running_loop().time() - started < 3


async def test_closing_ends_all_streams(start: Any):
    rig = await start("a", "b")
    await until(lambda: rig["a"].streams and rig["b"].streams)
    rig.client.close()
    assert rig.client.replicas == {}
    streams = [stream for name in "ab" for stream in rig[name].streams.values()]
    await until(lambda: all(stream.cancelled for stream in streams))
    assert len(streams) == 2


async def test_two_workers_of_one_name_share_no_ids():
    """Two controllers on one engine both have a worker-0; with one lane id the answers of one went to the other."""
    first = EngineClient(object(), worker_id="worker-0", sticky_margin=1)
    second = EngineClient(object(), worker_id="worker-0", sticky_margin=1)
    assert first._worker_id != second._worker_id
