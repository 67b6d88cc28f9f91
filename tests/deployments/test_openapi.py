"""The OpenAPI document against the gateway: requests made up from it get no 5xx, and the answers that it promises.

And streams of agents, chunk by chunk, against the types of OpenAI's own client.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from openai.types.chat import ChatCompletion
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rollout.agents import AgentRegistry, ChatEngineError
from tests import openai_chunks
from tests.deployments.canned import application
from tests.rollout.agents.scripted_chat import (
    USER,
    ScriptedChatEngine,
    agent,
    ask,
    client_tool,
    delta,
    fragment,
    say,
    usage,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 12
"""Requests per operation; with some forty operations the file stays well below a minute."""
TIMEOUT_S = 30
"""Of one request. Nothing behind the gateway takes time here, but machines do."""

schema = schemathesis.openapi.from_asgi("/openapi.json", application())


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_the_document_promises(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)


# The document itself


def document() -> dict[str, Any]:
    return application().openapi()


def references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [found for item in node for found in references(item)]
    if not isinstance(node, dict):
        return []
    own = [value for value in node.values() if isinstance(value, str) and value.startswith("#/")]
    return own + [found for value in node.values() for found in references(value)]


def test_every_reference_leads_somewhere():
    whole = document()
    found = references(whole)
    assert len(found) > 50
    for reference in found:
        place = whole
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    assert "$defs" not in json.dumps(whole)


def test_a_second_application_has_the_same_document():
    """What is moved in one document must not be missing in the next."""
    assert document() == document()


def test_every_path_says_how_it_fails():
    whole = document()
    for path, operations in whole["paths"].items():
        form = "OpenAIError" if path.startswith("/agents") else "Error"
        for operation in operations.values():
            for status in ("4XX", "5XX"):
                told = operation["responses"][status]["content"]["application/json"]["schema"]
                assert told == {"$ref": f"#/components/schemas/{form}"}, path
    assert "HTTPValidationError" not in whole["components"]["schemas"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/trajectories/two%0Alines", 404),
        ("PUT", "/v1/runs", 405),
        ("GET", "/agents/adder/v1/embeddings", 404),
        ("PUT", "/agents", 405),
    ],
)
async def test_what_the_framework_refuses_has_our_form_too(method: str, path: str, status: int):
    transport = httpx.ASGITransport(application(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        answer = await http.request(method, path)
    assert answer.status_code == status
    fields = {"message", "type", "param", "code"} if path.startswith("/agents") else {"type", "message", "field"}
    assert answer.json()["error"].keys() == fields
    assert (status == 405) == ("allow" in answer.headers)


# Streams of agents, as OpenAI's types have them

CHAT = "/agents/adder/v1/chat/completions"
REASONED = [
    delta(role="assistant", content=""),
    delta(reasoning="I add. "),
    delta(tool_calls=[fragment(0, "e0", "add", "")]),
    delta(tool_calls=[fragment(0, None, None, '{"a": 2, "b": 3}')]),
    delta("tool_calls"),
    usage(prompt_tokens=10, completion_tokens=4, total_tokens=14, completion_tokens_details={"reasoning_tokens": 2}),
]
TURNS = {
    "text": [say("f", "ive")],
    "its own tools": [ask(("add", '{"a": 2, "b": 3}')), say("5")],
    "a client's tools": [ask(("weather", '{"city": "Ulm"}'), content="Let me see.")],
    "both": [ask(("add", '{"a": 2, "b": 3}'), ("weather", '{"city": "Ulm"}'), ("weather", "{}"))],
    "reasoning": [REASONED, say("5")],
    "cut": [say("fi", finish="length")],
}


async def streamed(turns: list[Any], **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same question as a stream and as a whole."""
    given: dict[str, Any] = {"model": "adder", "messages": [USER], "tools": [client_tool("weather")], **fields}
    answers = []
    for stream in (True, False):
        app = application(chat=ScriptedChatEngine(*turns), agents=AgentRegistry([agent(show_tool_calls=True)]))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            answers.append(await http.post(CHAT, json={**given, **options}))
    lines = [line for line in answers[0].text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]], answers[1].json()


@pytest.mark.parametrize("name", TURNS)
async def test_every_chunk_fits_openais_schema(name: str):
    chunks, whole = await streamed(TURNS[name])
    typed = openai_chunks.checked(chunks, {"agent_event", "choices.delta.reasoning"})
    assert {one.model for one in typed} == {"adder"}
    *_, last, counted = typed
    assert last.choices[0].finish_reason is not None
    assert counted.choices == [] and counted.usage is not None
    assert counted.usage.total_tokens == counted.usage.prompt_tokens + counted.usage.completion_tokens
    assert all(one.usage is None for one in typed[:-1])
    done = ChatCompletion.model_validate(whole)
    (choice,) = done.choices
    assert not (done.model_extra or {}).keys() - {"agent_events"}
    assert not (choice.message.model_extra or {}).keys() - {"reasoning"}
    assert choice.finish_reason == last.choices[0].finish_reason
    said = "".join(c.delta.content or "" for one in typed for c in one.choices)
    assert said == (choice.message.content or "")
    assert openai_chunks.calls(typed) == [
        (c.function.name, c.function.arguments) for c in choice.message.tool_calls or []
    ]  # type: ignore[union-attr]


async def test_an_error_in_a_stream_is_what_openais_client_raises():
    """Its client reads an event with `error` as an exception: the form is checked by the client itself."""
    app = application(chat=ScriptedChatEngine([delta(content="x"), ChatEngineError(502, "cut")]))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with openai.AsyncOpenAI(
        base_url="http://x/agents/adder/v1", api_key="none", max_retries=0,
        http_client=httpx.AsyncClient(transport=transport),
    ) as client:  # fmt: skip
        stream = await client.chat.completions.create(model="adder", messages=[USER], stream=True)  # type: ignore[list-item]
        with pytest.raises(openai.APIError, match="cut"):
            async for _ in stream:
                pass
