"""The trainer's role against a rollout server that shares no code with ours, over real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from actors.foreign_rollouts import ForeignRollouts
from actors.messages import ForeignSettings, RunSpec, WorkerSettings
from actors.scheduler import Assignment
from deployments.gateway import make_app
from rollout.access import AccessSettings
from rollout.errors import EngineDied
from rollout.limits import Limits
from rollout.remote.foreign_client import RemoteSpec
from rollout.remote.wire import CompletionRequest, CompletionResponse, Generation, RolloutResponse
from rollout.sampling import Sampling
from rollout.session_keys import REMOTE_ROLLOUTS, derived_secret
from rollout.tasks import Task
from rollout.testing.scripted_engine import ScriptedEngine
from rollout.trajectory import SessionKey, Trajectory
from tests.conftest import MODEL
from tests.remote_peers.chatml import ChatMl
from tests.remote_peers.server import PeerServer
from tests.rollout.sessions import IM_END, call, say
from tests.serving import serving

SECRET = b"cluster" * 5
MULTIPLY = call("multiply", '{"a": 6, "b": 7}')
TURNS = [MULTIPLY + IM_END, "It is 42." + IM_END]
# Ends without the end-of-turn token, as where an engine does not return it.
UNENDED = [MULTIPLY, "It is 42." + IM_END]


class Direct:
    """ForeignCalls in this process."""

    def __init__(self) -> None:
        self.rollouts: ForeignRollouts | None = None
        self.reports = 0

    async def complete(self, _worker: str, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        assert self.rollouts is not None
        return await self.rollouts.complete(rollout_id, request)

    async def completed(self, _worker: str, rollout_id: str, report: RolloutResponse) -> None:
        assert self.rollouts is not None
        self.reports += 1
        await self.rollouts.completed(rollout_id, report)


class Cluster:
    """A gateway that listens, and the worker behind it."""

    def __init__(self, chat: Any, address: str, calls: Direct) -> None:
        self.chat = chat
        self.calls = calls
        foreign = ForeignSettings(address, derived_secret(SECRET, REMOTE_ROLLOUTS))
        made = WorkerSettings(str(MODEL), None, "auto", {}, "app", "engine", 4, {}, 8, foreign)
        self.rollouts = calls.rollouts = ForeignRollouts("w", made)

    async def play(self, url: str, generation: Generation, turns: list[Any], **limits: Any) -> Trajectory:
        answers = [say(self.chat, turn) if isinstance(turn, str) else turn for turn in turns]
        engine = ScriptedEngine(lambda _prompt, _session, turn: answers[turn])
        spec = RunSpec("r", "", {}, Sampling(max_tokens=64), Limits(**limits), RemoteSpec(url, generation))
        task = Task(task_id="t", messages=[{"role": "system", "content": "Do."}, {"role": "user", "content": "6*7?"}])
        assignment = Assignment(SessionKey("r", "t", "r/t", 0), task, 1)
        async with asyncio.timeout(30):
            return await self.rollouts.session(spec, assignment, engine, self.chat, None).run()


@pytest.fixture
async def cluster(chat) -> AsyncIterator[Cluster]:
    calls = Direct()
    app = make_app(lambda: None, 2**20, AccessSettings(session_secret=SECRET), remote=calls)  # type: ignore[arg-type,return-value]
    async with serving(app, lifespan="off") as address:
        made = Cluster(chat, address, calls)
        yield made
        await made.rollouts.close()


@asynccontextmanager
async def peer(*faults: str, generation: Generation = "A") -> AsyncIterator[PeerServer]:
    chat = ChatMl.of_file(str(MODEL / "tokenizer.json"))
    async with PeerServer(chat, *faults, chat_path=generation == "A1", pause=0.01) as made:
        yield made


@pytest.mark.parametrize("turns", [TURNS, UNENDED])
@pytest.mark.parametrize("generation", ["A", "A1", "B"])
async def test_both_count_the_same_tokens(cluster: Cluster, generation: Generation, turns: list[str]) -> None:
    async with peer(generation=generation) as server:
        trajectory = await cluster.play(server.url, generation, turns)
    assert trajectory.error is None
    assert (trajectory.stop_reason, trajectory.reward) == ("stop", 1.0 if generation == "B" else None)
    (segment,) = trajectory.segments
    sampled = [token for token, mask in zip(segment.response_ids, segment.response_mask, strict=True) if mask]
    assert sampled == [token for turn in turns for token in say(cluster.chat, turn)[0]]
    assert [message["role"] for message in trajectory.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert trajectory.messages[3]["content"] == "42"


@pytest.mark.parametrize(
    ("fault", "turns", "explanation"),
    [
        ("no_mask", TURNS, "response_mask is missing"),
        ("mask_on_first", TURNS, "first call"),
        ("mask_a_call_late", TURNS, "response_mask is missing"),
        ("one_more", TURNS, "one more"),
        ("one_less", UNENDED, "one less"),
        ("other_tokenizer", TURNS, "tokenizer"),
        ("tool_text", TURNS, "text alone"),
        ("whole_prompt", TURNS, "whole prompt"),
        ("answer_counted", TURNS, "as many as the answer before"),
        ("ones", TURNS, "every added token is 0"),
        ("changes_answer", TURNS, "must only grow"),
        ("cuts_history", [TURNS[0]] * 3 + [TURNS[1]], "must only grow"),
    ],
)
async def test_its_mistakes_are_named(cluster: Cluster, fault: str, turns: list[str], explanation: str) -> None:
    async with peer(fault) as server:
        trajectory = await cluster.play(server.url, "A", turns)
    assert trajectory.stop_reason == "error" and trajectory.error is not None
    assert explanation in trajectory.error


@pytest.mark.parametrize("generation", ["A", "B"])
@pytest.mark.parametrize("fault", ["no_key", "other_id"])
async def test_a_call_without_the_right_key_is_no_call(cluster: Cluster, generation: Generation, fault: str) -> None:
    async with peer(fault) as server:
        trajectory = await cluster.play(server.url, generation, TURNS, session_seconds=1.0)
    # Without a key not even the end can be told.
    ended = "deadline" if (generation, fault) == ("B", "no_key") else "error"
    assert trajectory.stop_reason == ended and trajectory.num_sampled == 0


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_an_engine_that_dies_is_asked_again(cluster: Cluster, generation: Generation) -> None:
    async with peer() as server:
        trajectory = await cluster.play(server.url, generation, [EngineDied("gone"), *TURNS])
    assert trajectory.stop_reason == "stop" and len(trajectory.tool_calls) == 1


async def test_a_report_that_is_repeated_changes_nothing(cluster: Cluster) -> None:
    async with peer("reports_twice") as server:
        trajectory = await cluster.play(server.url, "B", TURNS)
        async with asyncio.timeout(10):
            while cluster.calls.reports < 3:
                await asyncio.sleep(0.01)
    assert trajectory.stop_reason == "stop" and cluster.calls.reports == 3


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_what_it_does_of_its_own_is_bounded_here(cluster: Cluster, generation: Generation) -> None:
    async with peer("ignores_max_turns", "hot") as server:
        trajectory = await cluster.play(server.url, generation, [TURNS[0]] * 5, max_turns=2)
    assert trajectory.stop_reason == "max_turns" and len(trajectory.tool_calls) == 1
    assert trajectory.metadata["remote"]["sampling_overruled"] == {"temperature": 1.5}


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_one_that_hangs_ends_at_the_deadline(cluster: Cluster, generation: Generation) -> None:
    async with peer("hangs") as server:
        trajectory = await cluster.play(server.url, generation, TURNS, session_seconds=0.3)
    assert trajectory.stop_reason == "deadline"


async def test_one_that_is_killed_costs_its_session(cluster: Cluster) -> None:
    async with peer("hangs") as server:
        playing = asyncio.create_task(cluster.play(server.url, "A", TURNS))
        await asyncio.sleep(0.1)
    trajectory = await playing
    assert trajectory.stop_reason == "error" and trajectory.retryable
