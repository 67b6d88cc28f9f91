"""Whether a conversation only grew: what a remote rollout server sends must begin with what was said before.

Invariant: two histories are equal here only if a model would read the same in both. What clients change on the way
without meaning anything (null for empty text, arguments as JSON text or as an object, extra keys) is no difference;
every other one is named with its place, and nothing is repaired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rollout.tasks import Message

# Characters of a message that are repeated in an error.
MAX_SHOWN_CHARS = 80


def added_messages(history: Sequence[Message], given: Sequence[Message]) -> list[Message] | str:
    """What `given` adds to `history`, or in a sentence why it does not extend it."""
    for index, (old, new) in enumerate(zip(history, given, strict=False)):
        if (difference := first_difference(old, new)) is not None:
            return (
                f"messages.{index}.{difference}: the history must only grow, send every message as it was sent or "
                "answered before"
            )
    if len(given) < len(history):
        return (
            f"messages has {len(given)} messages, the conversation so far has {len(history)} with the last answer: "
            "send the whole history with every call"
        )
    added = list(given[len(history) :])
    if not added:
        return "messages adds nothing after the last answer; there is nothing to answer"
    for offset, message in enumerate(added):
        # An opening may show the model what it is to say.
        if history and message.get("role") == "assistant":
            return (
                f"messages.{len(history) + offset}.role: is assistant, and no call here has answered it; only the "
                "policy speaks as the assistant"
            )
    return added


def same_messages(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two conversations say the same."""
    return len(one) == len(other) and all(first_difference(a, b) is None for a, b in zip(one, other, strict=True))


def first_difference(old: Message, new: Message) -> str | None:
    """The first field in which two messages differ, with what stands there; None if they say the same."""
    if old is new:
        return None
    for field, one, other in (
        ("role", old.get("role"), new.get("role")),
        ("content", plain_content(old.get("content")), plain_content(new.get("content"))),
        ("tool_call_id", old.get("tool_call_id") or None, new.get("tool_call_id") or None),
        ("tool_calls", _calls(old), _calls(new)),
    ):
        if one != other:
            return f"{field} was {_shown(one)} and is {_shown(other)}"
    return None


def plain_content(content: Any) -> Any:
    """Text for what is only text: null is empty, parts of text are one text. Anything else stays what it is."""
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _calls(message: Message) -> list[Any]:
    found = message.get("tool_calls")
    if not found:
        return []
    return [_call(call) for call in found] if isinstance(found, list) else [found]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return [call.get("id"), function.get("name"), _arguments(function.get("arguments"))]


def _arguments(given: Any) -> Any:
    """Arguments as they are meant: clients send them as an object or as its JSON."""
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
