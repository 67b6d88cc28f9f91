"""GPT-OSS conversations go through the same session loop: harmony's channels, its vocabulary, its terminators."""

from __future__ import annotations

import pytest

from rollout.rendering import build_renderer
from tests.rollout.harmony import HarmonyTokenizer
from tests.rollout.sessions import Adder, play, say, scripted, split

# The renderer's prompt ends inside the analysis channel, so a generation begins with its text.
CALL = (
    "I should add.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
    '{"a": 2, "b":3}<|call|>'
)
ANSWER = "Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 5.<|return|>"


@pytest.fixture(scope="module")
def harmony():
    return build_renderer(HarmonyTokenizer(), "gpt-oss", {"conversation_start_date": "2026-01-01"})


def ids(chat, text: str) -> list[int]:
    return chat.tokenizer.encode(text)


async def test_a_harmony_conversation_token_by_token(harmony):
    trajectory = await play(harmony, scripted(harmony, CALL, ANSWER))
    assert (trajectory.stop_reason, trajectory.error, trajectory.reward) == ("stop", None, 1.0)
    (segment,) = trajectory.segments
    sampled, observed = split(trajectory)
    assert sampled == ids(harmony, CALL) + ids(harmony, ANSWER), "nothing sampled was changed"
    assert harmony.decode(observed) == (
        "<|start|>functions.add<|channel|>commentary to=assistant<|message|>5<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>"
    )
    assert len(segment.response_mask) == len(sampled) + len(observed)


async def test_channels_become_reasoning_calls_and_content(harmony):
    trajectory = await play(harmony, scripted(harmony, CALL, ANSWER))
    first, last = trajectory.messages[2], trajectory.messages[-1]
    assert first["reasoning_content"] == "I should add."
    assert first["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert (last["content"], last["reasoning_content"]) == ("It is 5.", "Easy.")


async def test_a_truncated_harmony_call_runs_nothing(harmony):
    cut = CALL[: CALL.index('"b"')]
    trajectory = await play(harmony, scripted(harmony, say(harmony, cut, "length")))
    assert (trajectory.stop_reason, trajectory.tool_calls) == ("length", [])
    assert split(trajectory)[0] == ids(harmony, cut)


async def test_malformed_harmony_arguments_are_answered(harmony):
    broken = CALL.replace('{"a": 2, "b":3}', '{"a": 2, ')
    trajectory = await play(harmony, scripted(harmony, broken, ANSWER))
    assert trajectory.tool_calls[0].ok is False
    assert trajectory.stop_reason == "stop"
    assert split(trajectory)[0] == ids(harmony, broken) + ids(harmony, ANSWER)


async def test_a_second_user_turn_never_trains_a_token_twice(harmony):
    class Talkative(Adder):
        tools = ()

        def reply(self, episode):
            return [{"role": "user", "content": "Sure?"}] if len(episode.turns) == 1 else None

    trajectory = await play(harmony, scripted(harmony, ANSWER, ANSWER), Talkative)
    sampled = [token for index in range(len(trajectory.segments)) for token in split(trajectory, index)[0]]
    assert sampled == ids(harmony, ANSWER) * 2
    for segment in trajectory.segments[1:]:
        assert segment.fork_reason
