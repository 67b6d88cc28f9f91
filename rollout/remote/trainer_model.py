"""A trainer somewhere else as the assistant of a session: messages out, one assistant turn back.

Invariant: the history only grows, and an assistant message goes back to the trainer exactly as it came. In
generation A every call says with its mask how many tokens were added since the answer before; the prompt behind that
number is counted from the trainer's own tokens, never from text that was sampled, and the prompt that the trainer
reports must be that prompt, token by token, or the rollout ends. In generation B the trainer keeps the tokens; what
it tells of them is written down as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from rollout.engine import Generation as Sampled
from rollout.engine import VersionSpan
from rollout.errors import LedgerError, RenderError
from rollout.ledger import IDS, LOGPROBS, Ledger, Segment, first_difference
from rollout.limits import Limits
from rollout.next_prompt import NextPrompt, characters, next_prompt
from rollout.remote.failures import RemoteFailure
from rollout.remote.mask import MaskBook
from rollout.remote.order import RolloutOrder
from rollout.remote.trainer_client import TrainerClient
from rollout.remote.wire import CompletionRequest, CompletionResponse
from rollout.rendering import ChatRenderer, ParsedTurn
from rollout.session_model import ModelTurn
from rollout.strict_json import as_unicode
from rollout.tasks import Message
from rollout.tool_calls import ToolCall
from rollout.trajectory import StopReason

logger = logging.getLogger(__name__)

# What generation A says of a call that is not told otherwise; B's params may leave all of it out.
DEFAULT_MAX_TOKENS = 512
# Fields of B's free params that are the call's own and never come from there.
_OWN_FIELDS = frozenset({"messages", "rollout_id", "response_mask", "tools"})
_KNOWN_PARAMS = ("temperature", "top_p", "max_tokens", "stop", "logprobs", "model")


class TrainerModel:
    """One rollout's assistant, asked from the trainer. A `SessionModel`."""

    def __init__(self, order: RolloutOrder, client: TrainerClient, chat: ChatRenderer) -> None:
        """`chat`: the trainer's chat format in A. In B it only reads tool calls that came as text."""
        self._order = order
        self._client = client
        self._chat = chat
        self._masked = order.generation != "B"
        self._limits = Limits()
        self._specs: list[dict[str, Any]] = []
        self._template_specs: list[dict[str, Any]] = []
        # Sampled tokens may be parsed: the trainer's tokens are known to be of our tokenizer.
        self._same_tokens = False
        self._ledger = Ledger()
        self._masks = MaskBook()
        self._mask: list[int] | None = None
        self._expected: list[int] | None = None
        self._used = 0
        self._first_prompt: int | None = None
        self.engine_seconds = 0.0
        """Seconds spent waiting for the trainer, repetitions included."""
        self.calls = 0
        self.prompt_tokens = 0
        self.response_tokens = 0
        self.max_context_tokens = 0
        self.failure: RemoteFailure | None = None
        """What ended the rollout, if the trainer or its tokens did."""

    @property
    def segments(self) -> list[Segment]:
        """What the trainer told of its tokens; policy version 0 throughout, as it names none."""
        return self._ledger.segments

    async def open(self, messages: Sequence[Message], specs: list[dict[str, Any]], limits: Limits) -> None:
        """Nothing is counted yet: the first prompt has no mask, and the trainer's answer says what it was."""
        self._specs, self._limits = specs, limits

    async def turn(self, index: int, messages: Sequence[Message], *, deadline: float) -> ModelTurn:
        """Ask the trainer, check its tokens, read its message."""
        try:
            return await self._turn(index, messages, deadline)
        except RemoteFailure as failure:
            self.failure = failure
            raise

    async def advance(
        self, messages: Sequence[Message], new_messages: Sequence[Message], *, seconds: float
    ) -> StopReason | None:
        """Count the next prompt and make its mask. `max_tokens` where no answer fits any more."""
        if not self._masked:
            return "max_tokens" if self._left() < 1 else None
        try:
            prompt = await self._next_prompt(messages, new_messages)
        except RemoteFailure as failure:
            self.failure = failure
            raise
        if self._used + prompt.added >= self._order.max_tokens_total:
            return "max_tokens"
        self._mask = self._masks.prompt(prompt.ids)
        self._ledger.observe(prompt.ids, role=new_messages[0]["role"], seconds=seconds)
        self._expected, self._used = prompt.ids, self._used + prompt.added
        return None

    async def _turn(self, index: int, messages: Sequence[Message], deadline: float) -> ModelTurn:
        request, extra = self._request(messages)
        left = self._left()
        seconds = deadline - asyncio.get_running_loop().time()
        started = time.perf_counter()
        self.calls += 1
        try:
            answer = await self._client.complete(request, extra=extra, seconds=max(0.0, seconds))
        finally:
            took = time.perf_counter() - started
            self.engine_seconds += took
        await self._record(messages, answer, took)
        choice = answer.choices[0]
        message = {"role": "assistant", **choice.message}
        parsed = await self._parsed(index, message, answer)
        ending: StopReason | None = None
        if choice.finish_reason == "length":
            ending = "max_tokens" if request.max_tokens >= left else "length"
        sampled = len(answer.token_ids) if answer.token_ids is not None else 0
        return ModelTurn(parsed, message, sampled, ending)

    def _request(self, messages: Sequence[Message]) -> tuple[CompletionRequest, dict[str, Any]]:
        params = self._order.params
        known = {name: params[name] for name in _KNOWN_PARAMS if params.get(name) is not None}
        wanted = known.get("max_tokens", DEFAULT_MAX_TOKENS)
        if isinstance(wanted, int):
            known["max_tokens"] = max(1, min(wanted, self._left()))
        if self._masked:
            # The answer must have them, whatever the request said.
            known["logprobs"] = True
        try:
            request = CompletionRequest(
                messages=list(messages),
                rollout_id=self._order.rollout_id,
                response_mask=self._mask,
                **known,
            )
        except ValidationError as failure:
            if any(issue["loc"][:1] == ("messages",) for issue in failure.errors(include_url=False)):
                # The trainer's own were looked at when they came.
                logger.warning("rollout %r: %s", self._order.rollout_id, failure)
                raise RemoteFailure(
                    "internal_error",
                    "a message of the rollout server's environment is not one of the protocol; its log says why",
                ) from None
            raise RemoteFailure(
                "validation_error",
                "completion_params: temperature (0 to 2), top_p (0 to 1), max_tokens, stop (a list of texts), "
                "logprobs or model is not what the protocol takes",
            ) from None
        extra = {name: value for name, value in params.items() if name not in _OWN_FIELDS and value is not None}
        return request, extra

    def _left(self) -> int:
        """Tokens that the rollout may still come to, after its first prompt."""
        return self._order.max_tokens_total - self._used

    # Tokens

    async def _record(self, messages: Sequence[Message], answer: CompletionResponse, seconds: float) -> None:
        if self._masked and not answer.has_tokens:
            raise RemoteFailure(
                "trainer_error",
                "the trainer's answer has no token_ids, logprobs and prompt_token_ids, which this generation needs",
            )
        if not answer.has_tokens:
            self._count_usage(answer)
            return
        assert answer.token_ids is not None and answer.prompt_token_ids is not None and answer.logprobs is not None
        prompt, sampled = answer.prompt_token_ids, answer.token_ids
        if self._masked:
            await self._check_prompt(messages, prompt)
        else:
            await self._take_prompt(messages, prompt)
        try:
            span = VersionSpan(0, 0, len(sampled))
            self._ledger.sample(
                Sampled(array(IDS, sampled), array(LOGPROBS, answer.logprobs), [span] if sampled else [], "stop"),
                seconds,
            )
        except LedgerError as failure:
            raise RemoteFailure("trainer_error", f"the trainer's tokens do not fit together: {failure}") from None
        if self._masked:
            self._masks.answer(sampled)
            self._used += len(sampled)
        self._count(len(prompt), len(sampled))

    async def _check_prompt(self, messages: Sequence[Message], prompt: list[int]) -> None:
        """Generation A: the prompt must be the one that was counted."""
        if self._expected is None:
            await self._adopt(messages, prompt)
            return
        position = _difference(prompt, self._expected)
        if position is None:
            return
        raise RemoteFailure(
            "tokenizer_error",
            f"prompt_token_ids has {len(prompt)} tokens and {len(self._expected)} were counted; they differ from "
            f"position {position} on. Is the trainer's tokenizer or chat template another than "
            f"{self._order.tokenizer_name or 'the one of this rollout server'}, or did it render the history anew?",
        )

    async def _adopt(self, messages: Sequence[Message], prompt: list[int]) -> None:
        """The first prompt. Some trainers' templates show the tools, others do not know them."""
        nearest, counted = -1, 0
        for specs in ([], self._specs) if self._specs else ([],):
            expected = await self._run(messages, lambda chat, tools=specs: chat.render(messages, tools))
            position = _difference(prompt, expected)
            if position is None:
                self._template_specs = specs
                break
            if position > nearest:
                nearest, counted = position, len(expected)
        else:
            raise RemoteFailure(
                "tokenizer_error",
                f"prompt_token_ids of the first call has {len(prompt)} tokens and {counted} were counted; they "
                f"differ from position {nearest} on. Is the trainer's tokenizer or chat template another than "
                f"{self._order.tokenizer_name or 'the one of this rollout server'}?",
            )
        self._same_tokens = True
        self._masks.prompt(prompt)
        self._ledger.open(prompt)

    async def _next_prompt(self, messages: Sequence[Message], new_messages: Sequence[Message]) -> NextPrompt:
        """The prompt that follows, as the trainer will come to it. Never from text that was sampled."""
        prompt = await next_prompt(
            self._chat, self._ledger, messages, new_messages, self._template_specs, template_first=True
        )
        if prompt.fork_reason is None:
            return prompt
        raise RemoteFailure(
            "tokenizer_error",
            "the chat template changes tokens of the past when the history grows, so no mask can describe what was "
            "added; use a template or options that keep earlier turns as they were sampled",
        )

    async def _take_prompt(self, messages: Sequence[Message], prompt: list[int]) -> None:
        """Generation B: written down as it is. One that does not continue the last is a segment of its own."""
        if not prompt:
            raise RemoteFailure("trainer_error", "prompt_token_ids of the trainer's answer is empty")
        if not self._ledger.segments:
            for specs in ([], self._specs):
                with contextlib.suppress(RenderError):
                    ours = await self._run(messages, lambda chat, tools=specs: chat.render(messages, tools))
                    self._same_tokens = self._same_tokens or ours == prompt
            self._ledger.open(prompt)
        elif self._ledger.extends(prompt):
            self._ledger.observe(prompt, role=str(messages[-1].get("role")))
        else:
            self._ledger.open(prompt, "the trainer's prompt does not continue the one before")

    def _count_usage(self, answer: CompletionResponse) -> None:
        if answer.usage is not None:
            self._count(answer.usage.prompt_tokens, answer.usage.completion_tokens)

    def _count(self, prompt: int, sampled: int) -> None:
        self.prompt_tokens += prompt
        self.response_tokens += sampled
        self.max_context_tokens = max(self.max_context_tokens, prompt + sampled)
        if not self._masked:
            # Without arrays this is all that is known: what the context has grown by.
            if self._first_prompt is None:
                self._first_prompt = prompt
            self._used = max(self._used, prompt + sampled - self._first_prompt)

    # Messages

    async def _parsed(self, index: int, message: Message, answer: CompletionResponse) -> ParsedTurn:
        content = _text(message.get("content"))
        if message.get("tool_calls"):
            reasoning = message.get("reasoning_content")
            calls = given_calls(index, message["tool_calls"])
            return ParsedTurn(content, reasoning if isinstance(reasoning, str) else None, calls)
        if self._same_tokens and answer.token_ids:
            prompt, sampled = answer.prompt_token_ids or [], answer.token_ids
        else:
            # Read as our own model would have said it. Nothing of this is recorded.
            prompt, sampled = [], self._chat.tokenizer.encode(content, add_special_tokens=False) if content else []
        specs = self._specs
        if not sampled:
            return ParsedTurn(content, None, [])
        parsed = await self._chat.run(len(sampled), lambda chat: chat.parse(sampled, prompt, specs, index))
        # They stand in the tools' messages, which go to the trainer: what a model writes may be no Unicode.
        calls = [call if call.name is None else replace(call, name=as_unicode(call.name)) for call in parsed.calls]
        return replace(parsed, calls=calls)

    async def _run(self, messages: Sequence[Message], work: Any) -> list[int]:
        return await self._chat.run(characters(messages), work)


def given_calls(turn: int, calls: Any) -> list[ToolCall]:
    """The tool calls of an assistant message, as a session runs them; what is no call is one that says so."""
    if not isinstance(calls, list):
        return [ToolCall(f"call_{turn}_0", None, None, "tool_calls is not a list")]
    found = []
    for index, call in enumerate(calls):
        fields = call if isinstance(call, dict) else {}
        identifier = fields.get("id")
        identifier = identifier if isinstance(identifier, str) and identifier else f"call_{turn}_{index}"
        function = fields.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        problem = None
        if not isinstance(name, str) or not name:
            problem = "the tool call has no function name"
        elif not isinstance(arguments, str | dict | None):
            problem = "the tool call's arguments are neither an object nor its JSON"
        found.append(ToolCall(identifier, name if problem is None else None, arguments, problem))
    return found


def _difference(one: list[int], other: list[int]) -> int | None:
    """First position where two prompts differ; None if they are the same."""
    if len(one) > len(other):
        one, other = other, one
    position = first_difference(array(IDS, other), array(IDS, one), array(IDS))
    return len(one) if position is None and len(one) < len(other) else position


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
