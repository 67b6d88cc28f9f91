"""Streams of chat completions, held against the types of OpenAI's own client; agents' and engines' tests share it.

Invariant: strict. No field is of another type than it says, none that is required is missing, and a field that OpenAI
does not have passes only where the test names its path.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

# What vLLM adds to OpenAI's chunks, and says so in its documentation and its protocol.
VLLM_FIELDS = frozenset(
    {"prompt_token_ids", "prompt_text", "choices.delta.reasoning", "choices.stop_reason", "choices.token_ids"}
)


def checked(chunks: Iterable[dict[str, Any]], allowed: Set[str]) -> list[ChatCompletionChunk]:
    """The chunks of one stream, in order. AssertionError or ValidationError where they are no stream of OpenAI's.

    `allowed`: paths of further fields, such as `choices.delta.reasoning`.
    """
    given = list(chunks)
    typed = [ChatCompletionChunk.model_validate(one, strict=True) for one in given]
    for one, raw in zip(typed, given, strict=True):
        assert one.object == "chat.completion.chunk", raw
        assert (one.id, one.created, one.model) == (typed[0].id, typed[0].created, typed[0].model), raw
        assert not extras(one) - allowed, raw
    begun: set[int] = set()
    ended: set[int] = set()
    for choice in (choice for one in typed for choice in one.choices):
        assert choice.index not in ended, "nothing follows a finish_reason"
        if choice.index not in begun:
            assert choice.delta.role == "assistant" and choice.delta.content == ""
        begun.add(choice.index)
        if choice.finish_reason is not None:
            ended.add(choice.index)
    assert begun == ended and begun == set(range(len(begun))) != set(), "each choice ends once"
    return typed


def extras(model: BaseModel, path: str = "") -> set[str]:
    """The paths of all fields, at whatever depth, that the type does not have."""
    found = {f"{path}{name}" for name in model.model_extra or {}}
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found |= extras(item, f"{path}{name}.")
    return found


def calls(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> list[tuple[str, str]]:
    """A choice's tool calls (name, arguments), put together from their fragments.

    Each begins with its id and name, in the order of their places, and goes on by its place alone.
    """
    found: dict[int, tuple[str, str]] = {}
    ids: set[str] = set()
    for choice in (choice for one in chunks for choice in one.choices if choice.index == index):
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.index not in found:
                assert call.index == len(found) and call.id and call.type == "function" and call.function.name
                assert call.id not in ids, "each call has an id of its own"
                ids.add(call.id)
                found[call.index] = (call.function.name, call.function.arguments or "")
            else:
                assert call.id is None and call.function.name is None
                name, arguments = found[call.index]
                found[call.index] = (name, arguments + (call.function.arguments or ""))
    return list(found.values())
