"""What the agents' routes take and answer, for the OpenAPI document.

Only what clients rely on is written down; requests may hold whatever else OpenAI's API has.
"""

from __future__ import annotations

from typing import Any

from rollout.agents.spec import NamedAgent

Responses = dict[int | str, dict[str, Any]]

_TEXT: dict[str, Any] = {"type": "string"}
_TEXT_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _json(schema: dict[str, Any], description: str, **others: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}, **others}}


_TOOL = _object({"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}})
_AGENT = _object(
    {
        "name": _TEXT,
        "description": _TEXT,
        "limits": {"type": "object"},
        "tools": {"type": ["array", "null"], "items": _TOOL},
    },
    error=_TEXT,
)
_FUNCTION_CALL = _object(
    {"id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT})}
)
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _TEXT_OR_NULL},
    reasoning=_TEXT_OR_NULL,
    tool_calls={"type": "array", "items": _FUNCTION_CALL},
)
_FINISH = {"enum": ["stop", "length", "tool_calls", "content_filter"]}
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_COMPLETION = _object(
    {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": _COUNT,
        "model": _TEXT,
        "choices": {
            "type": "array",
            "minItems": 1,
            "items": _object({"index": _COUNT, "message": _MESSAGE, "finish_reason": _FINISH}),
        },
    },
    usage={"anyOf": [_USAGE, {"type": "null"}]},
)
_REQUEST = _object(
    {"messages": {"type": "array", "minItems": 1, "items": _object({"role": _TEXT})}},
    model=_TEXT,
    stream={"type": ["boolean", "null"]},
    tools={"type": "array", "items": {"type": "object"}},
)
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})


def _takes(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


ASK = _takes(_REQUEST)
NEW_AGENT = _takes(NamedAgent.model_json_schema())

LIST_AGENTS: Responses = {200: _json(_object({"agents": {"type": "array", "items": _AGENT}}), "The agents")}
ADD_AGENT: Responses = {
    201: _json(_AGENT, "It is served, at every gateway within a second"),
    409: {"description": "The name is another agent's"},
    422: {"description": "A field that is wrong, or code that cannot be loaded here"},
}
REMOVE_AGENT: Responses = {
    404: {"description": "No such agent was added"},
    409: {"description": "It is of the configuration"},
}
MODELS: Responses = {
    200: _json(_object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}), "The agent")
}
CHAT: Responses = {
    200: _json(
        _COMPLETION,
        "A chat completion; with `stream`, its chunks as server-sent events, then `[DONE]`",
        **{"text/event-stream": {"schema": _TEXT}},
    ),
    410: {"description": "What the agent did in a turn with tool calls of the client is no longer held"},
    504: {"description": "It took longer than the agent's limits allow"},
}
