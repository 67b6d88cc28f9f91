"""The served side on the real cluster: the official clients at the cluster's one address."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from cluster.state import ClusterState
from examples.calculator.conversations import SYSTEM_PROMPT, TOOLS
from rollout import Batch, Task
from rollout.errors import ConflictError, RefusedError
from tests.conftest import ROOT
from tests.integration.test_deaths import processes_called

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300, func_only=True)]

MODEL = "model"
QUESTION = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is 47 + 182?"}]
CHECKPOINT = ROOT / "examples" / "calculator" / "model"


@pytest.fixture
def chat(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def busy_seconds(cluster: ClusterState) -> float:
    """How much the ranks work in one second, all together."""
    ranks = processes_called(cluster, "VLLM::Worker")
    before = sum(sum(rank.cpu_times()[:2]) for rank in ranks)
    time.sleep(1.0)
    return sum(sum(rank.cpu_times()[:2]) for rank in ranks) - before


# OpenAI's and Anthropic's clients


def test_a_chat_with_tools_and_reasoning(chat):
    answer = chat.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, temperature=0, max_tokens=100)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 47, "b": 182}
    assert choice.message.reasoning.strip() == "add 47 and 182" and not (choice.message.content or "").strip()
    details = answer.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_a_whole_answer(chat):
    wanted = {"model": MODEL, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 100, "seed": 1}
    whole = chat.chat.completions.create(**wanted).choices[0]
    chunks = list(chat.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas).strip() == (whole.message.content or "").strip()
    arguments = "".join(
        call.function.arguments or "" for delta in deltas for call in delta.tool_calls or [] if call.function
    )
    assert arguments == "".join(call.function.arguments for call in whole.message.tool_calls or [])
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert reasons == [whole.finish_reason]


def test_several_choices_logprobs_stop_and_a_schema(chat):
    many = chat.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, max_tokens=8, logprobs=True, top_logprobs=2, seed=5
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert all(len(position.top_logprobs) == 2 for position in many.choices[0].logprobs.content)
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    shaped = chat.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give a sum."}],
        max_tokens=60,
        temperature=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
    )
    assert '"sum"' in (shaped.choices[0].message.content or "") + str(shaped.choices[0].message.model_extra)


def test_a_stop_sequence_ends_the_answer_before_it(chat):
    wanted = {"model": MODEL, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 100}
    free = chat.chat.completions.create(**wanted).choices[0]
    stopped = chat.chat.completions.create(**wanted, stop=["and 1"]).choices[0]
    assert "and 1" in free.message.reasoning and free.stop_reason is None
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "and 1")
    assert stopped.message.reasoning.strip() == free.message.reasoning.partition("and 1")[0].strip()


def test_errors_come_in_openais_form(chat, address):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat.chat.completions.create(model="another", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        chat.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match=r"context length|maximum"):
        chat.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "1 " * 3000}])
    for content in ("{", '{"model": 5}', "[]"):
        answer = httpx.post(
            f"{address}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (400, 422) and answer.json()["error"]["message"]


def test_responses_messages_tokenize_and_models(chat, address):
    assert chat.models.list().data[0].id == MODEL
    assert chat.responses.create(model=MODEL, input="What is 3 + 4?", max_output_tokens=16).output
    claude = anthropic.Anthropic(base_url=address, api_key="none")
    answer = claude.messages.create(model=MODEL, max_tokens=16, messages=[{"role": "user", "content": "Hello"}])
    assert answer.usage.output_tokens <= 16 and answer.content
    tokens = httpx.post(f"{address}/tokenize", json={"model": MODEL, "prompt": "12 + 30"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0


def test_what_is_vllms_own_business_is_not_served(address):
    for path in (
        "/metrics",
        "/v1/load_lora_adapter",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/inference/v1/generate",
    ):
        assert httpx.post(f"{address}{path}", json={}).status_code in (404, 405)


def test_correlation_ids_are_kept_or_made(address):
    mine = str(uuid.uuid4())
    for path in ("/v1/models", "/v1/runs"):
        assert httpx.get(f"{address}{path}", headers={"X-Correlation-ID": mine}).headers["x-correlation-id"] == mine
        made = httpx.get(f"{address}{path}", headers={"X-Correlation-ID": "no uuid"}).headers["x-correlation-id"]
        assert uuid.UUID(made)


def test_a_client_that_goes_away_stops_the_engine(address, cluster):
    """A long generation is dropped by its client; the ranks fall idle long before it would have ended."""

    async def go() -> float:
        body = {"model": MODEL, "prompt": "1", "max_tokens": 1000, "min_tokens": 1000, "stream": True, "n": 16}
        async with httpx.AsyncClient(timeout=60) as http:
            started = time.monotonic()
            async with http.stream("POST", f"{address}/v1/completions", json=body) as response:
                whole = [line async for line in response.aiter_lines()]
            whole_seconds = time.monotonic() - started
            assert whole[-2] == "data: [DONE]" or "data: [DONE]" in whole
            async with http.stream("POST", f"{address}/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
        return whole_seconds

    whole_seconds = asyncio.run(go())
    time.sleep(1.0)
    busy = busy_seconds(cluster)
    assert whole_seconds > 2.5, "the generation must be long for this to mean anything"
    assert busy < 0.3, f"the ranks worked for {busy:.2f} s of a second after their client had gone"


# Loading progress


def test_who_comes_after_loading_gets_the_state_and_the_end(address):
    with httpx.stream("GET", f"{address}/v1/loading/progress", timeout=30) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    events = [json.loads(line) for line in data[:-1]]
    assert events[-1]["stage"] == "ready"
    ranks = {e["rank"]: e for e in events if e["stage"] == "loading_to_vram"}
    assert set(ranks) == {0, 1}, "both ranks of TP=2"
    for event in ranks.values():
        assert event["layers_loaded"] == event["layers_total"] == 4
        assert event["bytes_read"] == event["bytes_total"] > 3_000_000 and event["vram_mb"] > 1


# The seed's inference stream


def test_an_inference_stream(address):
    body = {"job_id": "j1", "prompt": "1 2 3", "max_tokens": 6, "temperature": 0.0}
    with httpx.stream("POST", f"{address}/v1/inference", json=body, timeout=30) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in data[:-1]]
    assert data[-1] == "[DONE]" and events[0]["event"] == "started" and events[0]["job_id"] == "j1"
    tokens = [event for event in events if event["event"] == "token"]
    assert [event["i"] for event in tokens] == list(range(len(tokens)))
    assert events[-1]["event"] == "end" and events[-1]["stop_reason"] in ("max_tokens", "eos")
    bad = httpx.post(f"{address}/v1/inference", json={"job_id": "", "max_tokens": 0})
    assert bad.status_code == 400 and len(bad.json()["errors"]) >= 3


# Agents


def test_the_environment_is_an_agent(address):
    listed = httpx.get(f"{address}/agents").json()
    (agent,) = listed["agents"] if isinstance(listed, dict) else listed
    assert agent["name"] == "calculator" and {tool["name"] for tool in agent["tools"]} >= {"add", "divide"}
    assert SYSTEM_PROMPT not in json.dumps(listed)
    client = openai.OpenAI(base_url=f"{address}/agents/calculator/v1", api_key="none", max_retries=0)
    question = [{"role": "user", "content": "What is 47 + 182?"}]
    whole = [client.chat.completions.create(model="calculator", messages=question) for _ in range(6)]
    # This model writes no <think> in its last turn, which vLLM's parser takes for reasoning.
    said = [f"{m.content} {m.model_extra.get('reasoning')}" for m in (answer.choices[0].message for answer in whole)]
    assert any("229" in text for text in said), "the tool's result came back"
    assert all(not answer.choices[0].message.tool_calls for answer in whole), "its own tools are no client's"
    chunks = list(client.chat.completions.create(model="calculator", messages=question, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


# Captured sessions


def test_black_box_agents_become_trajectories(client, http_client, captured):
    """Chat turn by turn, streamed and not, and Anthropic's client: each sampled token trains once."""
    task = Task(task_id="t", messages=[{"role": "user", "content": "captured"}])
    first = http_client.open_session(captured, task)
    agent = openai.OpenAI(base_url=first.base_url, api_key=first.api_key, max_retries=0)
    history = list(QUESTION)
    answer = agent.chat.completions.create(model=MODEL, messages=history, max_tokens=40)
    forced = {"min_tokens": 24, "ignore_eos": True}
    again = agent.chat.completions.create(
        model=MODEL, messages=history, max_tokens=24, stream=True, extra_body=forced
    )
    assert len(list(again)) > 2
    done = http_client.close_session(first.session_id, 1.0)
    assert done.state == "closed" and len(done.calls) == 2 and done.segments == 2 and done.reward == 1.0
    second = http_client.open_session(captured, task)
    assert second.trajectory_id != first.trajectory_id
    with pytest.raises(ConflictError, match="all 2 samples"):
        http_client.open_session(captured, task)
    claude = anthropic.Anthropic(base_url=second.anthropic_base_url, api_key=second.api_key, max_retries=0)
    said = claude.messages.create(model=MODEL, max_tokens=16, messages=[{"role": "user", "content": "Hello"}])
    http_client.close_session(second.session_id, 0.0)
    batch = client.lease(captured, 1, timeout=20)
    assert isinstance(batch, Batch)
    rows = batch.table.to_pylist()
    client.acknowledge(batch)
    assert {row["reward"] for row in rows} == {0.0, 1.0} and {row["error"] for row in rows} == {None}
    sampled = [sum(row["response_mask"]) for row in rows if row["trajectory_id"] == first.trajectory_id]
    assert sum(sampled) == answer.usage.completion_tokens + 24
    (other,) = (row for row in rows if row["trajectory_id"] == second.trajectory_id)
    assert sum(other["response_mask"]) == said.usage.output_tokens
    for row in rows:
        pairs = zip(row["response_mask"], row["logprobs"], row["policy_versions"], strict=True)
        assert all((logprob <= 0 and version >= 0) if mask else version == -1 for mask, logprob, version in pairs)
        assert json.loads(row["messages"])[-1]["role"] == "assistant"


def test_a_conversation_that_is_continued_token_by_token_is_one_segment(http_client, client, captured):
    task = Task(task_id="long", messages=[{"role": "user", "content": "captured"}])
    session = http_client.open_session(captured, task)
    http = httpx.Client(base_url=session.base_url, headers={"authorization": f"Bearer {session.api_key}"}, timeout=60)
    body = {"model": MODEL, "max_tokens": 12, "min_tokens": 12, "return_token_ids": True}
    first = http.post("/completions", json={**body, "prompt": [5, 6, 7, 8]}).json()["choices"][0]
    longer = [*first["prompt_token_ids"], *first["token_ids"], 9, 10]
    http.post("/completions", json={**body, "prompt": longer}).raise_for_status()
    closed = http_client.close_session(session.session_id, 0.5)
    assert closed.segments == 1 and closed.tokens == 24
    assert http.post("/completions", json={**body, "prompt": [5]}).status_code == 410, (
        "a closed session takes no calls"
    )
    assert http_client.session_info(session.session_id).state == "closed"


def test_a_session_serves_the_models_paths_alone(http_client, client, captured, address):
    session = http_client.open_session(captured)
    base = f"{address}/v1/sessions/{session.session_id}/api"
    assert httpx.get(f"{base}/v1/models").status_code == 200
    assert httpx.get(f"{base}/v1/runs").status_code == 404
    unknown = httpx.post(f"{address}/v1/sessions/none/api/v1/completions", json={"model": MODEL, "prompt": "1"})
    assert unknown.status_code == 404 and "no session" in unknown.json()["error"]["message"]
    stolen = httpx.post(
        f"{address}/v1/completions", json={"model": MODEL, "prompt": "1", "max_tokens": 1},
        headers={"x-rollout-session": session.session_id},
    )  # fmt: skip
    assert stolen.status_code == 200
    assert http_client.close_session(session.session_id, cancel=True).calls == [], "the header is nobody's to write"
    other = client.create_run(name=f"played-{uuid.uuid4().hex[:6]}", environment={"path": "playgrounds:Talk"}).run
    with pytest.raises(RefusedError, match="captured"):
        http_client.open_session(other)
    client.forget(other)


# Weights


def test_newer_weights_serve_newer_answers_at_once(client, chat, tmp_path: Path):
    """Greedy answers follow the weights, whatever the prefix cache holds of the older ones."""
    import shutil

    from safetensors.torch import load_file, save_file

    wanted = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 30, "logprobs": True}
    before = chat.chat.completions.create(**wanted).choices[0].logprobs.content
    changed = tmp_path / "changed"
    shutil.copytree(CHECKPOINT, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    client.update_weights(changed)
    after = chat.chat.completions.create(**wanted).choices[0].logprobs.content
    client.update_weights(CHECKPOINT)
    back = chat.chat.completions.create(**wanted).choices[0].logprobs.content
    assert [p.logprob for p in before] != [p.logprob for p in after]
    assert [p.logprob for p in before] == pytest.approx([p.logprob for p in back], abs=0.02)
