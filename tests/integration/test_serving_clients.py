"""Official clients against the real engine: streams piece by piece, forced and parallel tools, reasoning, capture."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from typing import Any

import anthropic
import httpx
import openai
import pytest

from examples.calculator.conversations import SYSTEM_PROMPT, TOOLS
from rollout import Batch, Task
from tests import openai_chunks
from tests.integration.test_serving import MODEL, QUESTION, busy_seconds

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300, func_only=True)]

TWO = "Calculate both 81 + 40 and 388 + 973."
TWO_QUESTIONS = [QUESTION[0], {"role": "user", "content": TWO}]
TWO_CALLS = [("add", {"a": 81, "b": 40}), ("add", {"a": 388, "b": 973})]
# The answer is there already: left alone, the model says it and calls nothing.
ANSWERED = [
    *QUESTION,
    {"role": "assistant", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 47, "b": 182}'}}
    ]},
    {"role": "tool", "tool_call_id": "c1", "content": "229"},
]  # fmt: skip
# The grammar of a forced call is applied where reasoning has ended, which is here at once.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 100}
CLAUDE_TOOLS = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (tool["function"] for tool in TOOLS)
]
RESPONSES_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def chat(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(address):
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


# OpenAI's streams, chunk by chunk

USAGE = {"stream_options": {"include_usage": True}}
STREAMS = {
    "reasoning and a tool": {"tools": TOOLS, **USAGE},
    "two tools": {"messages": TWO_QUESTIONS, "tools": TOOLS},
    "a forced tool": {
        "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "multiply"}},
        "parallel_tool_calls": False, **NO_THINKING,
    },
    "text": {"messages": ANSWERED, **NO_THINKING, **USAGE},
    "a schema": {"response_format": {"type": "json_object"}, "max_tokens": 12, **NO_THINKING},
    "choices with log-probabilities": {
        "n": 2, "logprobs": True, "top_logprobs": 2, "temperature": 1, "seed": 3, "max_tokens": 12, **USAGE,
    },
    "token ids": {"return_token_ids": True},
    "no reasoning shown": {"tools": TOOLS, "include_reasoning": False, "return_token_ids": True, **USAGE},
    "usage as it grows": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "cut": {"max_tokens": 4},
}  # fmt: skip


CALLS = {"reasoning and a tool": 1, "two tools": 2, "a forced tool": 1, "no reasoning shown": 1}


@pytest.mark.parametrize("name", STREAMS)
def test_every_chunk_fits_openais_schema(address, name: str):
    body = {**GREEDY, "messages": QUESTION, "stream": True, **STREAMS[name]}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    given = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    chunks = openai_chunks.checked(given, openai_chunks.VLLM_FIELDS)
    assert chunks[0].id.startswith("chatcmpl-") and chunks[0].model == MODEL
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert {choice.index for choice in choices} == set(range(body.get("n", 1)))
    if "stream_options" in body:
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        counted = chunks[-1].usage
        assert counted.total_tokens == counted.prompt_tokens + counted.completion_tokens
    else:
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    if body.get("logprobs"):
        sampled = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
        assert len(sampled) == chunks[-1].usage.completion_tokens
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in sampled)
    called = openai_chunks.calls(chunks)
    assert len(called) == CALLS.get(name, 0)
    assert all(json.loads(arguments).keys() == {"a", "b"} for _, arguments in called)
    thought = "".join((choice.delta.model_extra or {}).get("reasoning") or "" for choice in choices)
    token_ids = [token for choice in choices for token in (choice.model_extra or {}).get("token_ids") or []]
    if name == "text":
        assert "".join(choice.delta.content or "" for choice in choices) and not thought
    if name == "no reasoning shown":
        assert not thought and not token_ids, "which would tell it"
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0, "it was there all the same"
    if name == "token ids":
        assert thought and token_ids and given[0]["prompt_token_ids"]


# Which tool, and how many


def asked(chat: openai.OpenAI, streamed: bool, **wanted: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """finish_reason, content and calls of one answer."""
    wanted = {**GREEDY, "tools": TOOLS, **wanted}
    if not streamed:
        (choice,) = chat.chat.completions.create(**wanted).choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        reason, content = choice.finish_reason, choice.message.content
    else:
        chunks = list(chat.chat.completions.create(**wanted, stream=True))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        calls = openai_chunks.calls(chunks)
        reason, content = choices[-1].finish_reason, "".join(choice.delta.content or "" for choice in choices)
    return reason, content or "", [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_choice_decides_whether_and_which(chat, streamed: bool):
    # Without its reasoning shown, a forced call is forced from the first token on.
    told = {"messages": ANSWERED, "extra_body": {"include_reasoning": False}, "max_tokens": 60}
    for choice in ("auto", "none"):
        assert asked(chat, streamed, **told, tool_choice=choice) == ("stop", "", []), "left alone, it has its answer"
    # One call each: this model, once it is forced to, may go on calling until its tokens are spent.
    told["parallel_tool_calls"] = False
    reason, _, calls = asked(chat, streamed, **told, tool_choice="required")
    ((name, arguments),) = calls
    assert reason == "tool_calls"
    assert name in {tool["function"]["name"] for tool in TOOLS} and arguments.keys() == {"a", "b"}
    for name in ("multiply", "subtract"):
        named = {"type": "function", "function": {"name": name}}
        reason, _, calls = asked(chat, streamed, **told, tool_choice=named)
        assert reason == "stop", "as OpenAI ends a call that was named"
        assert [called for called, _ in calls] == [name] and calls[0][1].keys() == {"a", "b"}


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_of_one_turn_come_together_unless_that_is_forbidden(chat, streamed: bool):
    reason, _, calls = asked(chat, streamed, messages=TWO_QUESTIONS)
    assert (reason, calls) == ("tool_calls", TWO_CALLS)
    reason, _, calls = asked(chat, streamed, messages=TWO_QUESTIONS, parallel_tool_calls=False)
    assert (reason, calls) == ("tool_calls", TWO_CALLS[:1])


def test_a_tool_that_was_not_brought_cannot_be_chosen(chat):
    named = {"type": "function", "function": {"name": "fly"}}
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        chat.chat.completions.create(**GREEDY, messages=QUESTION, tools=TOOLS, tool_choice=named)


# Anthropic's client

# Its types have no temperature any more; the API has.
CLAUDE = {
    "model": MODEL, "max_tokens": 100, "system": SYSTEM_PROMPT, "messages": [QUESTION[1]],
    "extra_body": {"temperature": 0},
}  # fmt: skip


def test_anthropics_client_thinks_and_calls_streamed_and_not(claude):
    wanted = {**CLAUDE, "tools": CLAUDE_TOOLS}
    whole = claude.messages.create(**wanted)
    with claude.messages.stream(**wanted) as stream:
        events = list(stream)
        final = stream.get_final_message()
    for answer in (whole, final):
        # The blank lines between the two are a text in one of them.
        thought, *blank, call = answer.content
        assert (thought.type, call.type) == ("thinking", "tool_use")
        assert all(block.type == "text" and not block.text.strip() for block in blank)
        assert thought.thinking.strip() == "add 47 and 182" and thought.signature
        assert (call.name, call.input) == ("add", {"a": 47, "b": 182}) and call.id
        assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("tool_use", None, "assistant")
    assert (final.usage.input_tokens, final.usage.output_tokens) == (
        whole.usage.input_tokens, whole.usage.output_tokens,
    )  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and kinds.count("message_delta") == 1
    places = list(range(len(final.content)))
    for kind in ("content_block_start", "content_block_stop"):
        assert [event.index for event in events if event.type == kind] == places
    deltas = [event for event in events if event.type == "content_block_delta"]
    told = Counter((event.index, event.delta.type) for event in deltas)
    last = places[-1]
    blank = {(place, "text_delta") for place in places[1:-1]}
    assert told.keys() == {(0, "thinking_delta"), (0, "signature_delta"), (last, "input_json_delta")} | blank
    assert told[0, "thinking_delta"] > 2 and told[last, "input_json_delta"] > 2, "piece by piece"
    parts = [event.delta.partial_json for event in deltas if event.delta.type == "input_json_delta"]
    assert json.loads("".join(parts)) == {"a": 47, "b": 182}


def test_anthropics_client_gets_the_answer_to_its_tool(claude):
    """The whole conversation goes back as it came, thinking included; thinking can be turned off."""
    first = claude.messages.create(**CLAUDE, tools=CLAUDE_TOOLS)
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "229"}
    back = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    wanted = {**CLAUDE, "messages": [*CLAUDE["messages"], *back], "tools": CLAUDE_TOOLS}
    with claude.messages.stream(**wanted) as stream:
        final = stream.get_final_message()
    for answer in (claude.messages.create(**wanted), final):
        # This model writes no <think> in its last turn, which vLLM's parser takes for reasoning.
        assert [(block.type, block.thinking.strip()) for block in answer.content] == [
            ("thinking", "The answer is 229.")
        ]
        assert answer.stop_reason == "end_turn"
    unthinking = claude.messages.create(**wanted, thinking={"type": "disabled"})
    assert unthinking.content and "thinking" not in {block.type for block in unthinking.content}


def test_anthropics_tool_choice_forces_a_call(claude):
    wanted = {**CLAUDE, "tools": CLAUDE_TOOLS, "thinking": {"type": "disabled"}, "max_tokens": 60}
    for choice, names in (
        ({"type": "tool", "name": "multiply"}, {"multiply"}),
        ({"type": "any"}, {tool["name"] for tool in CLAUDE_TOOLS}),
    ):
        forced = {**wanted, "tool_choice": {**choice, "disable_parallel_tool_use": True}}
        answer = claude.messages.create(**forced)
        (call,) = answer.content
        assert call.type == "tool_use" and call.name in names and call.input.keys() == {"a", "b"}
        assert answer.stop_reason == "tool_use"
        with claude.messages.stream(**forced) as stream:
            final = stream.get_final_message()
        assert [(block.name, block.input) for block in final.content] == [(call.name, call.input)]
        assert final.stop_reason == "tool_use"
    none = claude.messages.create(**wanted, tool_choice={"type": "none"})
    assert {block.type for block in none.content} == {"text"}


def test_anthropics_client_is_told_its_errors(claude):
    with pytest.raises(anthropic.NotFoundError, match="another"):
        claude.messages.create(**{**CLAUDE, "model": "another"})
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(**{**CLAUDE, "max_tokens": 5000})


# Responses

ASKED = {
    "model": MODEL, "instructions": SYSTEM_PROMPT, "input": [QUESTION[1]], "tools": RESPONSES_TOOLS, "temperature": 0,
    "max_output_tokens": 100,
}  # fmt: skip


def test_a_streamed_response_says_the_same_as_a_whole_one(chat):
    whole = chat.responses.create(**ASKED)
    events = list(chat.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    final = events[-1].response
    for answer in (whole, final):
        assert answer.status == "completed"
        # The blank lines between the two are a message in one of them.
        thought, *blank, call = answer.output
        assert (thought.type, call.type) == ("reasoning", "function_call")
        assert all(not part.text.strip() for message in blank for part in message.content)
        assert "".join(part.text for part in thought.content).strip() == "add 47 and 182"
        assert call.name == "add" and json.loads(call.arguments) == {"a": 47, "b": 182} and call.call_id
    assert (final.usage.input_tokens, final.usage.output_tokens) == (
        whole.usage.input_tokens, whole.usage.output_tokens,
    )  # fmt: skip
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    items = [item.type for item in final.output]
    for kind in ("response.output_item.added", "response.output_item.done"):
        assert [event.item.type for event in events if event.type == kind] == items
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert len(arguments) > 2 and json.loads("".join(arguments)) == {"a": 47, "b": 182}
    assert len(thoughts) > 2 and "".join(thoughts).strip() == "add 47 and 182"


def test_a_response_calls_the_tool_that_it_must(chat):
    forced = {"tool_choice": {"type": "function", "name": "multiply"}, "parallel_tool_calls": False}
    answer = chat.responses.create(**{**ASKED, **forced})
    assert [item.name for item in answer.output if item.type == "function_call"] == ["multiply"]


# Captured sessions

# As long as the context lasts: a list that may not end before.
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 900}
CONTEXT_TOKENS = 800


def test_responses_and_messages_are_captured_and_a_client_that_leaves_stops_the_engine(
    client, http_client, captured, cluster
):
    """Their tokens are those of the record; of a stream that its client left, what had been sampled until then."""
    task = Task(task_id="apis", messages=[{"role": "user", "content": "captured"}])
    first = http_client.open_session(captured, task)
    with openai.OpenAI(base_url=first.base_url, api_key=first.api_key, max_retries=0) as agent:
        whole = agent.responses.create(**ASKED)
        streamed = list(agent.responses.create(**ASKED, stream=True))[-1].response
    second = http_client.open_session(captured, task)
    with anthropic.Anthropic(base_url=second.anthropic_base_url, api_key=second.api_key, max_retries=0) as agent:
        with agent.messages.stream(**CLAUDE, tools=CLAUDE_TOOLS) as stream:
            said = stream.get_final_message()
        endless = {
            **CLAUDE, "max_tokens": CONTEXT_TOKENS, "thinking": {"type": "disabled"},
            "output_config": {"format": {"type": "json_schema", "schema": ENDLESS}},
        }  # fmt: skip
        cut = agent.messages.create(**endless, stream=True)
        began = [event.type for event in itertools.islice(cut, 12)]
        assert began.count("content_block_delta") > 5
        cut.close()
    deadline = time.monotonic() + 20
    while len((info := http_client.session_info(second.session_id)).calls) < 2:
        assert time.monotonic() < deadline, "the call that was cut was not reported"
        time.sleep(0.1)
    # Alone on two cores, the whole would take four seconds; the ranks spin for a moment after their last step.
    time.sleep(1.0)
    assert busy_seconds(cluster) < 0.3, "nobody listens, and the ranks go on"
    after_cut = info.tokens - said.usage.output_tokens
    assert 5 < after_cut < CONTEXT_TOKENS / 2, "the engine stopped where its client left, not at the end"
    assert http_client.close_session(first.session_id, 1.0).segments == 2
    assert http_client.close_session(second.session_id, 0.0).segments == 2

    batch = client.lease(captured, 1, timeout=20)
    assert isinstance(batch, Batch)
    rows = batch.table.to_pylist()
    client.acknowledge(batch)
    sampled: dict[str, list[int]] = {first.trajectory_id: [], second.trajectory_id: []}
    for row in rows:
        sampled[row["trajectory_id"]].append(sum(row["response_mask"]))
        pairs = zip(row["response_mask"], row["logprobs"], row["policy_versions"], strict=True)
        assert all((logprob <= 0 and version >= 0) if mask else version == -1 for mask, logprob, version in pairs)
        assert row["error"] is None and row["num_segments"] == 2
        assert json.loads(row["messages"])[-1]["role"] == "assistant"
    assert sampled[first.trajectory_id] == [whole.usage.output_tokens, streamed.usage.output_tokens]
    assert sampled[second.trajectory_id] == [said.usage.output_tokens, after_cut]
    told = {row["trajectory_id"]: json.loads(row["metadata"])["capture"] for row in rows}
    assert told[first.trajectory_id]["apis"] == {"responses": 2} and "cut_turns" not in told[first.trajectory_id]
    assert told[second.trajectory_id]["apis"] == {"messages": 2}
    assert told[second.trajectory_id]["cut_turns"] == [[1, 0]]
    assert {row["stop_reason"] for row in rows if row["trajectory_id"] == second.trajectory_id} == {"length"}
    # The model thought in its first calls, and the record knows where.
    assert all(row["reasoning_spans"] for row in rows if row["trajectory_id"] == first.trajectory_id)
