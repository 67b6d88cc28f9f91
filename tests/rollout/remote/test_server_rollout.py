"""Whole rollouts for a trainer, with the demo model's real tokenizer on both sides."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from rollout.environment import Environment
from rollout.limits import Limits
from rollout.remote.order import RolloutOrder
from rollout.remote.server_rollout import NOT_RUN, answered, play, tool_specs
from rollout.remote.tokenizers import Tokenizers
from rollout.remote.wire import InitRequest, RolloutRequest, RolloutResponse
from rollout.rendering import ChatRenderer
from rollout.tools import tool
from tests.rollout.remote.scripted_trainer import IM_END, URL, ScriptedTrainer
from tests.rollout.sessions import Adder, add, call

TWO_TURNS = (call("add", '{"a": 2, "b": 3}') + IM_END, "It is 5." + IM_END)
ADD = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}


class Plain(Adder):
    """Without a system prompt of its own."""

    system_prompt = None


def order(generation: str = "A", **fields: Any) -> RolloutOrder:
    body = {"rollout_id": "r", "server_url": URL, "messages": [{"role": "user", "content": "2+3?"}], **fields}
    if generation == "B":
        return RolloutOrder.of(InitRequest.model_validate({"completion_params": {}, **body}))
    return RolloutOrder.of(RolloutRequest.model_validate(body))


async def played(
    chat: ChatRenderer,
    trainer: ScriptedTrainer,
    wanted: RolloutOrder | None = None,
    environment: Callable[[], Environment] = Plain,
    limits: Limits | None = None,
) -> RolloutResponse:
    wanted = wanted or order()
    return await play(
        wanted,
        environment=environment,
        limits=limits or Limits(),
        tokenizers=Tokenizers(chat, {"demo": None}, {}),
        client=lambda: trainer.client(wanted.generation, api_key=wanted.api_key),
    )


async def test_a_rollout_with_a_tool_and_its_masks(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    response = await played(chat, trainer, order(callback_api_key="k", sampling_params={"logprobs": 0}))
    assert response.error_message is None and trainer.refusals == []
    assert (response.status, response.finish_reason) == ("COMPLETED", "stop")
    first, second = trainer.calls
    assert first["response_mask"] is None and set(second["response_mask"]) == {0}
    assert first["logprobs"] is True and first["max_tokens"] == 512
    assert [message["role"] for message in response.final_messages] == ["user", "assistant", "tool", "assistant"]
    assert response.final_messages[1]["odd"] == 0, "an assistant message stays exactly as it came"
    assert response.final_messages[2]["content"] == "5"
    assert second["messages"] == response.final_messages[:3]
    assert {headers["authorization"] for headers in trainer.headers} == {"Bearer k"}
    metrics = response.metrics
    assert metrics is not None
    assert (metrics.num_llm_calls, metrics.num_tool_calls) == (2, 1)
    assert metrics.total_latency_ms > 0 and metrics.llm_latency_ms > 0
    sampled = [len(chat.tokenizer.encode(turn, add_special_tokens=False)) for turn in TWO_TURNS]
    assert metrics.response_tokens == sum(sampled)
    assert metrics.max_context_tokens > metrics.prompt_tokens / 2
    assert "reward" not in response.body("A")


async def test_a_trainer_whose_template_shows_the_tools(chat: ChatRenderer):
    specs = await tool_specs(Plain, None)
    trainer = ScriptedTrainer(chat, *TWO_TURNS, tools=specs)
    response = await played(chat, trainer)
    assert (response.status, trainer.refusals) == ("COMPLETED", [])


async def test_a_trainer_that_renders_the_history_anew(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS, anew=True)
    response = await played(chat, trainer)
    assert (response.status, trainer.refusals) == ("COMPLETED", []), response.error_message


async def test_an_end_of_turn_that_was_not_sampled_counts_as_added(chat: ChatRenderer):
    whole, cut = ScriptedTrainer(chat, *TWO_TURNS), ScriptedTrainer(chat, TWO_TURNS[0][: -len(IM_END)], TWO_TURNS[1])
    for trainer in (whole, cut):
        assert (await played(chat, trainer)).status == "COMPLETED"
    assert len(cut.calls[1]["response_mask"]) == len(whole.calls[1]["response_mask"]) + 1


async def test_tool_calls_as_fields_of_the_message(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS, tool_calls=[[ADD]])
    response = await played(chat, trainer)
    assert response.status == "COMPLETED", response.error_message
    assert response.final_messages[1] == {"role": "assistant", "content": None, "tool_calls": [ADD]}
    assert response.final_messages[2]["tool_call_id"] == "c1" and response.final_messages[2]["content"] == "5"


async def test_arguments_as_an_object_and_calls_that_are_none(chat: ChatRenderer):
    calls = [
        {"id": "a", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}},
        {"function": {"arguments": "{}"}},
        "nonsense",
        {"id": "d", "function": {"name": "add", "arguments": "{"}},
    ]
    trainer = ScriptedTrainer(chat, *TWO_TURNS, tool_calls=[calls])
    response = await played(chat, trainer, order("B"))
    told = [message["content"] for message in response.final_messages if message["role"] == "tool"]
    assert told[0] == "2" and all(text.startswith("Error: ") for text in told[1:]) and len(told) == 4


async def test_generation_b_reports_a_reward_and_sends_no_mask(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS, tool_calls=[[ADD]], tokens=False)
    response = await played(chat, trainer, order("B", completion_params={"top_k": 4, "max_tokens": 77, "stop": None}))
    assert response.status == "COMPLETED" and response.reward == 1.0
    assert all("response_mask" not in sent and "stop" not in sent for sent in trainer.calls)
    assert trainer.calls[0]["top_k"] == 4 and trainer.calls[0]["max_tokens"] == 77
    assert trainer.paths == ["/v1/chat/completions"] * 2
    assert response.metrics is not None and response.metrics.response_tokens > 0, "from usage"


async def test_generation_b_reads_tool_calls_that_came_as_text(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS, tokens=False)
    response = await played(chat, trainer, order("B"))
    assert [message["role"] for message in response.final_messages] == ["user", "assistant", "tool", "assistant"]


async def test_a_trainer_with_the_other_path_alone(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    trainer.statuses = [404]
    response = await played(chat, trainer)
    assert response.status == "COMPLETED"
    assert trainer.paths == ["/v1/completions", "/v1/chat/completions", "/v1/chat/completions"]


def _other_prompt(answer: dict[str, Any]) -> dict[str, Any]:
    prompt = list(answer["prompt_token_ids"])
    prompt[3] += 1
    return {**answer, "prompt_token_ids": prompt}


def _later(twist: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: answer if answer["id"] == "c0" else twist(answer)


def _without(field: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: {key: value for key, value in answer.items() if key != field}


@pytest.mark.parametrize(
    ("twist", "category", "told"),
    [
        (_other_prompt, "tokenizer_error", "position 3"),
        (_later(_other_prompt), "tokenizer_error", "position 3"),
        (
            _later(lambda answer: {**answer, "prompt_token_ids": [*answer["prompt_token_ids"], 5]}),
            "tokenizer_error",
            "counted",
        ),
        (_without("token_ids"), "trainer_error", "token_ids"),
        (_without("prompt_token_ids"), "trainer_error", "prompt_token_ids"),
        (lambda answer: {**answer, "logprobs": [-0.5]}, "trainer_error", "log-probabilities"),
        (lambda answer: {**answer, "logprobs": [5.0] * len(answer["token_ids"])}, "trainer_error", "probability"),
        (lambda answer: {**answer, "choices": "secret words"}, "trainer_error", "form: choices"),
    ],
)
async def test_tokens_that_do_not_fit_end_the_rollout(chat: ChatRenderer, twist: Any, category: str, told: str):
    response = await played(chat, ScriptedTrainer(chat, *TWO_TURNS, twist=twist))
    assert response.status == "ERROR" and response.extra_fields["error_category"] == category
    assert told in (response.error_message or "") and "secret" not in (response.error_message or "")
    assert response.body("A")["finish_reason"] is None


class Rewriting:
    """A chat format whose template changes the past."""

    def __init__(self, chat: ChatRenderer) -> None:
        self._chat = chat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat, name)

    async def run(self, size: int, work: Any) -> Any:
        return work(self)

    def render(self, messages: Any, tools: Any) -> list[int]:
        ids = self._chat.render(messages, tools)
        return ids if len(messages) == 1 else [ids[0] + 1, *ids[1:]]

    def extend(self, *arguments: Any) -> None:
        return None


async def test_a_template_that_changes_the_past_has_no_mask(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    response = await played(Rewriting(chat), trainer)  # type: ignore[arg-type]
    assert response.extra_fields["error_category"] == "tokenizer_error"
    assert "past" in (response.error_message or "") and len(trainer.calls) == 1
    assert response.final_messages[-1]["role"] == "tool"


@pytest.mark.parametrize(
    ("statuses", "category"),
    [([422], "trainer_client_error"), ([500] * 4, "trainer_server_error"), ([429] * 4, "rate_limited")],
)
async def test_a_trainer_that_fails(chat: ChatRenderer, statuses: list[int | Exception], category: str):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    trainer.statuses = list(statuses)
    response = await played(chat, trainer)
    assert response.extra_fields["error_category"] == category
    assert response.final_messages == [{"role": "user", "content": "2+3?"}]


async def test_a_trainer_that_does_not_answer_in_the_rollouts_time(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)

    async def hang(request: Any) -> Any:
        await asyncio.sleep(60)

    trainer.handle = hang  # type: ignore[method-assign]
    response = await played(chat, trainer, limits=Limits(session_seconds=0.05))
    assert response.status == "ERROR" and response.extra_fields["stop_reason"] == "deadline"
    assert "longer than" in (response.error_message or "")


async def test_the_orders_turns_and_tokens_count_also_where_the_environment_has_limits(chat: ChatRenderer):
    class Strict(Plain):
        limits = Limits(max_turns=500, max_response_tokens=500_000)

    response = await played(chat, ScriptedTrainer(chat, *TWO_TURNS), order(max_turns=1), Strict)
    assert (response.status, response.finish_reason) == ("COMPLETED", "max_turns")
    assert response.final_messages[-1]["role"] == "tool", "the last turn's calls are answered"
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    response = await played(chat, trainer, order(max_tokens_total=30), Strict)
    assert (response.status, response.finish_reason) == ("COMPLETED", "max_tokens")
    assert trainer.calls[0]["max_tokens"] == 30 and len(trainer.calls) == 1


async def test_a_turn_that_was_cut_stays_and_its_calls_are_answered(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS, tool_calls=[[ADD]], finish="length")
    response = await played(chat, trainer)
    assert (response.status, response.finish_reason) == ("COMPLETED", "max_tokens")
    assert response.final_messages[1]["tool_calls"] == [ADD]
    assert response.final_messages[2] == {
        "role": "tool",
        "content": NOT_RUN,
        "tool_call_id": "c1",
        "name": "add",
    }


def test_answered_calls_are_left_alone():
    said = {"role": "assistant", "content": None, "tool_calls": [ADD]}
    result = {"role": "tool", "content": "5", "tool_call_id": "c1"}
    assert answered([said, result]) == [said, result]
    assert answered([said, result, said])[3]["content"] == NOT_RUN
    assert answered([]) == []


async def test_the_environments_system_prompt_gives_way_to_the_trainers(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    await played(chat, trainer, environment=Adder)
    assert trainer.calls[0]["messages"][0] == {"role": "system", "content": "Add."}
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    messages = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "2+3?"}]
    await played(chat, trainer, order(messages=messages), Adder)
    assert trainer.calls[0]["messages"] == messages


async def test_metadata_is_what_the_environment_scores_with(chat: ChatRenderer):
    seen: list[Any] = []

    class Keen(Plain):
        async def setup(self, task: Any) -> None:
            seen.append((task.task_id, task.data))

    await played(chat, ScriptedTrainer(chat, *TWO_TURNS), order(metadata={"answer": 5}, tool_server_url="x"), Keen)
    assert seen == [("r", {"answer": 5, "tool_server_url": "x"})]


class Broken(Plain):
    """Fails with words that are nobody's business."""

    async def setup(self, task: Any) -> None:
        raise RuntimeError("password hunter2 in /etc/secret")


def _unloadable() -> Environment:
    raise RuntimeError("hunter2")


@pytest.mark.parametrize("environment", [Broken, _unloadable])
async def test_what_fails_here_is_told_without_its_words(
    chat: ChatRenderer, environment: Any, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    response = await played(chat, ScriptedTrainer(chat, *TWO_TURNS), environment=environment)
    assert response.status == "ERROR" and response.extra_fields["error_category"] == "internal_error"
    assert "hunter2" not in response.model_dump_json()
    assert "hunter2" in caplog.text, "whoever runs the server reads why"


@pytest.mark.parametrize("odd", [{"w": float("nan")}, {"w": {1}}, {"content": "a\ud83d"}, {"role": "robot"}])
@pytest.mark.parametrize("generation", ["A", "B"])
async def test_a_reply_that_cannot_be_sent_ends_the_rollout_and_not_the_answer(
    chat: ChatRenderer, odd: dict[str, Any], generation: str
):
    class Odd(Plain):
        async def reply(self, episode: Any) -> list[dict[str, Any]]:
            return [{"role": "user", "content": "go on", **odd}]

    trainer = ScriptedTrainer(chat, "5" + IM_END, "6" + IM_END)
    response = await played(chat, trainer, order(generation), Odd)
    assert response.status == "ERROR" and len(trainer.calls) == 1
    assert response.extra_fields["error_category"] in ("internal_error", "tokenizer_error")
    assert "completion_params" not in (response.error_message or "")
    json.dumps(response.body("B"), allow_nan=False, ensure_ascii=False).encode()
    assert [message["content"] for message in response.final_messages[:2]] == ["2+3?", "5"]


async def test_a_name_of_a_tool_that_is_no_unicode_goes_to_no_trainer(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, call("\\ud83d", "{}") + IM_END, "It is 5." + IM_END)
    response = await played(chat, trainer, order("B"))
    assert (response.status, len(trainer.calls)) == ("COMPLETED", 2), response.error_message
    assert response.final_messages[2]["role"] == "tool" and response.final_messages[2]["name"] == "?"


async def test_a_rollout_that_is_cancelled_answers_too(chat: ChatRenderer):
    begun = asyncio.Event()

    @tool
    async def wait() -> str:
        """Wait."""
        begun.set()
        await asyncio.sleep(60)
        return ""

    class Slow(Plain):
        tools = (add, wait)

    trainer = ScriptedTrainer(chat, call("wait", "{}") + IM_END)
    task = asyncio.create_task(played(chat, trainer, environment=Slow))
    await begun.wait()
    task.cancel()
    response = await task
    assert response.status == "ERROR" and response.error_message == "the rollout was cancelled by the rollout server"


async def test_a_tokenizer_that_is_not_listed_is_an_answer_and_no_call(chat: ChatRenderer):
    trainer = ScriptedTrainer(chat, *TWO_TURNS)
    response = await played(chat, trainer, order(tokenizer_name="evil/repo"))
    assert response.extra_fields["error_category"] == "tokenizer_error" and trainer.paths == []
    assert "tokenizers" in (response.error_message or "")
    response = await played(chat, trainer, order(tokenizer_name="demo"))
    assert response.status == "COMPLETED"


async def test_tools_are_listed_from_an_environment_that_is_closed_again():
    closed: list[bool] = []

    class Closing(Plain):
        def close(self) -> None:
            closed.append(True)

    specs = await tool_specs(Closing, None)
    assert [spec["function"]["name"] for spec in specs] == ["add", "negate"]
    assert closed == [True]
