"""Our rollout server and our trainer with each other: every mask that one side counts, the other one checks."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from rollout.limits import Limits
from rollout.remote.hosts import AllowedHosts
from rollout.remote.order import RolloutOrder
from rollout.remote.server_rollout import play
from rollout.remote.tokenizers import Tokenizers
from rollout.remote.trainer_client import TrainerClient
from rollout.remote.wire import CompletionRequest, Generation, InitRequest, RolloutRequest
from rollout.rendering import ChatRenderer
from tests.rollout.remote.foreign_peer import Peer, foreign_session
from tests.rollout.sessions import IM_END, Adder, call, scripted

TURNS = (
    "Let me see. " + call("add", '{"a": 2, "b": 3}') + IM_END,
    call("add", '{"a": 5, "b": "x"}') + call("negate", '{"flag": true}') + IM_END,
    "It is 5." + IM_END,
)


class Plain(Adder):
    """Without a system prompt of its own."""

    system_prompt = None


async def ours(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
    """Plays as a cluster of ours does, with the trainer's side called directly."""
    request = InitRequest if peer.generation == "B" else RolloutRequest
    order = RolloutOrder.of(request.model_validate(body))

    async def handle(request: httpx.Request) -> httpx.Response:
        if peer.generation == "A1" and request.url.path.endswith("/v1/completions"):
            return httpx.Response(404)
        session = peer.sessions[order.rollout_id]
        answer = await session.complete(CompletionRequest.model_validate_json(request.content))
        return httpx.Response(200, content=json.dumps(answer.body()))

    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8"]

    def client() -> TrainerClient:
        hosts = AllowedHosts(["gateway"], resolve=resolve)
        return TrainerClient(order.server_url, order.generation, hosts, transport=httpx.MockTransport(handle))

    response = await play(
        order,
        environment=Plain,
        limits=Limits(),
        tokenizers=Tokenizers(peer.chat, {"org/model": "main"}, {}),
        client=client,
    )
    return json.loads(json.dumps(response.body(order.generation)))


@pytest.mark.parametrize("generation", ["A", "A1", "B"])
async def test_a_trajectory_of_three_turns_is_whole(chat: ChatRenderer, generation: Generation):
    peer = Peer(generation, chat, ours)
    session = foreign_session(chat, scripted(chat, *TURNS), peer)
    trajectory = await session.run()
    assert (trajectory.stop_reason, trajectory.error) == ("stop", None)
    (segment,) = trajectory.segments
    sampled = [chat.tokenizer.encode(turn, add_special_tokens=False) for turn in TURNS]
    assert segment.num_sampled == sum(map(len, sampled))
    roles = [message["role"] for message in trajectory.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    if generation == "B":
        assert trajectory.reward == 1.0


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_a_turn_that_is_cut_ends_both_sides_alike(chat: ChatRenderer, generation: Generation):
    peer = Peer(generation, chat, ours)
    trajectory = await foreign_session(chat, scripted(chat, *TURNS), peer, max_response_tokens=5).run()
    assert trajectory.error is None and trajectory.stop_reason in ("max_tokens", "length")
    assert sum(segment.num_sampled for segment in trajectory.segments) == 5


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_the_trainers_turns_are_kept(chat: ChatRenderer, generation: Generation):
    peer = Peer(generation, chat, ours)
    trajectory = await foreign_session(chat, scripted(chat, *TURNS), peer, max_turns=2).run()
    assert (trajectory.stop_reason, trajectory.error) == ("max_turns", None)
    assert len(trajectory.segments[0].turns) >= 3
