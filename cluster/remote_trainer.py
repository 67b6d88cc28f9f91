"""A trainer that plays a script: what `rollout remote check` lets a rollout server talk to.

Invariant: it answers as a real trainer does, and refuses (422) what a real one must refuse, so that a server sees
here what it will see there. Prompts and sampled tokens are the chat format's; nothing is sampled. Every call is
recorded before it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.errors import ConfigError, RenderError, RolloutError
from rollout.remote.conformance import Call, Deviation, Played, Report, failed_tools, read_call
from rollout.remote.conformance_plan import BEFORE_TOOL, BROKEN_ARGUMENTS, CUT_TEXT, TEXT, UNKNOWN_TOOL, Speech, Step
from rollout.remote.history import plain_content
from rollout.remote.mask import MaskHints, check_mask
from rollout.remote.wire import COMPLETION_PATHS
from rollout.rendering import ChatRenderer
from rollout.tasks import Message

MAX_BODY_BYTES = 16 * 2**20
# Where no tokenizer is at hand tokens are characters by this many, as good as any for a usage block.
CHARACTERS_PER_TOKEN = 4
SHUTDOWN_SECONDS = 1.0
COMPLETED = "rollout/completed"


class Voice:
    """What the scripted model says, as messages and, with a tokenizer, as tokens."""

    def __init__(self, chat: ChatRenderer | None) -> None:
        self.chat = chat
        self.tools: list[dict[str, Any]] = []
        """Those that are written into the prompt."""
        self._call: tuple[str, str] | None = None

    def know(self, tools: list[dict[str, Any]], call: tuple[str, str] | None, in_prompt: bool) -> None:
        """`call`: name and JSON arguments of a tool call that works; None: no script with tools is played."""
        self.tools, self._call = tools if in_prompt else [], call

    def message(self, speech: Speech, turn: int) -> Message:
        """An assistant message in OpenAI's form."""
        if speech == "text":
            return {"role": "assistant", "content": TEXT}
        if speech == "cut":
            return {"role": "assistant", "content": CUT_TEXT}
        name, arguments = self._call or (UNKNOWN_TOOL, "{}")
        if speech == "unknown_tool":
            name = UNKNOWN_TOOL
        elif speech == "bad_arguments":
            arguments = BROKEN_ARGUMENTS
        calls = [
            {"id": f"call_{turn}_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index in range(2 if speech == "two_tools" else 1)
        ]
        return {"role": "assistant", "content": BEFORE_TOOL, "tool_calls": calls}

    def prompt(self, before: Tokens, messages: Sequence[Message], new: Sequence[Message]) -> list[int]:
        """The prompt of the next call, which begins with all tokens so far. Raises RenderError."""
        assert self.chat is not None
        if not before.prompt:
            return list(self.chat.render(messages, self.tools))
        context = before.prompt + before.sampled
        # As the protocol has it: the template, applied to all messages.
        ids: list[int] | None = self.chat.render([_with_objects(message) for message in messages], self.tools)
        if ids is None or ids[: len(context)] != context:
            ids = self.chat.extend(before.prompt, before.sampled, new, self.tools)
        if ids is None or ids[: len(context)] != context:
            raise RenderError(f"{self.chat.name}: this chat template rewrites what was said, so that no mask fits")
        return list(ids)

    def sampled(self, message: Message, step: Step) -> tuple[Message, list[int]]:
        """The message, and its tokens as a model would have written them.

        Where the prompt opens with thinking, the message's text becomes thought. Raises ConfigError for a chat format
        that does not show how its calls are written.
        """
        chat = self.chat
        assert chat is not None
        if step.speech == "cut":
            return message, list(chat.tokenizer.encode(CUT_TEXT, add_special_tokens=False))
        opening: list[Message] = [{"role": "user", "content": "?"}]
        calls = message.get("tool_calls", [])
        # Something must follow: templates write the last turn otherwise than those before.
        following: list[Message] = [
            {"role": "tool", "content": "1", "tool_call_id": call["id"], "name": call["function"]["name"]}
            for call in calls
        ] or [{"role": "user", "content": "?"}]
        base = chat.render(opening, self.tools)
        thought = {**message, "content": "", "reasoning_content": message["content"]}
        for after in (following, []):
            for said in (message, thought) if calls else (message,):
                whole = chat.render([*opening, _with_objects(said), *after], self.tools)
                rest = whole[len(base) :]
                ends = [index for index, token in enumerate(rest) if token in chat.stop_token_ids]
                if whole[: len(base)] == base and ends:
                    return said, list(rest[: ends[0] + step.end_sampled])
        if not calls:
            # Its form does not matter, as nothing follows it.
            text = chat.tokenizer.encode(TEXT, add_special_tokens=False)
            return message, [*text, *chat.stop_token_ids[: int(step.end_sampled)]]
        raise ConfigError(f"the chat format {chat.name!r} does not show how a model writes a tool call")


@dataclass(slots=True)
class Tokens:
    """A rollout's context after its last answer."""

    prompt: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Rollout:
    played: Played
    sampling: dict[str, Any]
    started: float
    history: list[Message] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    last: Step | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedTrainer:
    """The trainer's endpoints on a port of this machine, for many rollouts at once."""

    def __init__(self, voice: Voice, listen: tuple[str, int], public: str | None) -> None:
        """`listen`: host and port, 0 for a free one. `public`: the URL by which the server reaches it, if another."""
        self.voice = voice
        self._listen = listen
        self._public = public
        self._rollouts: dict[str, _Rollout] = {}
        self._runner: Any = None
        self.url = ""
        self.failure: RolloutError | None = None
        """Why a call could not be answered, though it was none of the server's fault."""

    async def start(self) -> None:
        """Listen. Raises ConfigError for an address that cannot be had."""
        from aiohttp import web

        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/{rollout}/v1/{rest:.+}", self._post)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
        await self._runner.setup()
        host, port = self._listen
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as failure:
            await self.close()
            raise ConfigError(f"--listen {host}:{port}: {failure.strerror or failure}") from None
        port = self._runner.addresses[0][1]
        shown = f"[{host}]" if ":" in host else host
        self.url = (self._public or f"http://{shown}:{port}").rstrip("/")

    async def close(self) -> None:
        """Stop listening; whoever waits for an answer is cut off."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def expect(self, played: Played, sampling: dict[str, Any]) -> str:
        """Take calls for a rollout from now on. Returns its server_url."""
        self._rollouts[played.rollout_id] = _Rollout(played, sampling, time.perf_counter())
        return self.address(played.rollout_id)

    def address(self, rollout_id: str) -> str:
        """The server_url of a rollout; one of its own, so that a call with a broken body is known too."""
        return f"{self.url}/{rollout_id}"

    async def ended(self, rollout_id: str) -> None:
        """Wait until a report of the end was taken."""
        await self._rollouts[rollout_id].ended.wait()

    async def _post(self, request: Any) -> Any:
        rollout = self._rollouts.get(request.match_info["rollout"])
        if rollout is None:
            return _refused(404, "no such rollout")
        at = time.perf_counter() - rollout.started
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            body = None
        key = request.headers.get("authorization")
        rest = request.match_info["rest"]
        if rest == COMPLETED:
            return self._report(rollout, at, key, body)
        path = f"/v1/{rest}"
        if path != COMPLETION_PATHS[rollout.played.generation]:
            rollout.played.elsewhere.append(path)
            return _refused(404, "Not Found")
        call = Call(at, path, key, body if isinstance(body, dict) else None)
        rollout.played.calls.append(call)
        try:
            return await self._answer(rollout, call, request)
        except RolloutError as failure:
            self.failure = failure
            return _refuse(call, str(failure))
        finally:
            call.answered_at = time.perf_counter() - rollout.started

    def _report(self, rollout: _Rollout, at: float, key: str | None, body: Any) -> Any:
        from aiohttp import web

        statuses = rollout.played.scenario.report_statuses
        number = len(rollout.played.reports)
        status = statuses[number] if number < len(statuses) else 200
        rollout.played.reports.append(Report(at, key, body, status))
        if status == 200:
            rollout.ended.set()
        return web.json_response({"status": "ok"} if status == 200 else {"detail": "scripted"}, status=status)

    async def _answer(self, rollout: _Rollout, call: Call, request: Any) -> Any:
        from aiohttp import web

        played = rollout.played
        name = played.scenario.name
        step = played.scenario.step(len(played.calls) - 1)
        new, problems = read_call(
            call.body,
            scenario=name,
            generation=played.generation,
            rollout_id=played.rollout_id,
            history=rollout.history,
            opening=played.messages,
            sampling=rollout.sampling,
        )
        call.problems += problems
        if new is None:
            return _refuse(call, problems[-1].text)
        if rollout.last is not None and rollout.last.speech in ("unknown_tool", "bad_arguments"):
            call.problems += failed_tools(name, new)
        messages = [*rollout.history, *new]
        tokens = Tokens()
        if self.voice.chat is not None and played.generation != "B":
            tokens.prompt = self.voice.prompt(rollout.tokens, messages, new)
            assert call.body is not None
            problem = self._mask_problem(rollout, call.body.get("response_mask"), tokens.prompt, new)
            if problem is not None:
                call.problems.append(Deviation("mask", name, f"call {len(played.calls)}: {problem}"))
                return _refuse(call, problem)
        if step.hang_up:
            request.transport.close()
            return web.Response()
        if step.delay_s:
            await asyncio.sleep(step.delay_s)
        if step.status != 200:
            call.status = step.status
            return _refused(step.status, "scripted", step.retry_after)
        message = self.voice.message(step.speech, len(played.calls) - 1)
        if tokens.prompt:
            message, tokens.sampled = self.voice.sampled(message, step)
            call.prompt_tokens, call.sampled_tokens = len(tokens.prompt), len(tokens.sampled)
        else:
            call.prompt_tokens = len(json.dumps(messages)) // CHARACTERS_PER_TOKEN
            call.sampled_tokens = len(json.dumps(message)) // CHARACTERS_PER_TOKEN
        call.message, call.status = message, 200
        rollout.history, rollout.tokens, rollout.last = [*messages, message], tokens, step
        return web.json_response(_body(call, tokens, step))

    def _mask_problem(
        self, rollout: _Rollout, given: list[int] | None, prompt: list[int], new: Sequence[Message]
    ) -> str | None:
        before, chat = rollout.tokens, self.voice.chat
        assert chat is not None
        text = "".join(content for item in new if isinstance(content := plain_content(item.get("content")), str))
        hints = MaskHints(
            prompt=len(prompt),
            answer=len(before.sampled),
            text=len(chat.tokenizer.encode(text, add_special_tokens=False)),
            end_of_turn_sampled=bool(before.sampled) and before.sampled[-1] in chat.stop_token_ids,
        )
        added = len(prompt) - len(before.prompt) - len(before.sampled)
        return check_mask(given, added, first=not before.prompt, hints=hints)


def _body(call: Call, tokens: Tokens, step: Step) -> dict[str, Any]:
    """The answer on the wire. B has no token arrays, as they are optional there."""
    assert call.message is not None
    reason = "length" if step.speech == "cut" else ("tool_calls" if call.message.get("tool_calls") else "stop")
    body: dict[str, Any] = {
        "id": "conformance",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "default",
        "choices": [{"index": 0, "message": call.message, "finish_reason": reason}],
    }
    if tokens.prompt:
        logprobs = [-0.5] * len(tokens.sampled)
        return {**body, "token_ids": tokens.sampled, "logprobs": logprobs, "prompt_token_ids": tokens.prompt}
    total = call.prompt_tokens + call.sampled_tokens
    usage = {"prompt_tokens": call.prompt_tokens, "completion_tokens": call.sampled_tokens, "total_tokens": total}
    return {**body, "usage": usage}


def _refuse(call: Call, text: str) -> Any:
    call.status = 422
    return _refused(422, text)


def _refused(status: int, text: str, retry_after: float | None = None) -> Any:
    from aiohttp import web

    headers = {} if retry_after is None else {"retry-after": f"{retry_after:g}"}
    return web.json_response({"detail": text}, status=status, headers=headers)


def _with_objects(message: Message) -> Message:
    """Arguments as objects, in which form chat formats write them; broken ones stay text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
