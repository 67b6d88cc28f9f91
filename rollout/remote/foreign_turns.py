"""The tokens of a rollout that somebody else plays: messages come in, prompts as ids go to the engine.

Invariant: every token is the chat format's or the engine's, and is written by the ledger alone; of what the rollout
server says, only messages are read, and they may only grow. A prompt is recorded with what was sampled for it, or
not at all, so that a call that failed may be made again.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from array import array
from collections.abc import Sequence
from typing import Any

from rollout.engine import Engine, Generation
from rollout.environment import Turn
from rollout.errors import EngineDied, LedgerError, RefusedError, RenderError
from rollout.ledger import IDS, Ledger, Segment
from rollout.limits import Limits
from rollout.next_prompt import NextPrompt, characters, next_prompt
from rollout.remote.history import added_messages, plain_content
from rollout.remote.mask import MaskHints, check_mask
from rollout.remote.wire import Choice, CompletionRequest, CompletionResponse, Usage
from rollout.rendering import OFFLOAD_SIZE, ChatRenderer, ParsedTurn
from rollout.sampling import Sampling, turn_parameters
from rollout.tasks import Message
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import SessionKey, StopReason

# How a failing tool begins what it says, in this protocol.
TOOL_ERROR = "Error:"
MAX_TOOL_ERROR_CHARS = 500


class TurnRefused(RefusedError):
    """A call that cannot be answered, and with which the rollout has come to its end."""

    def __init__(self, message: str, ending: StopReason, field: str | None = None) -> None:
        super().__init__(message, field)
        self.ending: StopReason = ending


class ForeignTurns:
    """One rollout's turns. Used by one call at a time."""

    def __init__(
        self,
        key: SessionKey,
        engine: Engine,
        chat: ChatRenderer,
        sampling: Sampling,
        limits: Limits,
        *,
        masked: bool,
    ) -> None:
        """`masked`: the rollout server sends a response_mask, as in A and A1."""
        self._key = key
        self._engine = engine
        self._chat = chat
        self._sampling = sampling
        self._limits = limits
        self._masked = masked
        self._ledger = Ledger()
        self._answered_at = 0.0
        self.messages: list[Message] = []
        """The conversation, each answer included."""
        self.turns: list[Turn] = []
        self.tool_calls: list[ToolCallRecord] = []
        """What became of the calls, as far as later messages say."""
        self.cut: StopReason | None = None
        """Why the last turn was cut; None: it is whole."""
        self.overruled: dict[str, Any] = {}
        """Sampling parameters that calls asked for and did not get: the run's are the trainer's."""
        self.engine_seconds = 0.0

    @property
    def segments(self) -> list[Segment]:
        """The ledger's."""
        return self._ledger.segments

    @property
    def num_sampled(self) -> int:
        """Tokens that the engine sampled so far."""
        return sum(segment.num_sampled for segment in self._ledger.segments)

    async def answer(
        self, request: CompletionRequest, tools: list[dict[str, Any]], *, deadline: float
    ) -> CompletionResponse:
        """The next assistant turn. `deadline`: a time on the event loop's clock.

        Raises TurnRefused where no call of this rollout can be answered any more, EngineTimeout, EngineDied or
        EngineRefused. Whatever is raised, nothing of the call was recorded.
        """
        arrived = time.perf_counter()
        if len(self.turns) >= self._limits.max_turns:
            raise TurnRefused(f"the rollout has had its {self._limits.max_turns} turns", "max_turns")
        given = list(request.messages)
        new = added_messages(self.messages, given)
        if isinstance(new, str):
            raise TurnRefused(new, "error", "messages")
        if not self._masked:
            # Some templates write it down. Where a mask counts the template's tokens, the message is the server's.
            new = [self._named(message) for message in new]
        # Our own form of what was said before: clients drop fields on the way that a template may read.
        conversation = [*self.messages, *new]
        prompt = await self._prompt(conversation, new, tools)
        self._check_mask(request, prompt, new)
        left = self._check_room(prompt)
        generation, bounded_by_limit = await self._generate(prompt.ids, request, left, deadline)
        completion = generation.token_ids.tolist()
        parsed = await self._parse(prompt.ids, completion, tools)
        # From here on nothing waits: a call is recorded whole.
        self._record(prompt, new, generation, arrived)
        self.cut = None
        if generation.finish_reason == "length":
            self.cut = "max_tokens" if bounded_by_limit else "length"
        self._note_tools(new, arrived)
        message = parsed.to_message()
        self.messages = [*conversation, message]
        self.turns.append(Turn(len(self.turns), parsed.content, parsed.reasoning, num_tokens=len(completion)))
        self._answered_at = time.perf_counter()
        return _response(request, prompt.ids, generation, message)

    async def _prompt(
        self, conversation: list[Message], new: list[Message], tools: list[dict[str, Any]]
    ) -> NextPrompt:
        try:
            if not self.turns:
                return NextPrompt(await self._chat.run(characters(new), lambda chat: chat.open(new, tools)), 0)
            prompt = await next_prompt(
                self._chat, self._ledger, conversation, new, tools, template_first=self._masked
            )
        except RenderError as failure:
            raise TurnRefused(str(failure), "error", "messages") from None
        if self._masked and prompt.fork_reason is not None:
            # A mask speaks of one unbroken context, and there is none any more.
            raise TurnRefused(
                f"{prompt.fork_reason}: the new prompt does not begin with what was sampled before, so that no "
                "response_mask describes it. A chat template that drops earlier thinking does so. Use generation B, "
                "or model.renderer_options that keep it",
                "error",
                "messages",
            )
        return prompt

    def _check_mask(self, request: CompletionRequest, prompt: NextPrompt, new: list[Message]) -> None:
        if not self._masked and request.response_mask is None:
            return
        first = not self.turns
        problem = check_mask(request.response_mask, prompt.added, first=first)
        if problem is None:
            return
        if not first:
            # Once more, with what takes counting.
            hints = self._hints(prompt.ids, new)
            problem = check_mask(request.response_mask, prompt.added, first=False, hints=hints)
        assert problem is not None, "hints explain, they do not decide"
        raise TurnRefused(problem, "error", "response_mask")

    def _hints(self, prompt: list[int], new: list[Message]) -> MaskHints:
        segment = self._ledger.segments[-1]
        answer = segment.response_ids[segment.turns[-1].start :]
        text = "".join(content for m in new if isinstance(content := plain_content(m.get("content")), str))
        short = len(text) <= OFFLOAD_SIZE
        return MaskHints(
            prompt=len(prompt),
            answer=len(answer),
            text=len(self._chat.tokenizer.encode(text, add_special_tokens=False)) if short else None,
            end_of_turn_sampled=bool(answer) and answer[-1] in self._chat.stop_token_ids,
        )

    def _check_room(self, prompt: NextPrompt) -> int:
        """Tokens that limits.max_response_tokens leaves for the answer."""
        window = self._engine.max_model_len
        if len(prompt.ids) >= window:
            text = f"the prompt has {len(prompt.ids)} tokens and fills the model's context of {window}"
            if not self.turns:
                raise TurnRefused(f"{text}; shorten the task or raise engine.vllm.max_model_len", "error", "messages")
            raise TurnRefused(f"{text}; end the rollout", "length", "messages")
        limit = self._limits.max_response_tokens
        used = self._ledger.num_response_tokens + prompt.added
        if used >= limit:
            raise TurnRefused(
                f"the rollout has {used} tokens after its first prompt, and may have {limit} "
                "(limits.max_response_tokens); end it",
                "max_tokens",
                "messages",
            )
        return limit - used

    async def _generate(
        self, prompt: list[int], request: CompletionRequest, left: int, deadline: float
    ) -> tuple[Generation, bool]:
        """What the engine samples, and whether `left` was its bound."""
        room = self._engine.max_model_len - len(prompt)
        wanted = self._sampling.max_tokens
        if "max_tokens" in request.model_fields_set:
            wanted = min(wanted, request.max_tokens)
        timeout = min(self._limits.engine_seconds, deadline - asyncio.get_running_loop().time())
        started = time.perf_counter()
        try:
            generation = await self._engine.generate(
                array(IDS, prompt),
                self._turn_sampling(request, min(wanted, room, left)),
                session_id=self._key.trajectory_id,
                timeout=timeout,
            )
        finally:
            self.engine_seconds += time.perf_counter() - started
        if generation.finish_reason == "abort":
            raise EngineDied("the engine aborted the request")
        return generation, left < min(wanted, room)

    def _turn_sampling(self, request: CompletionRequest, budget: int) -> dict[str, Any]:
        sampling = turn_parameters(
            self._sampling,
            budget,
            stop_token_ids=self._chat.stop_token_ids,
            sample=f"{self._key.task_id}/{self._key.sample_index}",
            turn=len(self.turns),
        )
        for name in ("temperature", "top_p"):
            if name in request.model_fields_set and (asked := getattr(request, name)) != getattr(
                self._sampling, name
            ):
                self.overruled[name] = asked
        # A rollout server may end turns earlier than the run does, not later.
        if extra := [text for text in request.stop or [] if text]:
            sampling["stop"] = list(dict.fromkeys([*self._sampling.stop, *extra]))
        return sampling

    async def _parse(self, prompt: list[int], completion: list[int], tools: list[dict[str, Any]]) -> ParsedTurn:
        index = len(self.turns)
        try:
            return await self._chat.run(len(completion), lambda chat: chat.parse(completion, prompt, tools, index))
        except RenderError as failure:
            raise TurnRefused(str(failure), "error") from None

    def _record(self, prompt: NextPrompt, new: list[Message], generation: Generation, arrived: float) -> None:
        try:
            if not self.turns or prompt.fork_reason is not None:
                self._ledger.open(prompt.ids, prompt.fork_reason)
            else:
                self._ledger.observe(prompt.ids, role=new[0]["role"], seconds=arrived - self._answered_at)
            self._ledger.sample(generation, time.perf_counter() - arrived)
        except LedgerError as failure:
            raise TurnRefused(str(failure), "error") from None

    def _named(self, message: Message) -> Message:
        """A tool's message with the name of the tool, which is known by the call that it answers."""
        if message.get("role") != "tool" or message.get("name") or not self.turns:
            return message
        name = self._tool_name(message)
        return message if name is None else {**message, "name": name}

    def _tool_name(self, message: Message) -> str | None:
        called = message.get("tool_call_id")
        for call in self.messages[-1].get("tool_calls", []):
            if call["id"] == called:
                return call["function"]["name"]
        name = message.get("name")
        return name if isinstance(name, str) else None

    def _note_tools(self, new: Sequence[Message], arrived: float) -> None:
        """What the tools of the last turn came to. Their time is that of all of them: nobody says more."""
        if not self.turns:
            return
        seconds = arrived - self._answered_at
        for message in new:
            if message.get("role") not in ("tool", "function"):
                continue
            content = plain_content(message.get("content"))
            failed = isinstance(content, str) and content.startswith(TOOL_ERROR)
            record = ToolCallRecord(
                name=self._tool_name(message) or "unknown",
                ok=not failed,
                seconds=seconds,
                error=f"exception: {content[:MAX_TOOL_ERROR_CHARS]}" if failed else None,
            )
            self.tool_calls.append(record)
            self.turns[-1].tool_calls.append(record)


def _response(
    request: CompletionRequest, prompt: list[int], generation: Generation, message: Message
) -> CompletionResponse:
    reason = "length" if generation.finish_reason == "length" else "stop"
    if reason == "stop" and message.get("tool_calls"):
        reason = "tool_calls"
    count = len(generation.token_ids)
    return CompletionResponse(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model,
        choices=[Choice(message=openai_message(message), finish_reason=reason)],
        token_ids=generation.token_ids.tolist(),
        logprobs=generation.logprobs.tolist(),
        prompt_token_ids=prompt,
        usage=Usage(prompt_tokens=len(prompt), completion_tokens=count, total_tokens=len(prompt) + count),
    )


def openai_message(message: Message) -> Message:
    """An assistant message with its calls' arguments as JSON text, which is OpenAI's form."""
    calls = []
    for call in message.get("tool_calls", []):
        given = call["function"]["arguments"]
        text = given if isinstance(given, str) else json.dumps({} if given is None else given, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls} if calls else dict(message)
