"""The prompt that follows a turn: the exact tokens so far, and what the chat format adds for the new messages.

Invariant: a prompt is called an extension only where it begins with the ledger's whole context, token by token,
whichever way it was made. Where none does, the conversation as the template renders it is a prompt of its own, and
says why. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollout.ledger import Ledger
from rollout.rendering import ChatRenderer
from rollout.tasks import Message


@dataclass(frozen=True, slots=True)
class NextPrompt:
    """A prompt that the engine has not seen yet."""

    ids: list[int]
    added: int
    """Tokens beyond the context so far; 0 for the first prompt of a segment."""
    fork_reason: str | None = None
    """Why it begins a new segment; None: it extends the context, or is the first."""


async def next_prompt(
    chat: ChatRenderer,
    ledger: Ledger,
    messages: Sequence[Message],
    new_messages: Sequence[Message],
    specs: list[dict[str, Any]],
    *,
    template_first: bool = False,
) -> NextPrompt:
    """The prompt after the ledger's last turn. `messages` is the whole conversation and ends with `new_messages`.

    `template_first`: take what the template renders, wherever that leaves the past alone, before what the renderer
    appends. The two differ where a turn was cut (harmony: a call without its end token), and whoever counts for a
    response mask has the template alone. Raises RenderError.
    """
    segment = ledger.segments[-1]
    start = segment.turns[-1].start
    before = (segment.prompt_ids + segment.response_ids[:start]).tolist()
    sampled = segment.response_ids[start:].tolist()
    context = len(before) + len(sampled)

    async def rendered() -> list[int]:
        return await chat.run(characters(messages), lambda chat: chat.render(messages, specs))

    template = await rendered() if template_first else None
    if template is not None and ledger.extends(template):
        return NextPrompt(template, len(template) - context)
    extended = await chat.run(
        len(sampled) + characters(new_messages), lambda chat: chat.extend(before, sampled, new_messages, specs)
    )
    if extended is not None and ledger.extends(extended):
        return NextPrompt(extended, len(extended) - context)
    if template is None:
        template = await rendered()
        if ledger.extends(template):
            # The template itself left the past alone, token by token: that is as good as an extension.
            return NextPrompt(template, len(template) - context)
    verb = "does not extend this history" if extended is None else "would change sampled tokens"
    return NextPrompt(template, 0, f"{chat.name} {verb}")


def characters(messages: Sequence[Message]) -> int:
    """Roughly what there is to encode: decides whether it is done off the event loop."""
    return sum(len(str(message.get("content"))) for message in messages)
