"""The protocol's bodies: bounds, defaults, what is dropped and what must stay."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rollout.remote.order import RolloutOrder
from rollout.remote.wire import (
    MAX_METADATA_BYTES,
    CompletionRequest,
    CompletionResponse,
    InitRequest,
    RolloutRequest,
    RolloutResponse,
)

USER = [{"role": "user", "content": "2+3?"}]
A: dict[str, Any] = {"rollout_id": "r", "server_url": "http://t:1/", "messages": USER}
B: dict[str, Any] = {**A, "completion_params": {}}


def fields_refused(model: type[BaseModel], **body: Any) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return {str(issue["loc"][0]) for issue in caught.value.errors()}


def test_a_request_has_the_defaults_of_the_protocol():
    request = RolloutRequest.model_validate(A)
    assert request.server_url == "http://t:1"
    assert (request.max_turns, request.max_tokens_total, request.metadata) == (10, 8192, {})
    assert request.sampling_params.model_dump() == {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 512,
        "stop": None,
        "logprobs": True,
    }
    assert (request.callback_api_key, request.tokenizer_name, request.tool_server_url) == (None, None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rollout_id", ""),
        ("rollout_id", "x" * 257),
        ("server_url", "ftp://t"),
        ("server_url", "http://"),
        ("server_url", "t:9000"),
        ("server_url", "http://t/\nhost: x"),
        ("messages", []),
        ("messages", [{"role": "robot", "content": ""}]),
        ("messages", [{"role": "developer", "content": ""}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("max_turns", 0),
        ("max_turns", 101),
        ("max_tokens_total", 0),
        ("max_tokens_total", 1_000_001),
        ("callback_api_key", "a\r\nx: y"),
        ("sampling_params", {"temperature": 2.1}),
        ("sampling_params", {"top_p": -0.1}),
        ("sampling_params", {"max_tokens": 32_769}),
        ("sampling_params", {"stop": "a"}),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_field(field: str, value: Any):
    assert fields_refused(RolloutRequest, **{**A, field: value}) == {field}


@pytest.mark.parametrize("field", ["rollout_id", "server_url", "messages"])
def test_required_fields(field: str):
    assert fields_refused(RolloutRequest, **{k: v for k, v in A.items() if k != field}) == {field}
    assert fields_refused(InitRequest, **{k: v for k, v in B.items() if k != field}) == {field}


def test_b_needs_completion_params_and_an_id_that_is_not_blank():
    assert fields_refused(InitRequest, **A) == {"completion_params"}
    assert fields_refused(InitRequest, **{**B, "rollout_id": "  "}) == {"rollout_id"}
    assert fields_refused(InitRequest, **{**B, "metadata": {"x": "y" * MAX_METADATA_BYTES}}) == {"metadata"}
    assert InitRequest.model_validate({**B, "metadata": None}).metadata == {}
    assert InitRequest.model_validate(B).key == "r"
    assert InitRequest.model_validate({**B, "idempotency_key": "k"}).key == "k"


def test_messages_stay_exactly_as_they_came_and_other_unknown_fields_are_dropped():
    odd = {"role": "tool", "content": None, "tool_call_id": "c", "weight": [1, {"a": None}]}
    request = RolloutRequest.model_validate({**A, "messages": [*USER, odd], "shiny": 1})
    assert request.messages[1] == odd and list(request.messages[1]) == list(odd)
    assert "shiny" not in request.model_dump()


NAN, INF = float("nan"), float("inf")
NO_JSON: list[Any] = [NAN, INF, -INF, "a\ud83d", [[NAN]], {"x": {"y": [1, INF]}}, {"\udc00": 1}]


@pytest.mark.parametrize("value", NO_JSON)
def test_what_comes_back_to_a_peer_is_json_that_every_reader_takes(value: Any):
    for message in ({"w": value}, {"content": [{"type": "text", "text": "x", "w": value}]}):
        messages = [*USER, {"role": "user", "content": "x", **message}]
        assert fields_refused(RolloutRequest, **{**A, "messages": messages}) == {"messages"}
        assert fields_refused(InitRequest, **{**B, "messages": messages}) == {"messages"}
        assert fields_refused(CompletionRequest, rollout_id="r", messages=messages) == {"messages"}
        choice = {"message": {"role": "assistant", "content": "5", **message}}
        assert fields_refused(CompletionResponse, id="c", choices=[choice]) == {"choices"}
    assert fields_refused(RolloutRequest, **{**A, "metadata": {"w": value}}) == {"metadata"}
    assert fields_refused(InitRequest, **{**B, "metadata": {"w": value}}) == {"metadata"}
    assert fields_refused(InitRequest, **{**B, "completion_params": {"w": value}}) == {"completion_params"}


def test_the_place_of_what_is_no_json_is_named():
    body = b'{"rollout_id": "r", "server_url": "http://t", "messages": [{"role": "user", "content": [{"w": 1e999}]}]}'
    with pytest.raises(ValidationError, match=r"0\.content\.0\.w: is inf"):
        RolloutRequest.model_validate_json(body)


def test_keys_are_in_no_repr():
    assert "hush" not in repr(RolloutRequest.model_validate({**A, "callback_api_key": "hush"}))
    order = RolloutOrder.of(InitRequest.model_validate({**B, "api_key": "hush"}))
    assert order.api_key == "hush" and "hush" not in repr(order)


def test_model_calls_of_a_have_every_field_and_those_of_b_no_mask_and_no_nulls():
    request = CompletionRequest(messages=USER, rollout_id="r", response_mask=[0], logprobs=1)
    assert request.body("A") == {
        "model": "default",
        "messages": USER,
        "rollout_id": "r",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 512,
        "stop": None,
        "logprobs": True,
        "response_mask": [0],
    }
    body = request.body("B", {"top_k": 5, "max_tokens": 9})
    assert "response_mask" not in body and "stop" not in body
    assert body["top_k"] == 5 and body["max_tokens"] == 512


def test_an_answer_needs_an_assistant_message_and_may_lack_tokens():
    choice = {"message": {"content": "5"}, "finish_reason": "stop"}
    answer = CompletionResponse.model_validate({"id": "c", "choices": [choice]})
    assert not answer.has_tokens
    assert fields_refused(CompletionResponse, id="c", choices=[]) == {"choices"}
    said = {"message": {"role": "user", "content": "5"}}
    assert fields_refused(CompletionResponse, id="c", choices=[said]) == {"choices"}
    assert fields_refused(CompletionResponse, id="c", choices=[choice], token_ids=[-1]) == {"token_ids"}
    assert fields_refused(CompletionResponse, id="c", choices=[choice], logprobs=[float("nan")]) == {"logprobs"}


def test_the_end_in_both_generations():
    response = RolloutResponse(rollout_id="r", status="ERROR", finish_reason="error", reward=1.0)
    assert "reward" not in response.body("A") and response.body("A")["finish_reason"] is None
    assert response.body("B")["reward"] == 1.0 and response.body("B")["finish_reason"] == "error"
    parsed = RolloutResponse.model_validate(
        {"rollout_id": "r", "status": "COMPLETED", "final_messages": None, "extra_fields": None, "metrics": None}
    )
    assert (parsed.final_messages, parsed.extra_fields) == ([], {})


def test_two_orders_have_one_digest_if_they_ask_for_the_same():
    one = RolloutOrder.of(InitRequest.model_validate({**B, "metadata": {"a": 1, "b": 2}}))
    same = RolloutOrder.of(InitRequest.model_validate({**B, "metadata": {"b": 2, "a": 1}, "idempotency_key": "k"}))
    other = RolloutOrder.of(InitRequest.model_validate({**B, "metadata": {"a": 1, "b": 3}}))
    assert one.digest() == same.digest() != other.digest()
    assert RolloutOrder.model_validate_json(one.model_dump_json()).digest() == one.digest()
    assert RolloutOrder.of(RolloutRequest.model_validate(A)).digest() != one.digest()
    keyed = RolloutOrder.of(InitRequest.model_validate({**B, "metadata": {"a": 1, "b": 2}, "api_key": "k"}))
    assert keyed.digest() == one.digest(), "a trainer may make a key for each attempt"
