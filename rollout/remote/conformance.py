"""What is looked at in a remote rollout server, why, and whether one of its calls keeps the protocol.

Invariant: every deviation names its check, where it was seen and the figures, and CHECKS says in plain words why it
matters. An advice is something that the protocol leaves open and that will hurt nevertheless. A call is judged when
it comes, as it decides what is answered; how a rollout went is judged in `rollout.remote.conformance_judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rollout.remote.conformance_plan import Scenario
from rollout.remote.history import added_messages, first_difference
from rollout.remote.wire import CompletionRequest, Generation
from rollout.tasks import Message

MAX_SHOWN_CHARS = 300
TOOL_ERROR = "Error:"

CHECKS: dict[str, str] = {
    "answer": "A trainer waits for exactly one end of each rollout, with its own id. A rollout without one holds its "
    "place in the batch until the deadline.",
    "auth": "A server that has a key must refuse callers who do not bring it, with 401.",
    "bearer": "The key of the request (callback_api_key in A, api_key in B) comes back in every call as "
    "`Authorization: Bearer …`; trainers refuse calls without it.",
    "call": "A model call has the fields of the protocol, with their bounds, under the rollout's id.",
    "callback-host": "Whoever may start a rollout chooses where this server sends requests. Without a list of "
    "trainers that it calls it is a way into its own network.",
    "duplicate": "A trainer that got no answer asks again. Known ids get the stored answer; played twice, a rollout "
    "mixes two histories in one trajectory.",
    "error": "An ERROR says why: error_message in words, and extra_fields.error_category, by which trainers count.",
    "final-messages": "final_messages is the whole conversation: every message of the last call and the answer "
    "to it. Rewards are computed on it.",
    "finish-reason": "finish_reason tells the trainer whether an episode is whole: stop, max_turns or max_tokens.",
    "health": "Operators and balancers ask GET /health, and take the status for true.",
    "history": "The history may only grow. The trainer has the tokens of what was said; a message that changes or "
    "goes missing leaves it with tokens that no prompt has. To fit a limit, end the rollout as max_tokens.",
    "idle": "Nothing is to be done after the end of a rollout: no call, and no second report once one was taken.",
    "mask": "The trainer trains on tokens whose mask is 1. One value too many or too few shifts all that follow: it "
    "then learns the tools' words instead of its own.",
    "metrics": "metrics must be counted, not guessed: cost and speed are computed from them.",
    "path": "Generation A calls /v1/completions; A1 and B call /v1/chat/completions. A server of A and A1 may find "
    "out by a 404 to its first call.",
    "report": "The end of B is posted to /v1/rollout/completed until the trainer has answered 200; otherwise a "
    "played rollout is lost.",
    "retry": "5xx, timeouts and broken connections are tried again: 3 times for a call, with a growing pause. 4xx "
    "says that the call itself is wrong: it is never tried again, but for a 429 with Retry-After, after that time.",
    "sampling": "The trainer's sampling parameters come back as they were given: off-policy tokens otherwise.",
    "tool-answers": "Each tool call gets one message with role tool and its tool_call_id before the next call, also "
    "if the tool fails: then its content begins with `Error:`.",
    "tools": "The trainer's template needs the tools in OpenAI's form, from GET /tools (A) or the 202 of init (B).",
    "turns": "The number of turns is the trainer's to bound, and nothing is asked for after the end.",
    "unknown-fields": "Peers of one generation differ in what they add; unknown fields are ignored, not refused.",
    "validation": "A body that breaks the protocol is answered 422, so that a trainer's mistake is seen at once.",
}
"""Every check, and why it is one."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """Something that a server did otherwise than the protocol says."""

    check: str
    """A key of CHECKS."""
    where: str
    """The scenario, or the address."""
    text: str
    advice: bool = False


@dataclass(slots=True)
class Call:
    """A model call, as the trainer saw it. Times in seconds since the rollout was begun."""

    at: float
    path: str
    authorization: str | None
    body: dict[str, Any] | None
    problems: list[Deviation] = field(default_factory=list)
    """What was wrong with the call itself."""
    status: int | None = None
    """As answered; None: the connection was closed."""
    answered_at: float = 0.0
    message: Message | None = None
    """What the model said."""
    prompt_tokens: int = 0
    sampled_tokens: int = 0


@dataclass(slots=True)
class Report:
    """A post of generation B to the completed callback."""

    at: float
    authorization: str | None
    body: Any
    status: int


@dataclass(slots=True)
class Begun:
    """What the server answered to the request that begins a rollout."""

    status: int | None
    """None: nothing came; `said` says why."""
    said: Any


@dataclass(slots=True)
class Played:
    """One scenario, as it went."""

    scenario: Scenario
    generation: Generation
    rollout_id: str
    key: str
    messages: list[Message]
    """Of the request."""
    begun: list[Begun] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    """Paths of model calls that this generation's trainer does not have; they got 404."""
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    """Until the end was known, or given up."""
    timed_out: bool = False


def read_call(
    body: Any,
    *,
    scenario: str,
    generation: Generation,
    rollout_id: str,
    history: Sequence[Message],
    opening: Sequence[Message],
    sampling: dict[str, Any],
) -> tuple[list[Message] | None, list[Deviation]]:
    """The messages that a call adds to `history`, or None where it cannot be answered; and what is wrong with it.

    `opening`: the request's messages, which the first call must have in order.
    """

    def off(check: str, text: str, advice: bool = False) -> Deviation:
        return Deviation(check, scenario, text, advice)

    try:
        call = CompletionRequest.model_validate(body)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        return None, [off("call", f"{place}: {first['msg']}")]
    found = []
    if call.rollout_id != rollout_id:
        found.append(off("call", f"rollout_id is {shown(call.rollout_id)}, not {rollout_id!r}"))
    found += [
        off("sampling", f"{name} is {shown(body.get(name))}, and {sampling[name]} was asked for")
        for name in ("temperature", "top_p")
        if name in sampling and body.get(name) != sampling[name]
    ]
    if (asked := sampling.get("max_tokens")) is not None and not call.max_tokens <= asked:
        found.append(off("sampling", f"max_tokens is {call.max_tokens}, and at most {asked} were asked for"))
    if generation == "B":
        if nulls := sorted(name for name, value in body.items() if value is None):
            found.append(off("call", f"has nulls, which B leaves out: {', '.join(nulls)}", advice=True))
        if call.response_mask is not None:
            found.append(off("call", "has a response_mask, which B does not know", advice=True))
    if history:
        new = added_messages(history, call.messages)
    else:
        new = list(call.messages)
        left = iter(call.messages)
        if not all(any(first_difference(wanted, given) is None for given in left) for wanted in opening):
            found.append(off("history", "the first call does not have the request's messages, in their order"))
    if isinstance(new, str):
        return None, [*found, off("history", new)]
    found += [off("tool-answers", text) for text in _unanswered(history, new)]
    return new, found


def _unanswered(history: Sequence[Message], new: Sequence[Message]) -> list[str]:
    """What is wrong with the answers to the tool calls of the last turn."""
    asked = [call.get("id") for call in (history[-1].get("tool_calls") or [])] if history else []
    given = [message for message in new if message.get("role") == "tool"]
    found = []
    for identifier in asked:
        number = sum(message.get("tool_call_id") == identifier for message in given)
        if number != 1:
            found.append(f"tool call {identifier!r} got {number} answers before the next call")
    if stray := [message.get("tool_call_id") for message in given if message.get("tool_call_id") not in asked]:
        found.append(f"answers to tool calls that the model did not make: {', '.join(map(repr, stray))}")
    return found


def failed_tools(scenario: str, new: Sequence[Message]) -> list[Deviation]:
    """What is wrong with the answers of tools that cannot have worked."""
    return [
        Deviation("tool-answers", scenario, f"a failing tool answered {shown(content)}, without `{TOOL_ERROR}`")
        for message in new
        if message.get("role") == "tool"
        and not (isinstance(content := message.get("content"), str) and content.startswith(TOOL_ERROR))
    ]


def shown(value: Any) -> str:
    """A peer's value in an error, bounded."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
    return repr(text) if isinstance(value, str) else text
