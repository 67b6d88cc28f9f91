"""Whole sessions at a rollout server, on the scripted engine: tokens, masks, endings, rewards, failures."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from rollout.environment import Environment, Episode
from rollout.errors import ConflictError, EngineDied, EngineTimeout, RefusedError
from rollout.record import to_table
from rollout.remote import foreign_session as rooms
from rollout.remote.wire import Generation
from rollout.sampling import Sampling
from rollout.session_keys import session_of
from rollout.testing.scripted_engine import ScriptedEngine
from tests.rollout.remote.foreign_peer import (
    SECRET,
    TOOLS,
    Conversation,
    Peer,
    end,
    foreign_session,
)
from tests.rollout.sessions import IM_END, call, say, scripted

ADD = call("add", '{"a": 2, "b": 3}')
TWO_TURNS = (f"{ADD}{IM_END}", f"It is 5.{IM_END}")
GENERATIONS: list[Generation] = ["A", "A1", "B"]


def ids(chat, text: str) -> list[int]:
    return chat.tokenizer.encode(text, add_special_tokens=False)


class Five(Environment):
    """A reward of 1 for an answer with 5 in it."""

    async def reward(self, episode: Episode) -> float:
        return float("5" in episode.answer)


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_a_whole_rollout_token_by_token(chat, generation: Generation):
    engine = scripted(chat, *TWO_TURNS)
    peer = Peer(generation, chat)
    trajectory = await foreign_session(chat, engine, peer, environment=Five).run()

    (segment,) = trajectory.segments
    between = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert segment.prompt_ids.tolist() == chat.render([{"role": "user", "content": "2+3?"}], TOOLS)
    first, second = (ids(chat, text) for text in TWO_TURNS)
    assert segment.response_ids.tolist() == first + ids(chat, between) + second
    assert segment.response_mask.tolist() == [1] * len(first) + [0] * len(ids(chat, between)) + [1] * len(second)
    sampled = [round(-1000 * p) for p, m in zip(segment.logprobs, segment.response_mask, strict=True) if m]
    assert sampled == [*range(1, len(first) + 1), *range(1, len(second) + 1)]
    assert (trajectory.stop_reason, trajectory.reward, trajectory.error) == ("stop", 1.0, None)
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert [(c.name, c.ok) for c in trajectory.tool_calls] == [("add", True)]
    assert trajectory.timing.total_s > 0 and trajectory.metadata["level"] == 1
    to_table([trajectory])


@pytest.mark.parametrize("generation", ["A", "A1"])
async def test_what_generation_a_is_told(chat, generation: Generation):
    peer = Peer(generation, chat)
    sampling = Sampling(max_tokens=50_000, temperature=0.5, stop=["###"])
    session = foreign_session(
        chat, scripted(chat, *TWO_TURNS), peer, sampling=sampling, data={"answer": 5}, max_turns=300, key_env=None
    )
    await session.run()
    assert [r.url.path for r in peer.requests] == ["/tools", "/rollout"]
    (body,) = peer.bodies
    assert body["rollout_id"] == session.rollout_id and body["server_url"] == "http://gateway/remote/w"
    assert body["sampling_params"] == {
        "temperature": 0.5, "top_p": 1.0, "max_tokens": 32_768, "stop": ["###"], "logprobs": True,
    }  # fmt: skip
    assert (body["max_turns"], body["max_tokens_total"]) == (100, 8192)
    assert (body["tokenizer_name"], body["tokenizer_revision"]) == ("org/model", "main")
    assert body["metadata"] == {"task_id": "t", "data": {"answer": 5}, "level": 1}
    assert session_of(SECRET, body["callback_api_key"]) == session.rollout_id


async def test_what_generation_b_is_told(chat):
    peer = Peer("B", chat)
    session = foreign_session(chat, scripted(chat, *TWO_TURNS), peer, key_env="ROLLOUT_REMOTE_KEY", max_turns=300)
    await session.run()
    (request,), (body,) = peer.requests, peer.bodies
    assert request.url.path == "/v1/rollout/init" and request.headers["authorization"] == "Bearer sesame"
    assert body["completion_params"] == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "logprobs": True}
    assert body["max_turns"] == 300 and "tool_server_url" not in body
    assert session_of(SECRET, body["api_key"]) == session.rollout_id


async def test_the_answer_is_in_openais_form_with_tokens(chat):
    seen = []

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        seen.append(await peer.call(body["rollout_id"], messages=body["messages"], model="m"))
        return end(body)

    await foreign_session(chat, scripted(chat, TWO_TURNS[0]), Peer("A", chat, play)).run()
    (answer,) = seen
    (choice,) = answer["choices"]
    assert (answer["object"], answer["model"], choice["finish_reason"]) == ("chat.completion", "m", "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2, "b": 3}'}
    assert answer["token_ids"] == ids(chat, TWO_TURNS[0])
    assert len(answer["logprobs"]) == len(answer["token_ids"])
    assert answer["prompt_token_ids"] == chat.render([{"role": "user", "content": "2+3?"}], TOOLS)
    assert answer["usage"]["total_tokens"] == len(answer["prompt_token_ids"]) + len(answer["token_ids"])


# Masks


async def masked(chat, mask: Any) -> tuple[Any, list[Exception]]:
    """A rollout of A whose second call has the mask that `mask` makes of the right one."""
    refused: list[Exception] = []

    async def play(_: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(_, body)
        await talk.ask_and_calculate()
        try:
            await talk.ask(response_mask=mask(talk.mask(), talk))
        except RefusedError as failure:
            refused.append(failure)
            return end(body, status="ERROR", error_message="refused", finish_reason=None)
        return end(body)

    engine = scripted(chat, *TWO_TURNS)
    peer = Peer("A", chat, play)
    trajectory = await foreign_session(chat, engine, peer).run()
    await asyncio.gather(*peer.running)
    if refused:
        assert len(engine.prompts) == 1, "a wrong mask must not reach the engine"
    return trajectory, refused


@pytest.mark.parametrize(
    ("mask", "explanation"),
    [
        (lambda right, talk: None, "response_mask is missing"),
        (lambda right, talk: [*right, 0], "one more"),
        (lambda right, talk: right[1:], "one less"),
        (lambda right, talk: [*right[:-1], 1], "every added token is 0"),
        (lambda right, talk: [2, *right[1:]], "only 0 and 1"),
        (lambda right, talk: [0] * (len(right) + len(talk.sampled[-1])), "as many as the answer before"),
        (lambda right, talk: [0] * len(ids(talk.peer.chat, "5")), "text alone"),
    ],
)
async def test_a_wrong_mask_ends_the_rollout_with_its_explanation(chat, mask: Any, explanation: str):
    trajectory, refused = await masked(chat, mask)
    assert explanation in str(refused[0])
    assert trajectory.stop_reason == "error" and explanation in trajectory.error
    assert trajectory.reward is None and not trajectory.retryable
    assert trajectory.num_sampled == len(ids(chat, TWO_TURNS[0])), "the first turn was sampled all the same"


async def test_the_right_mask_is_taken(chat):
    trajectory, refused = await masked(chat, lambda right, talk: right)
    assert not refused and trajectory.stop_reason == "stop"


async def test_a_mask_on_the_first_call_is_refused(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(RefusedError, match="first call"):
            await peer.call(body["rollout_id"], messages=body["messages"], response_mask=[0])
        return end(body)

    trajectory = await foreign_session(chat, scripted(chat), Peer("A", chat, play)).run()
    assert trajectory.stop_reason == "error" and trajectory.segments == []


async def test_generation_b_may_leave_the_mask_out_or_send_the_right_one(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        await talk.ask_and_calculate()
        assert talk.last is not None
        await talk.ask(response_mask=[0] * (len(chat.render(talk.messages, TOOLS)) - talk.last))
        return end(body)

    trajectory = await foreign_session(chat, scripted(chat, *TWO_TURNS), Peer("B", chat, play)).run()
    assert trajectory.stop_reason == "stop"


# Histories


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_a_changed_history_ends_the_rollout(chat, generation: Generation):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        await talk.ask_and_calculate()
        talk.messages[0] = {"role": "user", "content": "2+4?"}
        with pytest.raises(RefusedError, match="must only grow"):
            await talk.ask(response_mask=None)
        return end(body, status="ERROR")

    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, Peer(generation, chat, play)).run()
    assert trajectory.stop_reason == "error" and "messages.0.content" in trajectory.error
    assert len(engine.prompts) == 1


async def test_the_server_may_open_with_messages_of_its_own(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        opening = [{"role": "system", "content": "Be brief."}, *body["messages"]]
        await peer.call(body["rollout_id"], messages=opening)
        return end(body)

    trajectory = await foreign_session(chat, scripted(chat, TWO_TURNS[1]), Peer("A", chat, play)).run()
    assert [m["role"] for m in trajectory.messages] == ["system", "user", "assistant"]
    assert trajectory.segments[0].prompt_ids.tolist() == chat.render(trajectory.messages[:2], TOOLS)


class _Rewriting:
    """A chat format that extends nothing, and drops the first token of what was said when it renders anew."""

    def __init__(self, chat) -> None:
        self._chat = chat
        self.name = "rewriting"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat, name)

    async def run(self, size: int, work: Any) -> Any:
        return work(self)

    def extend(self, *_: Any) -> None:
        return None

    def render(self, messages: Any, tools: Any) -> list[int]:
        return self._chat.render(messages, tools)[1:]


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_a_template_that_rewrites_the_past_forks_only_where_there_is_no_mask(chat, generation: Generation):
    peer = Peer(generation, chat)
    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(_Rewriting(chat), engine, peer).run()
    if generation == "B":
        assert trajectory.stop_reason == "stop" and len(trajectory.segments) == 2
        assert trajectory.segments[1].fork_reason == "rewriting does not extend this history"
        to_table([trajectory])
    else:
        assert trajectory.stop_reason == "error" and "Use generation B" in trajectory.error


# Repeats, concurrency, the end


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_a_repeated_call_gets_the_same_answer_and_no_second_sample(chat, generation: Generation):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        asked = list(talk.messages)
        first = await peer.call(body["rollout_id"], messages=asked)
        again = await peer.call(body["rollout_id"], messages=asked, temperature=0.3)
        assert first == again
        return end(body)

    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, Peer(generation, chat, play)).run()
    assert len(engine.prompts) == 1 and trajectory.stop_reason == "stop"


async def test_a_call_beside_another_is_refused_and_its_repetition_joins_it(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        rollout, asked = body["rollout_id"], body["messages"]
        first = asyncio.create_task(peer.call(rollout, messages=asked))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="another call"):
            await peer.call(rollout, messages=[{"role": "user", "content": "other"}])
        again = await asyncio.gather(*(peer.call(rollout, messages=asked) for _ in range(3)))
        assert [await first] * 3 == again
        return end(body)

    engine = scripted(chat, *TWO_TURNS, delay=0.05)
    trajectory = await foreign_session(chat, engine, Peer("A", chat, play)).run()
    assert len(engine.prompts) == 1 and trajectory.stop_reason == "stop"


async def test_a_caller_that_goes_away_loses_nothing(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        rollout, asked = body["rollout_id"], body["messages"]
        lost = asyncio.create_task(peer.call(rollout, messages=asked))
        await asyncio.sleep(0.01)
        lost.cancel()
        answer = await peer.call(rollout, messages=asked)
        assert answer["token_ids"] == ids(chat, TWO_TURNS[0])
        return end(body)

    engine = scripted(chat, *TWO_TURNS, delay=0.05)
    await foreign_session(chat, engine, Peer("A", chat, play)).run()
    assert len(engine.prompts) == 1


@pytest.mark.parametrize("generation", GENERATIONS)
async def test_no_call_is_answered_after_the_end(chat, generation: Generation):
    peer = Peer(generation, chat)
    session = foreign_session(chat, scripted(chat, *TWO_TURNS), peer)
    await session.run()
    with pytest.raises(ConflictError, match="has ended"):
        await peer.call(session.rollout_id, messages=[{"role": "user", "content": "more"}])


async def test_the_first_report_counts(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        await Conversation(peer, body).ask()
        return end(body, reward=0.5)

    peer = Peer("B", chat, play)
    session = foreign_session(chat, scripted(chat, *TWO_TURNS), peer)
    trajectory = await session.run()
    assert (trajectory.stop_reason, trajectory.reward) == ("stop", 0.5)
    other = rooms.RolloutResponse(rollout_id=session.rollout_id, status="ERROR", reward=0.9)
    await session.completed(other)
    assert trajectory.reward == 0.5


async def test_generation_a_does_not_report_by_callback(chat):
    session = foreign_session(chat, scripted(chat, *TWO_TURNS), Peer("A", chat))
    with pytest.raises(RefusedError, match="answer to POST /rollout"):
        await session.completed(rooms.RolloutResponse(rollout_id=session.rollout_id, status="COMPLETED"))
    await session.run()


async def test_a_call_may_come_before_the_init_is_answered(chat):
    peer = Peer("B", chat)
    answered = peer._handle

    async def late(request: httpx.Request) -> httpx.Response:
        response = await answered(request)
        await asyncio.sleep(0.05)
        assert not peer.reported, "without the tools there is no prompt"
        return response

    peer._handle = late  # type: ignore[method-assign]
    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, peer).run()
    assert trajectory.stop_reason == "stop"
    assert engine.prompts[0][1].tolist() == chat.render([{"role": "user", "content": "2+3?"}], TOOLS)


# Endings


def ending(generation: Generation, chat, **fields: Any) -> Peer:
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        await Conversation(peer, body).ask()
        return end(body, **fields)

    return Peer(generation, chat, play)


@pytest.mark.parametrize(
    ("fields", "stop_reason", "error"),
    [
        ({}, "stop", None),
        ({"finish_reason": None}, "stop", None),
        ({"finish_reason": "custom"}, "stop", None),
        ({"finish_reason": "max_turns"}, "max_turns", None),
        ({"finish_reason": "max_tokens"}, "max_tokens", None),
        (
            {"finish_reason": "error", "error_message": "boom"},
            "error",
            "remote: the rollout server reported an error: boom",
        ),
        (
            {"status": "ERROR", "error_message": "x" * 9_000, "extra_fields": {"error_category": "tool_error"}},
            "error",
            "reported tool_error: xxx",
        ),
        ({"status": "ERROR", "extra_fields": {"error_category": ["?"]}}, "error", "an error: without a message"),
    ],
)
async def test_how_a_rollout_ends(chat, fields: dict[str, Any], stop_reason: str, error: str | None):
    trajectory = await foreign_session(chat, scripted(chat, TWO_TURNS[1]), ending("B", chat, **fields)).run()
    assert trajectory.stop_reason == stop_reason
    assert (trajectory.error is None) if error is None else (error in trajectory.error)
    assert len(trajectory.error or "") < 1_000 and not trajectory.retryable
    to_table([trajectory])


async def test_the_report_of_another_rollout_is_an_error(chat):
    trajectory = await foreign_session(
        chat, scripted(chat, TWO_TURNS[1]), ending("A", chat, rollout_id="other")
    ).run()
    assert trajectory.stop_reason == "error" and "another rollout" in trajectory.error


async def test_a_rollout_without_a_turn_is_an_error(chat):
    async def play(_: Peer, body: dict[str, Any]) -> dict[str, Any]:
        return end(body, reward=1.0)

    trajectory = await foreign_session(chat, scripted(chat), Peer("B", chat, play)).run()
    assert trajectory.stop_reason == "error" and "without asking" in trajectory.error and trajectory.reward is None


@pytest.mark.parametrize(
    ("claimed", "stop_reason"), [("stop", "length"), ("max_tokens", "max_tokens"), ("max_turns", "max_turns")]
)
async def test_half_a_turn_is_no_stop(chat, claimed: str, stop_reason: str):
    engine = scripted(chat, say(chat, "and so on and so on", "length"))
    trajectory = await foreign_session(chat, engine, ending("B", chat, finish_reason=claimed)).run()
    assert trajectory.stop_reason == stop_reason


async def test_turns_are_bounded_here_as_well(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        await talk.ask_and_calculate()
        with pytest.raises(RefusedError, match="has had its 1 turns"):
            await talk.ask()
        with pytest.raises(ConflictError, match="max_turns"):
            await talk.ask()
        return end(body, status="ERROR", error_message="422", reward=0.25)

    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, Peer("B", chat, play), max_turns=1).run()
    assert (trajectory.stop_reason, trajectory.reward, trajectory.error) == ("max_turns", 0.25, None)


async def test_a_prompt_that_does_not_fit_ends_as_length(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        await talk.ask()
        talk.messages.append({"role": "user", "content": "more " * 3_000})
        with pytest.raises(RefusedError, match="fills the model's context"):
            await talk.ask()
        return end(body, status="ERROR")

    engine = scripted(chat, *TWO_TURNS, max_model_len=2_000)
    trajectory = await foreign_session(chat, engine, Peer("B", chat, play), environment=Five).run()
    assert (trajectory.stop_reason, trajectory.reward) == ("length", 0.0)
    assert len(trajectory.messages) == 2, "what was not answered is not in the record"


async def test_a_first_prompt_that_does_not_fit_is_an_error(chat):
    engine = scripted(chat, *TWO_TURNS, max_model_len=10)
    trajectory = await foreign_session(chat, engine, ending("A", chat)).run()
    assert trajectory.stop_reason == "error" and "max_model_len" in trajectory.error


async def test_the_runs_tokens_are_bounded(chat):
    used = len(ids(chat, TWO_TURNS[0]))

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        await talk.ask_and_calculate()
        with pytest.raises(RefusedError, match="max_response_tokens"):
            await talk.ask()
        return end(body)

    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, Peer("A", chat, play), max_response_tokens=used + 3).run()
    assert trajectory.stop_reason == "max_tokens"


async def test_an_answer_is_cut_by_what_is_left(chat):
    seen = []

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        answer = await peer.call(body["rollout_id"], messages=body["messages"])
        seen.append(answer["choices"][0]["finish_reason"])
        return end(body)

    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, Peer("A", chat, play), max_response_tokens=3).run()
    assert seen == ["length"] and trajectory.num_sampled == 3 and trajectory.stop_reason == "max_tokens"


async def test_a_server_that_gives_no_report_after_its_last_call_is_not_waited_for(chat, monkeypatch):
    monkeypatch.setattr(rooms, "REPORT_GRACE_S", 0.02)

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        talk = Conversation(peer, body)
        await talk.ask_and_calculate()
        with pytest.raises(RefusedError):
            await talk.ask()
        await asyncio.sleep(60)
        raise AssertionError

    engine = scripted(chat, *TWO_TURNS)
    trajectory = await foreign_session(chat, engine, Peer("A", chat, play), max_turns=1).run()
    assert trajectory.stop_reason == "max_turns" and trajectory.timing.total_s < 10


# Sampling


async def test_the_runs_sampling_wins_and_what_was_asked_for_is_written_down(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        await peer.call(
            body["rollout_id"], messages=body["messages"], temperature=0.1, top_p=1.0, max_tokens=7, stop=["!", ""]
        )
        return end(body)

    engine = scripted(chat, *TWO_TURNS)
    sampling = Sampling(max_tokens=64, temperature=0.7, top_k=5, stop=["###"], seed=3)
    trajectory = await foreign_session(chat, engine, Peer("A", chat, play), sampling=sampling).run()
    (used,) = engine.samplings
    assert (used["temperature"], used["top_k"], used["max_tokens"]) == (0.7, 5, 7)
    assert used["stop"] == ["###", "!"] and "seed" in used and used["stop_token_ids"] == chat.stop_token_ids
    assert trajectory.metadata["remote"]["sampling_overruled"] == {"temperature": 0.1}


# Rewards


@pytest.mark.parametrize(
    ("environment", "reported", "reward"),
    [(None, None, None), (None, 0.5, 0.5), (Five, 0.5, 1.0), (Environment, 0.5, 0.5), (Environment, None, None)],
)
async def test_whose_reward_counts(chat, environment: Any, reported: float | None, reward: float | None):
    peer = ending("B", chat, reward=reported)
    trajectory = await foreign_session(chat, scripted(chat, TWO_TURNS[1]), peer, environment=environment).run()
    assert trajectory.reward == reward and trajectory.stop_reason == "stop"


async def test_a_reward_that_no_record_can_hold_is_an_error(chat):
    trajectory = await foreign_session(chat, scripted(chat, TWO_TURNS[1]), ending("B", chat, reward=1e300)).run()
    assert trajectory.stop_reason == "error" and trajectory.reward is None
    to_table([trajectory])


class Breaking(Environment):
    closed = 0

    def reward(self, episode: Episode) -> float:
        raise KeyError("answer")

    def close(self) -> None:
        Breaking.closed += 1


async def test_an_environment_that_breaks_is_its_own_sessions_error_and_is_closed(chat):
    Breaking.closed = 0
    peer = ending("A", chat)
    trajectory = await foreign_session(chat, scripted(chat, TWO_TURNS[1]), peer, environment=Breaking).run()
    assert trajectory.stop_reason == "error" and "reward raised KeyError" in trajectory.error
    assert Breaking.closed == 1


async def test_tools_have_their_names_where_no_mask_counts_them(chat):
    for generation, named in (("A", False), ("B", True)):
        trajectory = await foreign_session(chat, scripted(chat, *TWO_TURNS), Peer(generation, chat)).run()
        assert (trajectory.messages[2].get("name") == "add") is named
        assert [record.name for record in trajectory.tool_calls] == ["add"]


async def test_what_tools_say_of_failing_is_counted(chat):
    odd = call("add", '{"c": 1}')
    engine = scripted(chat, f"{odd}{IM_END}", f"5{IM_END}")
    trajectory = await foreign_session(chat, engine, Peer("A", chat)).run()
    (record,) = trajectory.tool_calls
    assert (record.name, record.ok, record.error) == ("add", False, "exception: Error: no such numbers")


# What dies and stalls


async def test_a_server_that_stalls_ends_at_the_deadline(chat):
    async def play(_: Peer, body: dict[str, Any]) -> dict[str, Any]:
        await Conversation(_, body).ask()
        await asyncio.sleep(60)
        raise AssertionError

    for generation in ("A", "B"):
        trajectory = await foreign_session(
            chat, scripted(chat, TWO_TURNS[1]), Peer(generation, chat, play), session_seconds=0.1
        ).run()
        assert trajectory.stop_reason == "deadline" and "longer than 0.1 s" in trajectory.error
        assert trajectory.num_sampled > 0


async def test_a_server_that_fails_before_a_token_may_be_tried_again(chat):
    for generation in GENERATIONS:
        peer = Peer(generation, chat)
        peer.answers = [httpx.Response(500, text="boom")]
        trajectory = await foreign_session(chat, scripted(chat), peer).run()
        assert trajectory.stop_reason == "error" and "remote_died" in trajectory.error and trajectory.retryable
        peer.answers = [httpx.Response(400, text="no")]
        trajectory = await foreign_session(chat, scripted(chat), peer).run()
        assert trajectory.stop_reason == "error" and not trajectory.retryable


async def test_a_server_that_dies_after_a_token_costs_the_session(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        await Conversation(peer, body).ask()
        raise httpx.ReadError("reset")

    trajectory = await foreign_session(chat, scripted(chat, TWO_TURNS[1]), Peer("A", chat, play)).run()
    assert trajectory.stop_reason == "error" and "went away" in trajectory.error
    assert trajectory.num_sampled > 0 and not trajectory.retryable


async def test_an_engine_that_dies_may_be_asked_again(chat):
    turns = [EngineDied("gone"), say(chat, TWO_TURNS[1])]
    engine = ScriptedEngine(lambda _prompt, _session, turn: turns[turn])

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(EngineDied):
            await peer.call(body["rollout_id"], messages=body["messages"])
        await peer.call(body["rollout_id"], messages=body["messages"])
        return end(body)

    trajectory = await foreign_session(chat, engine, Peer("A", chat, play)).run()
    assert trajectory.stop_reason == "stop" and trajectory.num_sampled == len(ids(chat, TWO_TURNS[1]))


async def test_a_server_that_gives_up_over_a_dead_engine_is_not_blamed(chat):
    engine = ScriptedEngine(lambda *_: EngineDied("gone"))

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(EngineDied):
            await peer.call(body["rollout_id"], messages=body["messages"])
        return end(body, status="ERROR", error_message="503")

    trajectory = await foreign_session(chat, engine, Peer("A", chat, play)).run()
    assert trajectory.error == "engine_died: gone" and trajectory.retryable


async def test_an_engine_that_is_too_slow_ends_as_deadline(chat):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(EngineTimeout):
            await peer.call(body["rollout_id"], messages=body["messages"])
        await asyncio.sleep(60)
        raise AssertionError

    engine = scripted(chat, *TWO_TURNS, delay=60.0)
    trajectory = await foreign_session(chat, engine, Peer("B", chat, play), engine_seconds=0.05).run()
    assert trajectory.stop_reason == "deadline" and "engine_timeout" in trajectory.error


async def test_a_session_may_be_cancelled(chat):
    started = asyncio.Event()

    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        await Conversation(peer, body).ask()
        started.set()
        await asyncio.sleep(60)
        raise AssertionError

    for generation in ("A", "B"):
        started.clear()
        session = foreign_session(chat, scripted(chat, TWO_TURNS[1]), Peer(generation, chat, play))
        task = asyncio.create_task(session.run())
        await started.wait()
        task.cancel()
        trajectory = await task
        assert trajectory.stop_reason == "cancelled" and trajectory.num_sampled > 0


async def test_a_task_that_the_protocol_cannot_say_is_named(chat):
    for generation, field in (("A", "messages"), ("B", "metadata")):
        peer = Peer(generation, chat)
        session = foreign_session(
            chat,
            scripted(chat),
            peer,
            messages=[{"role": "developer" if generation == "A" else "user", "content": "x"}],
            data={"blob": "x" * 2**20},
        )
        trajectory = await session.run()
        assert trajectory.stop_reason == "error" and f"protocol: {field}" in trajectory.error
        assert peer.bodies == []
