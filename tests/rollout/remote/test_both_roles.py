"""Both roles of the protocol over real connections: ours against independent ones, and ours against each other.

Invariant: what a side has of a rollout's tokens is what the other has, token by token, mask by mask.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from actors.remote_player import RemotePlayer
from actors.remote_service import RemoteService
from actors.remote_settings import RemoteSettings
from cluster.remote_probe import Target, check_server
from deployments.gateway import make_app
from rollout.access import AccessSettings
from rollout.mcp_tools import McpServers
from rollout.remote import server_rollout, trainer_client
from rollout.remote.conformance_plan import SCENARIOS
from rollout.remote.foreign_client import ForeignClient, RemoteSpec
from rollout.remote.foreign_session import ForeignSession, Trainer
from rollout.remote.trainer_model import TrainerModel
from rollout.remote.wire import CompletionRequest, CompletionResponse, Generation, RolloutResponse
from rollout.rendering import ChatRenderer, build_renderer
from rollout.sampling import Sampling
from rollout.session_keys import REMOTE_ROLLOUTS, derived_secret
from rollout.tasks import Task
from rollout.testing.scripted_engine import ScriptedEngine
from rollout.trajectory import SessionKey, Trajectory
from tests.conftest import MODEL
from tests.remote_peers.chatml import END, ChatMl, write_call
from tests.remote_peers.server import MULTIPLY, PeerServer
from tests.remote_peers.trainer import PeerTrainer
from tests.rollout.harmony import HarmonyTokenizer
from tests.rollout.sessions import scripted
from tests.serving import serving

SECRET = b"both roles" * 4
GENERATIONS: list[Generation] = ["A", "A1", "B"]
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
ADD = write_call("add", a=2, b=3)
# Thought, two calls in one turn, an end that was not sampled, and text that a tokenizer would merge another way.
TURNS = [
    f"<think>\nTwo at once.\n</think>\n\n{ADD}\n{ADD}{END}",
    f'<tool_call>\n{{"name":"add","arguments":{{"a":5,"b":7}}}}\n</tool_call>{END}',
    ADD,
    f"It is 5.{END}",
]
HARMONY_TURNS = [
    "I should add.<|end|><|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
    '{"a": 2, "b":3}<|call|>',
    "Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 5.<|return|>",
]


@pytest.fixture(scope="module")
def chatml() -> ChatMl:
    return ChatMl.of_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def harmony() -> ChatRenderer:
    return build_renderer(HarmonyTokenizer(), "gpt-oss", {"conversation_start_date": "2026-01-01"})


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[TrainerModel]:
    """The ledgers of rollouts that are played for a trainer, which otherwise nobody sees."""
    made: list[TrainerModel] = []

    class Seen(TrainerModel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(server_rollout, "TrainerModel", Seen)
    return made


@asynccontextmanager
async def our_server(chat: ChatRenderer) -> AsyncIterator[str]:
    """The gateway's routes over the controller's service and one worker's player, without Ray."""
    settings = RemoteSettings(environment="tests.rollout.sessions:Adder", model_names={"demo": None})
    player = RemotePlayer(settings, chat, McpServers({}))
    worker = SimpleNamespace(
        play_remote=SimpleNamespace(remote=player.play), remote_tools=SimpleNamespace(remote=player.tools)
    )

    async def write(*_statements: Any) -> None:
        return None

    service = RemoteService(settings, write=write, workers=lambda: {"w": (worker, 0)})
    backend = SimpleNamespace(
        remote_accept=service.accept,
        remote_result=service.result,
        remote_tools=service.tools,
        remote_counts=service.counts,
    )
    await service.begin([])
    try:
        app = make_app(lambda: backend, 2**24, agent_loop=settings.environment)  # type: ignore[arg-type,return-value]
        async with serving(app) as url:
            yield url
    finally:
        await service.close()


class Calls:
    """What the gateway asks of the one session worker that there is."""

    def __init__(self) -> None:
        self.sessions: dict[str, ForeignSession] = {}

    async def complete(self, _worker: str, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        return await self.sessions[rollout_id].complete(request)

    async def completed(self, _worker: str, rollout_id: str, report: RolloutResponse) -> None:
        await self.sessions[rollout_id].completed(report)


async def trained(
    chat: ChatRenderer, engine: ScriptedEngine, server: str, generation: Generation, **more: Any
) -> Trajectory:
    """A trajectory of ours that a rollout server played, called back over the gateway's routes."""
    calls = Calls()
    access = AccessSettings(session_secret=SECRET)
    app = make_app(lambda: None, 2**24, access, remote=calls)  # type: ignore[arg-type,return-value]
    async with serving(app) as url:
        client = ForeignClient(RemoteSpec(server, generation), 4)
        session = ForeignSession(
            SessionKey("run", "t", "run/t", 0),
            Task(task_id="t", messages=QUESTION),
            trainer=Trainer(engine, chat, f"{url}/remote/w", derived_secret(SECRET, REMOTE_ROLLOUTS), "demo"),
            client=client,
            sampling=Sampling(max_tokens=64),
            limits=more.pop("limits", None) or server_rollout.Limits(session_seconds=30.0),
        )
        calls.sessions[session.rollout_id] = session
        try:
            return await session.run()
        finally:
            await client.close()


def tokens(segments: Any) -> list[tuple[list[int], list[int], list[int]]]:
    return [(s.prompt_ids.tolist(), s.response_ids.tolist(), s.response_mask.tolist()) for s in segments]


# Ours, against independent ones


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_our_rollout_server_and_an_independent_trainer(
    generation: Generation, chat: ChatRenderer, chatml: ChatMl, models: list[TrainerModel]
):
    async with our_server(chat) as url, PeerTrainer(chatml, TURNS, generation=generation) as trainer:
        report, rollout = await trainer.play(url, QUESTION)
        assert trainer.faults == []
        assert (report["status"], report["finish_reason"]) == ("COMPLETED", "stop"), report["error_message"]
        assert report["metrics"]["num_llm_calls"] == 4 and report["metrics"]["num_tool_calls"] == 4
        assert report["metrics"]["response_tokens"] == sum(rollout.mask)
        told = [message["content"] for message in report["final_messages"] if message["role"] == "tool"]
        assert told == ["5", "5", "12", "5"]
        assert len(rollout.reports) == (generation == "B")
        assert report.get("reward") == (1.0 if generation == "B" else None)
        (model,) = models
        assert tokens(model.segments) == [(rollout.prompt, rollout.response, rollout.mask)]


async def test_an_independent_trainer_that_tells_no_tokens(chat: ChatRenderer, chatml: ChatMl):
    async with our_server(chat) as url, PeerTrainer(chatml, TURNS, generation="B", arrays=False) as trainer:
        report, rollout = await trainer.play(url, QUESTION)
    assert trainer.faults == [] and report["status"] == "COMPLETED", report["error_message"]
    assert report["metrics"]["response_tokens"] == sum(rollout.mask)


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_our_trainer_and_an_independent_rollout_server(
    generation: Generation, chat: ChatRenderer, chatml: ChatMl
):
    turns = [text.replace('"add"', '"multiply"') for text in TURNS]
    async with PeerServer(chatml, chat_path=generation == "A1") as server:
        trajectory = await trained(chat, scripted(chat, *turns), server.url, generation)
    assert (trajectory.stop_reason, trajectory.error) == ("stop", None)
    told = [[{"role": "tool", "content": text} for text in texts] for texts in (("6", "6"), ("35",), ("6",))]
    response, mask = [], []
    for index, text in enumerate(turns):
        added = chatml.after(told[index - 1], turns[index - 1].endswith(END)) if index else []
        sampled = chatml.encode(text)
        response += added + sampled
        mask += [0] * len(added) + [1] * len(sampled)
    assert tokens(trajectory.segments) == [(chatml.prompt(QUESTION, [MULTIPLY]), response, mask)]
    assert [call.ok for call in trajectory.tool_calls] == [True] * 4
    assert trajectory.reward == (1.0 if generation == "B" else None)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no_mask", "response_mask is missing"),
        ("mask_on_first", "20 values on the first call"),
        ("mask_a_call_late", "response_mask is missing"),
        ("one_more", "one more"),
        ("other_tokenizer", "is the tokenizer or the chat template another"),
        ("tool_text", "text alone"),
        ("whole_prompt", "whole prompt"),
        ("answer_counted", "as many as the answer before has"),
        ("ones", "every added token is 0"),
        ("cuts_history", "the history must only grow"),
    ],
)
async def test_our_trainer_refuses_every_wrong_mask_and_says_why(
    fault: str, said: str, chat: ChatRenderer, chatml: ChatMl
):
    turns = [text.replace('"add"', '"multiply"') for text in TURNS]
    async with PeerServer(chatml, fault) as server:
        trajectory = await trained(chat, scripted(chat, *turns), server.url, "A")
    assert trajectory.stop_reason == "error"
    assert trajectory.error is not None and said in trajectory.error


# Ours, against each other


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("model", ["demo", "harmony"])
async def test_both_of_our_roles_have_the_same_ledger(
    generation: Generation, model: str, chat: ChatRenderer, harmony: ChatRenderer, models: list[TrainerModel]
):
    used, turns = (chat, TURNS) if model == "demo" else (harmony, HARMONY_TURNS)
    async with our_server(used) as url:
        trajectory = await trained(used, scripted(used, *turns), url, generation)
    assert (trajectory.stop_reason, trajectory.error) == ("stop", None)
    (played,) = models
    (segment,) = trajectory.segments
    assert tokens(played.segments) == tokens(trajectory.segments)
    sampled = [token for token, flag in zip(segment.response_ids, segment.response_mask, strict=True) if flag]
    assert sampled == [token for text in turns for token in used.tokenizer.encode(text, add_special_tokens=False)]
    assert played.segments[0].logprobs.tolist() == segment.logprobs.tolist()


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_our_rollout_server_passes_the_conformance_check(
    generation: Generation, chat: ChatRenderer, monkeypatch: pytest.MonkeyPatch
):
    """All of it. Pauses are half as long as they are, and do not grow; the check wants no shorter ones."""
    monkeypatch.setattr(trainer_client, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(trainer_client, "MAX_PAUSE_S", 0.5)
    async with our_server(chat) as url:
        outcome = await check_server(Target(url, generation, chat=chat))
    assert [f"{d.check} at {d.where}: {d.text}" for d in outcome.deviations] == []
    wanted = {scenario.name for scenario in SCENARIOS if generation in scenario.generations}
    assert {played.scenario.name for played in outcome.played} == wanted and not outcome.skipped


async def test_the_conformance_check_speaks_harmony(harmony: ChatRenderer):
    some = ("tools", "two_calls", "end_not_sampled", "tool_error", "max_tokens", "truncated")
    async with our_server(harmony) as url:
        outcome = await check_server(Target(url, "A", chat=harmony, only=some))
    assert [f"{d.check} at {d.where}: {d.text}" for d in outcome.deviations] == []
