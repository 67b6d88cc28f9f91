"""One turn of the model, put together from its streamed chunks while they are shown.

Invariant: every fragment is shown exactly once or never. Content is shown as it comes, and so is reasoning unless
the client does not want it. A tool call is held until its name is whole (its first arguments, the next call or the
end); then it is shown from its start if it is the client's, and never if it is the agent's own or unknown. What is
shown and what is kept are the same text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rollout.agents.chat_engine import Chunk
from rollout.agents.tools_merge import Kind
from rollout.tasks import Message
from rollout.tool_calls import ToolCall

# vLLM's name and the older one; a turn keeps the name that its engine uses.
REASONING = ("reasoning", "reasoning_content")


@dataclass(slots=True)
class StreamedCall:
    """A tool call as far as it has come."""

    id: str = ""
    """The engine's id; made up where it gave none, or one that the turn has already."""
    name: str = ""
    arguments: str = ""
    kind: Kind = "unknown"
    shown_id: str = ""
    """The id that the client gets, where the call is external."""
    shown_index: int = -1
    """Its place among the client's calls; -1 where it is not shown."""
    settled: bool = False
    """The name is whole, and it is decided whose it is."""

    @property
    def is_object(self) -> bool:
        """Whether the arguments are a JSON object (none at all count as an empty one)."""
        try:
            return isinstance(json.loads(self.arguments or "{}"), dict)
        except (ValueError, RecursionError):
            return False

    def to_tool_call(self) -> ToolCall:
        """The call as tools are run with it."""
        return ToolCall(self.id, self.name, self.arguments, raw=self.arguments)

    def to_message_part(self) -> dict[str, Any]:
        """The call in the conversation that the model reads.

        Arguments that are no JSON object are put as {}: engines refuse a history that they cannot parse. The
        answer to such a call quotes what was wrong.
        """
        arguments = self.arguments if self.arguments and self.is_object else "{}"
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class TurnStream:
    """Takes the chunks of one model call; gives what the client may see.

    `kind_of` says whose a tool name is; `shown_id` makes the client's id of an external call from the engine's id
    and the call's place among the external ones. Reasoning is kept in any case, and shown if `show_reasoning`.
    """

    def __init__(
        self, kind_of: Callable[[str], Kind], shown_id: Callable[[str, int], str], show_reasoning: bool = True
    ) -> None:
        self._kind_of = kind_of
        self._shown_id = shown_id
        self._show_reasoning = show_reasoning
        self._by_index: dict[int, StreamedCall] = {}
        self.calls: list[StreamedCall] = []
        self.content = ""
        self.reasoning = ""
        self.reasoning_name = REASONING[0]
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        """The engine's last word on the tokens of this turn; None: it said nothing."""

    def feed(self, chunk: Chunk) -> dict[str, Any]:
        """Take a chunk; the choice (`delta`, perhaps `logprobs`) to show for it, empty where there is none."""
        if chunk.get("usage"):
            # Some engines count along in every chunk: the last one is the whole.
            self.usage = chunk["usage"]
        # No choices at all is vLLM's form of the usage.
        choice = next((one for one in chunk.get("choices") or [] if one.get("index", 0) == 0), None)
        if choice is None:
            return {}
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        shown: dict[str, Any] = {}
        logprobs = choice.get("logprobs")
        for name in REASONING:
            if delta.get(name):
                self.reasoning += delta[name]
                self.reasoning_name = name
                if self._show_reasoning:
                    shown[name] = delta[name]
                else:
                    # They spell the reasoning's tokens out.
                    logprobs = None
                # An engine that writes both names means one text.
                break
        if delta.get("content"):
            self.content += delta["content"]
            shown["content"] = delta["content"]
        fragments: list[dict[str, Any]] = []
        for fragment in delta.get("tool_calls") or []:
            self._feed_call(fragment, fragments)
        if fragments:
            shown["tool_calls"] = fragments
        if not shown:
            return {}
        return {"delta": shown} if logprobs is None else {"delta": shown, "logprobs": logprobs}

    def end(self) -> dict[str, Any]:
        """The model has finished: the choice for what was still held."""
        fragments: list[dict[str, Any]] = []
        self._settle_all(fragments)
        return {"delta": {"tool_calls": fragments}} if fragments else {}

    def message(self) -> Message:
        """The assistant message of this turn, for the model's next prompt."""
        message: Message = {"role": "assistant", "content": self.content or None}
        if self.reasoning:
            message[self.reasoning_name] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call.to_message_part() for call in self.calls]
        return message

    @property
    def external(self) -> list[StreamedCall]:
        """The client's calls."""
        return [call for call in self.calls if call.kind == "external"]

    @property
    def hidden(self) -> list[StreamedCall]:
        """The calls that are answered here: the agent's own and the unknown."""
        return [call for call in self.calls if call.kind != "external"]

    def _feed_call(self, fragment: dict[str, Any], shown: list[dict[str, Any]]) -> None:
        call = self._call_of(fragment, shown)
        function = fragment.get("function") or {}
        # A name that came whole is not repeated by engines that send it with every fragment.
        if function.get("name") and not call.settled:
            call.name += function["name"]
        arguments = function.get("arguments") or ""
        call.arguments += arguments
        if not call.settled:
            if call.name and call.arguments:
                self._settle(call, shown)
        elif arguments and call.shown_index >= 0:
            shown.append({"index": call.shown_index, "function": {"arguments": arguments}})

    def _call_of(self, fragment: dict[str, Any], shown: list[dict[str, Any]]) -> StreamedCall:
        told = fragment.get("id") or ""
        index = fragment.get("index")
        if index is None:
            # Without numbers, an id of its own begins a call.
            last = len(self.calls) - 1
            index = last if last >= 0 and told in ("", self.calls[-1].id) else last + 1
        call = self._by_index.get(index)
        if call is None or (told and call.id and told != call.id):
            # Another id under the same number is another call: added to it, both would be spoilt.
            self._settle_all(shown)
            call = self._by_index[index] = StreamedCall(id=told)
            self.calls.append(call)
        elif told and not call.id:
            call.id = told
        return call

    def _settle_all(self, shown: list[dict[str, Any]]) -> None:
        for call in self.calls:
            if not call.settled:
                self._settle(call, shown)

    def _settle(self, call: StreamedCall, shown: list[dict[str, Any]]) -> None:
        call.settled = True
        if not call.id or any(other.id == call.id for other in self.calls if other is not call):
            call.id = f"call_{uuid.uuid4().hex}"
        call.kind = self._kind_of(call.name)
        if call.kind != "external":
            return
        call.shown_index = sum(other.shown_index >= 0 for other in self.calls)
        call.shown_id = self._shown_id(call.id, call.shown_index)
        function = {"name": call.name, "arguments": call.arguments}
        shown.append({"index": call.shown_index, "id": call.shown_id, "type": "function", "function": function})


class UsageSum:
    """Tokens of all turns of a request."""

    def __init__(self) -> None:
        self._total: dict[str, Any] = {}
        self._known = True
        self._turns = 0

    def add(self, usage: dict[str, Any] | None) -> None:
        """Count one turn. One that said nothing makes the whole unknown: a sum that leaves it out would be false."""
        self._turns += 1
        if usage is None:
            self._known = False
        else:
            _add(self._total, usage)

    @property
    def total(self) -> dict[str, Any] | None:
        """OpenAI's usage object; None where it is not known."""
        return self._total if self._known and self._turns else None

    @property
    def sampled(self) -> int:
        """Completion tokens that are known of."""
        return int(self._total.get("completion_tokens", 0))


def _add(total: dict[str, Any], usage: dict[str, Any]) -> None:
    for name, value in usage.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            total[name] = total.get(name, 0) + value


class Folded:
    """Chunks for a client, put together into one `chat.completion`."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._calls: list[dict[str, Any]] = []
        self._logprobs: dict[str, list[Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        self._head = self._head or {name: chunk[name] for name in ("id", "created", "model")}
        self._usage = chunk.get("usage") or self._usage
        if "agent_event" in chunk:
            self._events.append(chunk["agent_event"])
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            for name, tokens in (choice.get("logprobs") or {}).items():
                if isinstance(tokens, list):
                    self._logprobs.setdefault(name, []).extend(tokens)
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    self._add_calls(value)
                elif name != "role" and value:
                    self._message[name] = (self._message.get(name) or "") + value

    def _add_calls(self, fragments: list[dict[str, Any]]) -> None:
        for fragment in fragments:
            if fragment["index"] == len(self._calls):
                self._calls.append({"id": fragment["id"], "type": "function", "function": dict(fragment["function"])})
            else:
                self._calls[fragment["index"]]["function"]["arguments"] += fragment["function"]["arguments"]

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message so far."""
        if self._calls:
            return {**self._message, "tool_calls": self._calls}
        # Without calls, a content that is null is no text to those who read it.
        return {**self._message, "content": self._message["content"] or ""}

    @property
    def completion(self) -> dict[str, Any]:
        """The `chat.completion`."""
        choice: dict[str, Any] = {"index": 0, "message": self.message, "finish_reason": self._finish_reason}
        choice["logprobs"] = self._logprobs or None
        whole = {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage}
        return {**whole, "agent_events": self._events} if self._events else whole
