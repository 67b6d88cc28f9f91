"""Plain inference without HTTP: what may be asked, and which events an engine's chunks become."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout.agents.chat_engine import ChatEngineError
from rollout.inference import InferenceRequest, infer, problems

ASKED = {"job_id": "j", "prompt": "Once", "max_tokens": 8}


class ScriptedCompletions:
    """A TEST DOUBLE of an engine: each chunk is given as it is, an exception raised, a number of seconds waited."""

    model = "qwen"

    def __init__(self, *script: Any, refusal: Exception | None = None) -> None:
        self.script = script
        self.refusal = refusal
        self.asked: list[tuple[dict[str, Any], str | None]] = []
        self.left = 0

    @asynccontextmanager
    async def open(self, body: Mapping[str, Any], correlation_id: str | None) -> AsyncIterator[AsyncIterator[Any]]:
        self.asked.append((dict(body), correlation_id))
        if self.refusal is not None:
            raise self.refusal
        try:
            async with aclosing(self._play()) as chunks:
                yield chunks
        finally:
            self.left += 1

    async def _play(self) -> AsyncGenerator[Any, None]:
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step


def chunk(
    text: str, ids: list[int] | None, finish: str | None = None, stop: str | int | None = None
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish, "stop_reason": stop}
    return {"choices": [choice if ids is None else {**choice, "token_ids": ids}]}


def wanted(**fields: Any) -> InferenceRequest:
    return InferenceRequest.model_validate_json(json.dumps({**ASKED, **fields}))


async def events(*script: Any, **options: Any) -> list[dict[str, Any]]:
    return [event async for event in infer(ScriptedCompletions(*script), wanted(), **options)]


def tokens(found: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(event["i"], event["t"]) for event in found if event["event"] == "token"]


# What may be asked


def test_what_the_engine_is_asked():
    body = wanted(temperature=0, seed=7, stop=["\n"], top_k=5).completion()
    assert body == {
        "prompt": "Once",
        "max_tokens": 8,
        "temperature": 0.0,
        "seed": 7,
        "top_p": 1.0,
        "top_k": 5,
        "repetition_penalty": 1.0,
        "stop": ["\n"],
        "min_p": 0.0,
        "return_token_ids": True,
    }
    assert "seed" not in wanted().completion(), "without a seed, vLLM samples freely"


def told(body: Any) -> dict[str, tuple[str, Any]]:
    """Constraint and value by field, of what is wrong with a body."""
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    with pytest.raises(ValidationError) as caught:
        InferenceRequest.model_validate_json(text)
    found = problems(caught.value)
    assert all(one["message"] for one in found)
    assert json.dumps(found, allow_nan=False), "it can be sent"
    return {one["field"]: (one["constraint"], one.get("value", "left out")) for one in found}


def test_all_that_is_wrong_is_told_at_once():
    body = {
        "job_id": "",
        "max_tokens": 0,
        "temperature": 2.5,
        "seed": -1,
        "top_p": 0,
        "top_k": "many",
        "repetition_penalty": 0.0,
        "stop": ["ok", ""],
        "min_p": 1.5,
        "n": 2,
    }
    assert told(body) == {
        "job_id": ("length >= 1", ""),
        "prompt": ("required", "left out"),
        "max_tokens": (">= 1", 0),
        "temperature": ("<= 2.0", 2.5),
        "seed": (">= 0", -1),
        "top_p": ("> 0.0", 0),
        "top_k": ("integer", "many"),
        "repetition_penalty": ("> 0.0", 0.0),
        "stop.1": ("length >= 1", ""),
        "min_p": ("<= 1.0", 1.5),
        "n": ("unknown", 2),
    }


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("job_id", 7, "string"),
        ("job_id", "x" * 257, "length <= 256"),
        ("prompt", "", "length >= 1"),
        ("prompt", None, "string"),
        ("max_tokens", True, "integer"),
        ("max_tokens", 1.5, "integer"),
        ("max_tokens", 2**20 + 1, "<= 1048576"),
        ("seed", 2**63, f"<= {2**63 - 1}"),
        ("temperature", -0.1, ">= 0.0"),
        ("temperature", "1", "number"),
        ("top_k", -1, ">= 0"),
        ("stop", "\n", "list of strings"),
        ("stop", ["x"] * 17, "length <= 16"),
    ],
)
def test_each_bound(field: str, value: Any, constraint: str):
    found = told({**ASKED, field: value})
    assert list(found) == [field] and found[field][0] == constraint


@pytest.mark.parametrize(
    ("text", "field", "constraint"),
    [
        ("", "", "JSON"),
        ("{", "", "JSON"),
        (b"\xff", "", "JSON"),
        ("[]", "", "object"),
        ('{"job_id": "j", "prompt": "\\ud800", "max_tokens": 1}', "", "JSON"),
        ('{"job_id": "j", "prompt": "p", "max_tokens": 1, "temperature": NaN}', "temperature", "finite"),
        ('{"job_id": "j", "prompt": "p", "max_tokens": 1, "temperature": 1e999}', "temperature", "finite"),
    ],
)
def test_bodies_that_are_no_request(text: Any, field: str, constraint: str):
    assert told(text) == {field: (constraint, "left out")}


def test_a_large_value_is_not_sent_back():
    assert told({**ASKED, "job_id": "x" * 1000})["job_id"] == ("length <= 256", "left out")


def test_the_edges_of_the_bounds_are_good():
    wanted(temperature=0, seed=0, top_p=1, top_k=0, repetition_penalty=2, stop=[], min_p=0)
    wanted(temperature=2, seed=2**63 - 1, top_p=0.001, top_k=2**31 - 1, stop=["x" * 256] * 16, min_p=1)
    wanted(seed=None, max_tokens=2**20)


# What is answered


async def test_a_completion():
    found = await events(
        chunk("On", [11]),
        chunk("ce", [12]),
        chunk("", [2], "stop"),
        {"choices": [], "usage": {"completion_tokens": 3}},
    )
    first, *_, last = found
    assert (first["event"], first["job_id"], first["model"]) == ("started", "j", "qwen")
    assert first["started_at"].startswith("20")
    assert tokens(found) == [(0, "On"), (1, "ce"), (2, "")]
    assert (last["event"], last["tokens_out"], last["stop_reason"]) == ("end", 3, "eos")


@pytest.mark.parametrize(
    ("finish", "stop", "reason"),
    [
        ("length", None, "max_tokens"),
        ("stop", None, "eos"),
        ("stop", 151645, "eos"),
        ("stop", "\n", "stop_sequence"),
        ("abort", None, "cancelled"),
        ("repetition", None, "error"),
    ],
)
async def test_why_it_stopped(finish: str, stop: Any, reason: str):
    *_, last = await events(chunk("a", [1]), chunk("", [2], finish, stop))
    assert (last["event"], last["stop_reason"], last["tokens_out"]) == ("end", reason, 2)


async def test_a_chunk_of_several_tokens_and_one_of_none():
    found = await events(chunk("", [1]), chunk("né!", [2, 3, 4]), chunk("", []), chunk("?", [5], "length"))
    assert tokens(found) == [(0, ""), (1, ""), (2, ""), (3, "né!"), (4, "?")]
    assert found[-1]["tokens_out"] == 5


async def test_a_text_that_comes_after_its_token_is_not_lost():
    found = await events(chunk("a", [1]), chunk("b", [], "abort"))
    assert tokens(found) == [(0, "a"), (0, "b")]
    assert (found[-1]["tokens_out"], found[-1]["stop_reason"]) == (1, "cancelled")


@given(st.lists(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), max_size=4)), max_size=8))
def test_counts_and_texts_are_exact_however_chunks_are_cut(pieces: list[tuple[str, list[int]]]):
    found = asyncio.run(events(chunk("", [0]), *(chunk(*piece) for piece in pieces), chunk("", [], "length")))
    count = 1 + sum(len(ids) for _, ids in pieces)
    assert "".join(text for _, text in tokens(found)) == "".join(text for text, _ in pieces)
    assert sorted({index for index, _ in tokens(found)}) == list(range(count))
    assert found[-1]["tokens_out"] == count


async def test_the_time_is_from_the_first_token_to_the_last():
    *_, last = await events(0.1, chunk("a", [1]), 0.05, chunk("b", [2]), 0.02, chunk("", [], "length"))
    assert 45 <= last["decode_time_ms"] < 95
    *_, alone = await events(chunk("a", [1], "length"))
    assert alone["decode_time_ms"] == 0


async def test_tokens_come_as_they_are_sampled():
    engine = ScriptedCompletions(chunk("a", [1]), 60.0)
    stream = infer(engine, wanted(), correlation_id="c")
    assert [(await anext(stream))["event"] for _ in range(2)] == ["started", "token"]
    await stream.aclose()
    assert engine.left == 1, "closing it ends the completion"
    assert engine.asked == [(wanted().completion(), "c")]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ChatEngineError(400, "the prompt is too long"), "INVALID_REQUEST"),
        (ChatEngineError(422, "no"), "INVALID_REQUEST"),
        (ChatEngineError(500, "CUDA out of memory. Tried to allocate 2 GiB"), "VRAM_OOM"),
        (ChatEngineError(500, "torch.OutOfMemoryError"), "VRAM_OOM"),
        (ChatEngineError(504, "silent"), "TIMEOUT"),
        (ChatEngineError(499, "withdrawn"), "CANCELLED"),
        (ChatEngineError(503, "not reached"), "INFERENCE_FAILED"),
        (ChatEngineError(404, "no such model"), "INFERENCE_FAILED"),
        (ChatEngineError(502, "no room in the boom"), "INFERENCE_FAILED"),
    ],
)
async def test_a_refusal_is_one_error_and_nothing_else(failure: ChatEngineError, code: str):
    found = [event async for event in infer(ScriptedCompletions(refusal=failure), wanted())]
    assert found == [{"event": "error", "code": code, "message": failure.message}]


async def test_what_breaks_in_the_middle_is_an_error_after_what_came():
    engine = ScriptedCompletions(chunk("a", [1]), ChatEngineError(400, "vLLM calls its own failures so"))
    found = [event async for event in infer(engine, wanted())]
    assert [event["event"] for event in found] == ["started", "token", "error"]
    assert found[-1]["code"] == "INFERENCE_FAILED"
    assert engine.left == 1


async def test_a_stream_that_just_ends_is_no_completion():
    found = await events(chunk("a", [1]))
    assert (found[-1]["event"], found[-1]["code"]) == ("error", "INFERENCE_FAILED")
    assert "ended before the completion" in found[-1]["message"]


async def test_an_engine_that_drops_a_request_at_once():
    found = await events(chunk("", [], "abort"))
    assert [event["event"] for event in found] == ["started", "error"]
    assert found[-1]["code"] == "CANCELLED"


async def test_without_token_ids_nothing_is_guessed():
    found = await events(chunk("two tokens", None))
    assert found[-1]["code"] == "INFERENCE_FAILED" and "no token ids" in found[-1]["message"]


async def test_the_deadline_is_of_the_whole():
    found = await events(chunk("a", [1]), 0.06, chunk("b", [2]), 0.06, chunk("c", [3]), seconds=0.1)
    assert [event["event"] for event in found] == ["started", "token", "token", "error"]
    assert found[-1]["code"] == "TIMEOUT" and "2 tokens" in found[-1]["message"]


async def test_the_deadline_holds_while_the_engine_is_asked():
    class Slow(ScriptedCompletions):
        @asynccontextmanager
        async def open(self, body: Any, correlation_id: str | None) -> AsyncIterator[Any]:
            await asyncio.sleep(60)
            yield

    found = [event async for event in infer(Slow(), wanted(), seconds=0.05)]
    assert [event.get("code") for event in found] == ["TIMEOUT"]


async def test_a_bug_is_an_error_event_and_logged(caplog: pytest.LogCaptureFixture):
    found = await events(chunk("a", [1]), ZeroDivisionError("oops"))
    assert found[-1]["code"] == "INFERENCE_FAILED"
    assert found[-1]["message"].startswith("ZeroDivisionError: oops; this is a bug")
    assert [record.exc_info is not None for record in caplog.records] == [True]
