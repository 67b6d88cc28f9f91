"""Turns that wait for the client: what the agent did itself in a turn whose other calls the client runs.

OpenAI's protocol has no place for the agent's own calls and results in a turn that goes back to the client. So the
turn is held here under a key that is part of the ids of the client's calls, `call_<key>_<n>`. When the client
returns with its assistant message and tool messages, the messages of the turn are put back in its place, whole.

Invariant: a turn that is needed is put back whole or refused as lost (TurnLost); it is never forgotten in silence.
Needed is what came after the last user message; of older turns the conclusions are in the conversation already,
so they are put back while they are held and left as the client has them afterwards. Turns held are bounded in
number, bytes and time.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.errors import ApiError
from rollout.tasks import Message

# A turn that nobody has come back for: long enough for a person to approve a call.
HOLD_SECONDS = 1800.0
MAX_TURNS = 4096
# All turns together, and one of them, in characters of JSON.
MAX_CHARS = 64 * 2**20
MAX_TURN_CHARS = 4 * 2**20

_ID = re.compile(r"call_([0-9a-f]{32})_\d+")


class TurnLost(ApiError):
    """What the agent had done in a turn is no longer held. 410: clients repeat a 409 by themselves, in vain."""

    category = "turn_lost"
    status = 410


@dataclass(frozen=True, slots=True)
class HeldCall:
    """One call of the turn, in the model's order."""

    engine_id: str
    name: str
    shown_id: str | None
    """The client's id for it; None where it was answered here."""
    content: str | None
    """The answer, where it was answered here."""


@dataclass(frozen=True, slots=True)
class HeldTurn:
    """What takes the place of the client's assistant message and tool messages."""

    key: str
    agent: str
    rank: int
    """The caller's rank: results that an owner's scope gave are not for those who have less."""
    messages: Sequence[Message]
    """Everything since the request, up to the assistant message with the calls."""
    calls: Sequence[HeldCall]

    def restored(self, answers: dict[str, Message]) -> list[Message]:
        """The whole turn with the client's tool messages (by its ids). Raises ApiError for one that is missing."""
        found: list[Message] = [dict(message) for message in self.messages]
        left = dict(answers)
        for call in self.calls:
            answer: Message = {"role": "tool", "tool_call_id": call.engine_id, "name": call.name}
            if call.shown_id is None:
                answer["content"] = call.content
            else:
                told = left.pop(call.shown_id, None)
                if told is None:
                    raise ApiError(
                        f"messages: tool call {call.shown_id} ({call.name}) has no tool message that answers it",
                        "messages",
                    )
                answer["content"] = told["content"]
            found.append(answer)
        if left:
            raise ApiError(
                f"messages: a tool message answers {next(iter(left))}, which is no call of its turn", "messages"
            )
        return found


class TurnStore(Protocol):
    """Where turns are held. Gateways that share their callers must share it."""

    async def put(self, turn: HeldTurn) -> None:
        """Hold a turn. Raises ApiError where it is too large."""
        ...

    async def get(self, key: str) -> HeldTurn | None:
        """A turn, and its time starts again; None where it is not held."""
        ...


class HeldTurns:
    """Turns in this process. The oldest make room for new ones."""

    def __init__(
        self,
        *,
        seconds: float = HOLD_SECONDS,
        max_turns: int = MAX_TURNS,
        max_chars: int = MAX_CHARS,
        max_turn_chars: int = MAX_TURN_CHARS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._max_turns = max_turns
        self._max_chars = max_chars
        self._max_turn_chars = max_turn_chars
        self._now = now
        # Key to (turn, characters, end of its time), the first to end first.
        self._held: OrderedDict[str, tuple[HeldTurn, int, float]] = OrderedDict()
        self._chars = 0

    def __len__(self) -> int:
        return len(self._held)

    async def put(self, turn: HeldTurn) -> None:
        """See TurnStore."""
        size = len(json.dumps(list(turn.messages))) + sum(len(call.content or "") for call in turn.calls)
        if size > self._max_turn_chars:
            raise ApiError(
                f"the agent's own calls and results in this turn have {size} characters, more than the "
                f"{self._max_turn_chars} that are held while the client runs its tools; ask for less at once"
            )
        self._drop(turn.key)
        self._held[turn.key] = (turn, size, self._now() + self._seconds)
        self._chars += size
        self._expire()
        while len(self._held) > self._max_turns or self._chars > self._max_chars:
            self._drop(next(iter(self._held)))

    async def get(self, key: str) -> HeldTurn | None:
        """See TurnStore."""
        self._expire()
        found = self._held.get(key)
        if found is None:
            return None
        turn, size, _ = found
        self._held[key] = (turn, size, self._now() + self._seconds)
        self._held.move_to_end(key)
        return turn

    def _expire(self) -> None:
        now = self._now()
        while self._held:
            key = next(iter(self._held))
            if self._held[key][2] > now:
                return
            self._drop(key)

    def _drop(self, key: str) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self._chars -= found[1]


def new_key() -> str:
    """A key that cannot be guessed: who has it can go on with the turn."""
    return uuid.uuid4().hex


def shown_id(key: str, index: int) -> str:
    """The client's id of its call number `index` in the turn `key`."""
    return f"call_{key}_{index}"


async def restore(messages: Sequence[Message], store: TurnStore, *, agent: str, rank: int) -> list[Message]:
    """A client's conversation with the agent's own calls and results put back.

    Raises TurnLost where one is needed that is not held, ApiError for tool messages that do not fit.
    """
    found: list[Message] = []
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    position = 0
    while position < len(messages):
        message = messages[position]
        key = _key_of(message)
        after = position + 1
        if key is None:
            _check_not_alone(message, position)
            found.append(message)
            position = after
            continue
        while after < len(messages) and messages[after]["role"] == "tool":
            after += 1
        turn = await store.get(key)
        if turn is not None and turn.agent == agent and turn.rank <= rank:
            found.extend(turn.restored(_answers(messages[position + 1 : after])))
        elif position > last_user:
            raise TurnLost(
                f"messages.{position}: what the agent did itself in this turn is no longer held (it waits a limited "
                "time, in the cluster's memory); send the conversation again from its last user message",
                f"messages.{position}",
            )
        else:
            found.extend(messages[position:after])
        position = after
    return found


def _key_of(message: Message) -> str | None:
    if message["role"] != "assistant":
        return None
    matches = [_ID.fullmatch(call["id"]) for call in message.get("tool_calls") or []]
    keys = {match[1] for match in matches if match}
    if len(keys) > 1:
        raise ApiError("messages: an assistant message has tool calls of several turns", "messages")
    return keys.pop() if keys else None


def _check_not_alone(message: Message, position: int) -> None:
    if message["role"] != "tool" or not _ID.fullmatch(message["tool_call_id"]):
        return
    raise ApiError(
        f"messages.{position}: answers {message['tool_call_id']}, but the assistant message with that call is not "
        "right before it; send the messages as you got them",
        f"messages.{position}",
    )


def _answers(messages: Sequence[Message]) -> dict[str, Message]:
    answers: dict[str, Message] = {}
    for message in messages:
        if message["tool_call_id"] in answers:
            raise ApiError(f"messages: {message['tool_call_id']} is answered twice", "messages")
        answers[message["tool_call_id"]] = message
    return answers
