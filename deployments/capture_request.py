"""A session's request before it is served: what it asks for, whose conversation it shows, whether it is recorded.

Invariant: below a session's address nothing is sampled that is not written down. Served there are the paths whose
generations are followed and those that sample nothing; whatever else vLLM has is refused. Reading a body never
raises: what cannot be read is vLLM's to refuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rollout.errors import ApiError
from rollout.strict_json import problems
from rollout.tasks import Message

# vLLM's paths, and what a session's record calls them.
_APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
# Last segments of what is posted and samples nothing.
_WITHOUT_SAMPLING = frozenset({"tokenize", "detokenize", "render", "derender", "count_tokens", "cancel"})
# Fields that make a generation which cannot be followed.
_REFUSED = {
    # One token for each beam and step, each a request of its own to the engine, most of them thrown away.
    "use_beam_search": "beams are no samples of the policy; leave it out in a captured session",
    # It would go on after the request, whose end is reported.
    "background": "a captured session records what is answered; leave it out and wait for the answer",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body says."""

    messages: list[Message] | None = None
    """The conversation in whichever form it came, for people; None where it has none that can be kept."""
    refusal: ApiError | None = None
    """Why it is not served in a session."""


def api_of(method: str, path: str) -> str | None:
    """Under which name a request's generations are recorded; None: it samples nothing.

    Raises ApiError for what would sample unrecorded.
    """
    if method != "POST":
        return None
    if (api := _APIS.get(path)) is not None:
        return api
    if path.rpartition("/")[2] in _WITHOUT_SAMPLING:
        return None
    raise ApiError(f"a captured session serves {', '.join(_APIS)}; what is sampled elsewhere would not be recorded")


def look_at(body: bytes) -> Asked:
    """What a body asks for. Takes as long as its size; never raises."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return Asked()
    if not isinstance(given, dict):
        return Asked()
    for name, why in _REFUSED.items():
        if given.get(name) not in (None, False):
            return Asked(refusal=ApiError(f"{name}: {why}", name))
    return Asked(_messages(given))


def _messages(given: dict[str, Any]) -> list[Message] | None:
    found = given.get("messages", given.get("input"))
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        return None
    system = given.get("system") or given.get("instructions")
    messages = [*([{"role": "system", "content": system}] if system else []), *found]
    # Neither the way to the controller nor the record takes the others; halves of characters are replaced there.
    return None if any(problem.kind != "text" for problem in problems(messages)) else messages
