"""A request to an agent: OpenAI's chat completion, checked field by field.

Invariant: every field of a request is forwarded, used here, known to change nothing, or refused by name; none is
dropped in silence. What an agent would have to leak its system prompt for (`echo`, `prompt_logprobs`) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rollout.agents.tools_merge import MAX_REQUEST_TOOLS
from rollout.errors import ApiError, NotFoundError
from rollout.strict_json import problems
from rollout.tasks import Message, Task

# To the engine as they are, in every turn.
_OPENAI = {
    *("temperature", "top_p", "seed", "stop", "frequency_penalty", "presence_penalty", "logit_bias"),
    *("logprobs", "top_logprobs", "response_format", "parallel_tool_calls", "reasoning_effort"),
}
_VLLM = {
    *("top_k", "min_p", "repetition_penalty", "length_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "bad_words"),
    *("allowed_token_ids", "structured_outputs", "chat_template_kwargs"),
    "thinking_token_budget",
}
FORWARDED = frozenset(_OPENAI | _VLLM)
# Used here.
_OWN = frozenset(
    {
        *("model", "messages", "tools", "tool_choice", "stream", "stream_options", "n"),
        *("max_tokens", "max_completion_tokens", "functions", "function_call", "include_reasoning"),
    }
)
# Clients send these by themselves; they say nothing about the answer.
_WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    max_tokens: int | None = None
    """Most tokens sampled over all turns of this request."""
    show_reasoning: bool = True
    """Whether the client sees the model's reasoning. The engine is asked for it in any case: without, the model
    would not know in its next turn why it called a tool."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What goes to the engine as it is."""

    @property
    def task(self) -> Task:
        """The request as the environment's `setup` gets it."""
        return Task(task_id="chat", messages=self.messages)


def parse_request(body: Any, agent: str) -> ChatRequest:
    """Check a request's body. Raises ApiError (status 400) that names the field, NotFoundError for the model."""
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, not {type(body).__name__}")
    # First of all: a name that cannot be sent could not be told either.
    if (problem := next(problems(body), None)) is not None:
        raise ApiError(str(problem), problem.where or None)
    body = {key: value for key, value in body.items() if value is not None}
    if refused := sorted(body.keys() - FORWARDED - _OWN - _WITHOUT_EFFECT):
        raise ApiError(f"{refused[0]}: agents do not take this field; leave it out", refused[0])
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        if old in body:
            raise ApiError(f"{old}: use {new}", old)
    if body.get("model", agent) != agent:
        raise NotFoundError(f"model: there is no {body['model']!r} here; this address serves {agent!r}", "model")
    if body.get("n", 1) != 1:
        raise ApiError("n: an agent gives one answer; send the request several times", "n")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError("stream_options must be an object", "stream_options")
    # How the answer is sent is not the loop's business, but a field that is wrong is told all the same.
    _check_flag(body.get("stream", False), "stream")
    _check_flag(options.get("include_usage", False), "stream_options.include_usage")
    _check_flag(body.get("include_reasoning", True), "include_reasoning")
    return ChatRequest(
        messages=_messages(body),
        tools=_tools(body.get("tools", [])),
        tool_choice=body.get("tool_choice"),
        max_tokens=_max_tokens(body),
        show_reasoning=body.get("include_reasoning", True),
        parameters={key: value for key, value in body.items() if key in FORWARDED},
    )


def with_system_prompt(prompt: str | None, messages: list[Message]) -> list[Message]:
    """The conversation under an agent's prompt: one system message, since many chat templates take only one."""
    if prompt is None:
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": prompt}, *messages]
    return [{"role": "system", "content": f"{prompt}\n\n{_text(messages[0])}"}, *messages[1:]]


def _text(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise ApiError("messages.0.content: a system message has text parts only", "messages.0.content")
        texts.append(text)
    return "".join(texts)


def _check_flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false", name)


def _messages(body: dict[str, Any]) -> list[Message]:
    try:
        messages = Task(task_id="chat", messages=body.get("messages", [])).messages
    except ValidationError as failure:
        problem = failure.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "messages"
        raise ApiError(f"{where}: {problem['msg'].removeprefix('Value error, ')}", where) from None
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise ApiError(f"{where}.tool_call_id is missing: it says which call is answered", where)
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
            raise ApiError(f"{where}.tool_calls: each call needs id, type and function (name, arguments)", where)
    return messages


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return False
    return all(isinstance(value, str) for value in (call.get("id"), function.get("name"), function.get("arguments")))


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise ApiError("tools must be a list", "tools")
    if len(tools) > MAX_REQUEST_TOOLS:
        raise ApiError(f"tools: {len(tools)} tools, at most {MAX_REQUEST_TOOLS} are taken", "tools")
    for index, spec in enumerate(tools):
        where = f"tools.{index}"
        if not isinstance(spec, dict) or spec.get("type") != "function":
            raise ApiError(f"{where}.type must be 'function'", f"{where}.type")
        function = spec.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ApiError(f"{where}.function.name is missing", f"{where}.function.name")
    return tools


def _max_tokens(body: dict[str, Any]) -> int | None:
    found = []
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ApiError(f"{name} must be a whole number from 1", name)
        found.append(value)
    return min(found, default=None)
