"""A lane: what leaves together, what is cancelled, and that every call is answered exactly once."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors import lanes
from actors.lanes import Answer, Lane, LaneBroken
from rollout.engine import GenerateRequest, Generation, VersionSpan
from rollout.errors import EngineRefused

END = object()


@dataclass
class Batch:
    answers: list[Answer]
    in_flight: int = 0
    version: int = 0


@dataclass
class FakeRemote:
    """The replica's side: records what it is told, and says what the test puts into `stream`."""

    stream: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    submits: list[list[str]] = field(default_factory=list)
    cancels: list[list[str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    lane_ids: set[str] = field(default_factory=set)
    on_submit: Callable[[], Awaitable[None]] | None = None
    on_cancel: Callable[[], Awaitable[None]] | None = None
    listening: bool = False

    async def submit(self, lane_id: str, requests: Sequence[GenerateRequest]) -> None:
        self.lane_ids.add(lane_id)
        self.submits.append([request.request_id for request in requests])
        if self.on_submit is not None:
            await self.on_submit()
        self.log.append("submit")

    async def cancel(self, lane_id: str, request_ids: Sequence[str]) -> None:
        self.lane_ids.add(lane_id)
        self.cancels.append(list(request_ids))
        if self.on_cancel is not None:
            await self.on_cancel()
        self.log.append("cancel")

    async def results(self, lane_id: str) -> AsyncIterator[Any]:
        self.lane_ids.add(lane_id)
        self.listening = True
        try:
            while (item := await self.stream.get()) is not END:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.listening = False

    def answer(self, *request_ids: str, **load: int) -> None:
        self.stream.put_nowait(Batch([(request_id, generation(request_id)) for request_id in request_ids], **load))


def generation(request_id: str) -> Generation:
    # The id in the tokens tells answers apart.
    ids = array("i", list(request_id.encode()))
    return Generation(ids, array("f", [-1.0] * len(ids)), [VersionSpan(0, 0, len(ids))], "stop")


def text(answer: Generation) -> str:
    return bytes(answer.token_ids.tolist()).decode()


def request(request_id: str) -> GenerateRequest:
    return GenerateRequest(request_id, array("i", [1]))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Longer than a flush, in turns of the loop rather than in time alone."""
    await asyncio.sleep(3 * lanes.FLUSH_S)
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def remote() -> FakeRemote:
    return FakeRemote()


@pytest.fixture
async def lane(remote: FakeRemote) -> AsyncIterator[Lane]:
    made = Lane("worker-0", "replica-a", remote)
    yield made
    made.close("the test is over")


def call(lane: Lane, request_id: str, timeout: float = 5.0) -> asyncio.Task[Generation]:
    return asyncio.create_task(lane.call(request(request_id), timeout))


# The way there and back


async def test_calls_that_become_ready_together_leave_together(
    lane: Lane, remote: FakeRemote, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lanes, "FLUSH_S", 0.3)
    first, second = call(lane, "a"), call(lane, "b")
    await asyncio.sleep(0.005)
    third = call(lane, "c")
    await asyncio.sleep(0)
    assert remote.submits == [], "nothing leaves before the time is up"
    await until(lambda: remote.submits)
    fourth = call(lane, "d")
    await until(lambda: len(remote.submits) == 2)
    assert remote.submits == [["a", "b", "c"], ["d"]]
    remote.answer("d", "a")
    remote.answer("c", "b")
    assert [text(await task) for task in (first, second, third, fourth)] == ["a", "b", "c", "d"]
    assert remote.cancels == []


async def test_an_answer_says_which_replica_gave_it_and_how_it_is_loaded(lane: Lane, remote: FakeRemote):
    assert (lane.version, lane.in_flight) == (0, 0)
    task = call(lane, "a")
    await until(lambda: remote.submits)
    assert lane.in_flight == 1, "this worker's own"
    remote.answer("a", in_flight=7, version=3)
    assert (await task).replica == "replica-a"
    assert (lane.version, lane.reported_in_flight, lane.in_flight) == (3, 7, 7)
    remote.answer(in_flight=0, version=4)
    await until(lambda: lane.version == 4)
    assert lane.in_flight == 0


async def test_an_engines_error_is_raised_at_its_own_call_alone(lane: Lane, remote: FakeRemote):
    bad, good = call(lane, "bad"), call(lane, "good")
    await until(lambda: remote.submits)
    remote.stream.put_nowait(Batch([("bad", EngineRefused("too long")), ("good", generation("good"))]))
    with pytest.raises(EngineRefused, match="too long"):
        await bad
    assert text(await good) == "good"
    assert lane.broken is None


async def test_answers_that_nobody_waits_for_are_dropped(lane: Lane, remote: FakeRemote):
    task = call(lane, "a")
    await until(lambda: remote.submits)
    remote.answer("stranger")
    remote.stream.put_nowait(Batch([("a", generation("first")), ("a", generation("second"))]))
    assert text(await task) == "first"
    await settle()
    assert lane.broken is None and lane.in_flight == 0


async def test_a_reopened_lane_has_another_id(remote: FakeRemote):
    made = [Lane("worker-0", "replica-a", remote) for _ in range(3)]
    assert len({lane.lane_id for lane in made}) == 3
    assert all(lane.lane_id.startswith("worker-0#") for lane in made)
    for lane in made:
        lane.close("done")


async def test_all_messages_of_a_lane_carry_its_id(lane: Lane, remote: FakeRemote):
    task = call(lane, "a")
    await until(lambda: remote.submits)
    task.cancel()
    await until(lambda: remote.cancels)
    assert remote.lane_ids == {lane.lane_id}


# Giving up


async def test_a_call_that_is_given_up_before_it_leaves_sends_nothing(lane: Lane, remote: FakeRemote):
    gone, kept = call(lane, "gone"), call(lane, "kept")
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await until(lambda: remote.submits)
    await settle()
    assert (remote.submits, remote.cancels) == ([["kept"]], [])
    remote.answer("kept")
    assert text(await kept) == "kept"


async def test_when_all_are_given_up_before_they_leave_no_message_is_sent(lane: Lane, remote: FakeRemote):
    task = call(lane, "a")
    await asyncio.sleep(0)
    task.cancel()
    await settle()
    assert (remote.submits, remote.cancels, lane.in_flight) == ([], [], 0)


async def test_a_call_that_is_given_up_after_it_left_is_cancelled_at_the_replica(lane: Lane, remote: FakeRemote):
    tasks = {name: call(lane, name) for name in "abc"}
    await until(lambda: remote.submits)
    tasks["a"].cancel()
    tasks["c"].cancel()
    await until(lambda: remote.cancels)
    assert remote.cancels == [["a", "c"]], "in one message"
    assert lane.in_flight == 1
    remote.answer("a", "b", "c")
    assert text(await tasks["b"]) == "b"
    assert tasks["a"].cancelled() and tasks["c"].cancelled()


async def test_a_call_that_waits_too_long_is_cancelled_at_the_replica(lane: Lane, remote: FakeRemote):
    with pytest.raises(TimeoutError):
        await lane.call(request("a"), 0.02)
    await until(lambda: remote.cancels)
    assert (remote.submits, remote.cancels, lane.in_flight, lane.broken) == ([["a"]], [["a"]], 0, None)


@pytest.mark.parametrize("timeout", [0.0, -1.0])
async def test_a_call_without_time_left_fails_at_once_and_sends_nothing(
    lane: Lane, remote: FakeRemote, timeout: float
):
    with pytest.raises(TimeoutError):
        await lane.call(request("a"), timeout)
    await settle()
    assert (remote.submits, remote.cancels) == ([], [])


async def test_an_answered_call_is_not_cancelled(lane: Lane, remote: FakeRemote):
    task = call(lane, "a")
    await until(lambda: remote.submits)
    remote.answer("a")
    await task
    await settle()
    assert remote.cancels == []


async def test_a_cancel_does_not_overtake_its_submit(lane: Lane, remote: FakeRemote):
    taken = asyncio.Event()
    remote.on_submit = taken.wait  # type: ignore[assignment]
    task = call(lane, "a")
    await until(lambda: remote.submits)
    task.cancel()
    await settle()
    taken.set()
    await until(lambda: len(remote.log) == 2)
    assert remote.log == ["submit", "cancel"]


# Breaking


async def end(remote: FakeRemote) -> None:
    remote.stream.put_nowait(END)


async def raise_(remote: FakeRemote) -> None:
    remote.stream.put_nowait(RuntimeError("actor died"))


@pytest.mark.parametrize(
    ("happens", "reason"),
    [(end, "replica replica-a ended its stream"), (raise_, "replica replica-a went away: RuntimeError: actor died")],
)
async def test_when_the_stream_breaks_all_calls_fail_at_once(
    lane: Lane, remote: FakeRemote, happens: Callable[[FakeRemote], Awaitable[None]], reason: str
):
    sent = [call(lane, name) for name in "ab"]
    await until(lambda: remote.submits)
    waiting = call(lane, "c")
    await asyncio.sleep(0)
    await happens(remote)
    for task in (*sent, waiting):
        with pytest.raises(LaneBroken) as caught:
            async with asyncio.timeout(1):
                await task
        assert str(caught.value) == reason
    assert (lane.broken, lane.in_flight) == (reason, 0)
    with pytest.raises(LaneBroken, match="replica-a"):
        await lane.call(request("later"), 5)
    await settle()
    assert "later" not in str(remote.submits) and remote.cancels == []


async def test_answers_before_the_break_count(lane: Lane, remote: FakeRemote):
    answered, lost = call(lane, "a"), call(lane, "b")
    await until(lambda: remote.submits)
    remote.answer("a")
    remote.stream.put_nowait(RuntimeError("actor died"))
    assert text(await answered) == "a"
    with pytest.raises(LaneBroken):
        await lost


async def stall() -> None:
    await asyncio.Event().wait()


async def refuse() -> None:
    raise ConnectionError("refused")


@pytest.mark.parametrize(("trouble", "kind"), [(refuse, "ConnectionError: refused"), (stall, "TimeoutError: ")])
async def test_a_submit_that_fails_or_hangs_breaks_the_lane(
    lane: Lane, remote: FakeRemote, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[], Awaitable[None]], kind: str
):
    monkeypatch.setattr(lanes, "CALL_TIMEOUT_S", 0.03)
    earlier = call(lane, "a")
    await until(lambda: remote.log)
    remote.on_submit = trouble
    later = call(lane, "b")
    for task in (earlier, later):
        with pytest.raises(LaneBroken) as caught:
            await task
        assert str(caught.value) == f"replica replica-a took no requests: {kind}"
    await until(lambda: not remote.listening)


@pytest.mark.parametrize("trouble", [refuse, stall])
async def test_a_cancel_that_fails_or_hangs_breaks_the_lane(
    lane: Lane, remote: FakeRemote, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[], Awaitable[None]]
):
    monkeypatch.setattr(lanes, "CALL_TIMEOUT_S", 0.03)
    remote.on_cancel = trouble
    given_up, other = call(lane, "a"), call(lane, "b")
    await until(lambda: remote.log)
    given_up.cancel()
    with pytest.raises(LaneBroken, match="took no requests"):
        await other


async def test_a_slow_submit_within_its_time_breaks_nothing(lane: Lane, remote: FakeRemote):
    async def slow() -> None:
        await asyncio.sleep(0.02)

    remote.on_submit = slow
    task = call(lane, "a")
    await until(lambda: remote.log)
    remote.answer("a")
    assert text(await task) == "a"


async def test_closing_fails_what_is_held_and_stops_listening(lane: Lane, remote: FakeRemote):
    sent = call(lane, "a")
    await until(lambda: remote.submits and remote.listening)
    unsent = call(lane, "b")
    await asyncio.sleep(0)
    lane.close("scaled down")
    lane.close("again")
    for task in (sent, unsent):
        with pytest.raises(LaneBroken, match=r"^scaled down$"):
            await task
    await until(lambda: not remote.listening)
    await settle()
    assert (remote.submits, remote.cancels, lane.broken) == ([["a"]], [], "scaled down")


async def test_a_broken_lane_can_be_tried_elsewhere():
    assert (LaneBroken.category, LaneBroken.retryable) == ("engine_died", True)


@pytest.mark.parametrize("seed", range(5))
async def test_in_any_disorder_every_call_is_answered_exactly_once(seed: int):
    rng = random.Random(seed)
    remote = FakeRemote()
    lane = Lane("worker-0", "replica-a", remote)
    answers: dict[str, list[str]] = {}

    async def one(name: str) -> None:
        try:
            await asyncio.sleep(rng.uniform(0, 0.03))
            result = text(await lane.call(request(name), rng.choice([0.005, 5.0])))
            outcome = "answered" if result == name else f"somebody else's: {result}"
        except TimeoutError:
            outcome = "timeout"
        except EngineRefused as refused:
            outcome = "refused" if str(refused) == name else f"somebody else's: {refused}"
        except LaneBroken:
            outcome = "broken"
        except asyncio.CancelledError:
            outcome = "cancelled"
        answers.setdefault(name, []).append(outcome)

    async def replica() -> None:
        seen: set[str] = set()
        while True:
            await asyncio.sleep(0.002)
            new = [name for batch in remote.submits for name in batch if name not in seen]
            seen |= set(new)
            rng.shuffle(new)
            chosen = [name for name in new if rng.random() < 0.7]
            outcomes: list[Answer] = [
                (name, EngineRefused(name) if rng.random() < 0.3 else generation(name)) for name in chosen
            ]
            remote.stream.put_nowait(Batch(outcomes + outcomes[:1]))

    names = [f"r{n}" for n in range(150)]
    tasks = {name: asyncio.create_task(one(name)) for name in names}
    serving = asyncio.create_task(replica())
    await asyncio.sleep(0.02)
    for name in rng.sample(names, 20):
        tasks[name].cancel()
    await asyncio.sleep(0.03)
    serving.cancel()
    remote.stream.put_nowait(END)
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert {name: found for name, found in answers.items() if len(found) != 1} == {}
    assert answers.keys() == set(names)
    found = {outcome for (outcome,) in answers.values()}
    assert {"answered", "refused", "timeout", "broken"} <= found <= {
        "answered", "refused", "timeout", "broken", "cancelled",
    }  # fmt: skip
    assert lane.in_flight == 0
    sent = [name for batch in remote.submits for name in batch]
    assert len(sent) == len(set(sent)), "no request is sent twice"
