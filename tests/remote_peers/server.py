"""A rollout server that speaks A, A1 and B, and can be told to make each mistake on purpose."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
from aiohttp import web

from tests.remote_peers.chatml import ChatMl, Message

FAULTS = {
    # of the mask
    "no_mask": "sends no mask after tools",
    "mask_on_first": "sends a mask with the first call",
    "mask_a_call_late": "sends the mask of a call with the one after it",
    "one_more": "counts the end-of-turn token that was sampled",
    "one_less": "takes an end-of-turn token that was added for sampled",
    "other_tokenizer": "counts with another tokenizer",
    "tool_text": "counts the tool's text without the template around it",
    "whole_prompt": "sends a mask for the whole prompt",
    "answer_counted": "forgets to add the answer's tokens to what it has counted",
    "ones": "sends ones",
    "cuts_history": "cuts old tool results, without a mask",
    # of the rest
    "changes_answer": "sends the model's answer back with other words",
    "drops_system": "leaves the system message out of the first call",
    "no_key": "does not send the trainer's key",
    "other_path": "calls the other generation's path",
    "hot": "changes the temperature",
    "other_id": "calls under another rollout_id",
    "no_retry": "gives up at the first 5xx",
    "retries_4xx": "tries again after a 4xx",
    "restless": "tries for ever",
    "ignores_max_turns": "plays on after max_turns",
    "ignores_max_tokens": "plays on after max_tokens_total",
    "calls_it_stop": "says stop, whatever ended the rollout",
    "drops_last": "leaves the last answer out of final_messages",
    "open_calls": "leaves the tool calls of the last turn unanswered",
    "no_metrics": "counts nothing",
    "takes_anything": "does not check bodies",
    "strict": "refuses unknown fields",
    "tool_error_ends": "ends the rollout when a tool fails",
    "unmarked_error": "answers a failing tool's text without `Error:`",
    "one_answer": "answers only the first of several tool calls",
    "no_category": "reports an ERROR without its category",
    "plays_again": "plays a rollout again that it knows",
    "reports_once": "does not repeat its report",
    "reports_twice": "repeats its report after it was taken",
    "unwell": "has no healthy status",
    "bad_tools": "lists its tools in a form of its own",
    "hangs": "never ends",
}

MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
KNOWN = {
    "rollout_id", "server_url", "messages", "sampling_params", "tool_server_url", "max_turns", "max_tokens_total",
    "metadata", "callback_api_key", "tokenizer_name", "tokenizer_revision", "completion_params", "api_key",
    "idempotency_key",
}  # fmt: skip


class Ended(Exception):
    """The rollout cannot go on: (category, text)."""


class PeerServer:
    """`async with PeerServer(chat) as server: server.url`. One instance serves A (or A1) and B."""

    def __init__(
        self, chat: ChatMl, *faults: str, chat_path: bool = False, key: str | None = None, pause: float = 1.0
    ) -> None:
        """`pause`: the first one between repetitions, in seconds."""
        assert set(faults) <= set(FAULTS)
        self.chat = chat
        self.faults = set(faults)
        self.chat_path = chat_path
        self.key = key
        self.pause = pause
        self.reports: dict[str, dict[str, Any]] = {}
        self._known: dict[str, asyncio.Task[None]] = {}
        self.url = ""

    async def __aenter__(self) -> PeerServer:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/health", self._health)
        app.router.add_get("/tools", self._tools)
        app.router.add_post("/rollout", self._rollout)
        app.router.add_post("/v1/rollout/init", self._init)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300, sock_connect=10))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._known.values():
            task.cancel()
        await asyncio.gather(*self._known.values(), return_exceptions=True)
        await self._http.close()
        await self._runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        state = "so-so" if "unwell" in self.faults else "healthy"
        counts = {"agent_loop": "peer", "active_rollouts": 0, "completed_rollouts": len(self.reports)}
        return web.json_response({"status": state, "service": "rollout-server", **counts})

    async def _tools(self, _request: web.Request) -> web.Response:
        return web.json_response({"tools": [{"name": "multiply"}] if "bad_tools" in self.faults else [MULTIPLY]})

    async def _rollout(self, request: web.Request) -> web.Response:
        body = await self._body(request, b=False)
        if isinstance(body, web.Response):
            return body
        return web.json_response(await Play(self, body, b=False).run())

    async def _init(self, request: web.Request) -> web.Response:
        body = await self._body(request, b=True)
        if isinstance(body, web.Response):
            return body
        name = body.get("idempotency_key") or body["rollout_id"]
        if name not in self._known or "plays_again" in self.faults:
            self._known[name] = asyncio.create_task(self._play_b(body))
        return web.json_response({"rollout_id": body["rollout_id"], "tools": [MULTIPLY]}, status=202)

    async def _play_b(self, body: dict[str, Any]) -> None:
        play = Play(self, body, b=True)
        report = await play.run()
        self.reports[body["rollout_id"]] = report
        for attempt in range(1 if "reports_once" in self.faults else 3):
            if attempt:
                await asyncio.sleep(self.pause * 2 ** (attempt - 1))
            status, _ = await play.post("/v1/rollout/completed", report)
            if status == 200 and "reports_twice" not in self.faults:
                return

    async def _body(self, request: web.Request, b: bool) -> Any:
        given = request.headers.get("Authorization", "")
        if self.key is not None and given.removeprefix("Bearer ") != self.key:
            return web.json_response({"detail": "Invalid or missing API key"}, status=401)
        try:
            body = json.loads(await request.read())
        except ValueError:
            return web.json_response({"detail": "no JSON"}, status=422)
        wrong = None if "takes_anything" in self.faults else wrong_with(body, b)
        if "strict" in self.faults and set(body) - KNOWN:
            wrong = "unknown fields"
        if wrong is not None:
            return web.json_response({"detail": wrong}, status=422)
        defaults = {
            "rollout_id": "?",
            "messages": [{"role": "user", "content": "?"}],
            "server_url": "http://127.0.0.1:9",
        }
        return {**defaults, **body}


def wrong_with(body: Any, b: bool) -> str | None:
    """What breaks the protocol in a request."""
    if not isinstance(body, dict):
        return "no object"
    name, url, messages = body.get("rollout_id"), body.get("server_url"), body.get("messages")
    if not isinstance(name, str) or not name.strip() or len(name) > 256:
        return "rollout_id"
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return "server_url"
    if not isinstance(messages, list) or not messages:
        return "messages"
    roles = {"system", "user", "assistant", "tool", "function"}
    if not all(isinstance(m, dict) and m.get("role") in roles for m in messages):
        return "role"
    if not 1 <= body.get("max_turns", 10) <= 100 or not 1 <= body.get("max_tokens_total", 8192) <= 1_000_000:
        return "limits"
    if b:
        return None if isinstance(body.get("completion_params"), dict) else "completion_params"
    sampling = body.get("sampling_params", {})
    if not 0 <= sampling.get("temperature", 1.0) <= 2 or not 1 <= sampling.get("max_tokens", 512) <= 32768:
        return "sampling_params"
    return None


class Play:
    """One rollout."""

    def __init__(self, server: PeerServer, body: dict[str, Any], b: bool) -> None:
        self.server = server
        self.faults = server.faults
        self.body = body
        self.b = b
        self.messages: list[Message] = list(body["messages"])
        self.context: list[int] = []
        self.late: list[int] | None = None
        self.llm_calls = self.tool_calls = self.prompt_tokens = self.sampled_tokens = self.largest = 0
        self.first: int | None = None
        self.used = 0
        self.llm_ms = self.tool_ms = 0.0

    async def run(self) -> dict[str, Any]:
        """The report."""
        started = time.perf_counter()
        status, reason, error, extra = "COMPLETED", None, None, {}
        try:
            reason = await self.loop()
        except Ended as end:
            category, error = end.args
            status = "ERROR"
            extra = {} if "no_category" in self.faults else {"error_category": category}
        if reason is not None and "calls_it_stop" in self.faults:
            reason = "stop"
        if status == "ERROR" and self.b:
            reason = "error"
        final = self.messages
        if "drops_last" in self.faults:
            last = max((i for i, m in enumerate(final) if m["role"] == "assistant"), default=len(final))
            final = final[:last]
        metrics = {
            "total_latency_ms": 1000 * (time.perf_counter() - started),
            "llm_latency_ms": self.llm_ms,
            "tool_latency_ms": self.tool_ms,
            "num_llm_calls": self.llm_calls,
            "num_tool_calls": self.tool_calls,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.sampled_tokens,
            "max_context_tokens": self.largest,
        }
        if "no_metrics" in self.faults:
            metrics = dict.fromkeys(metrics, 0)
        report = {
            "rollout_id": self.body["rollout_id"],
            "status": status,
            "final_messages": final,
            "finish_reason": reason,
            "error_message": error,
            "metrics": metrics,
            "extra_fields": extra,
        }
        return {**report, "reward": 1.0} if self.b else report

    async def loop(self) -> str:
        """Ask, act, ask again."""
        new: list[Message] = []
        turns = 10**6 if "ignores_max_turns" in self.faults else self.body.get("max_turns", 10)
        total = 10**9 if "ignores_max_tokens" in self.faults else self.body.get("max_tokens_total", 8192)
        if "drops_system" in self.faults:
            self.messages = [m for m in self.messages if m["role"] != "system"]
        for turn in range(min(turns, 12)):
            added = self.server.chat.after(new, self.ended) if self.context else []
            if self.used + (0 if self.b else len(added)) >= total:
                return "max_tokens"
            answer = await self.ask(new, added)
            choice = answer["choices"][0]
            message = choice["message"]
            self.take(answer, message)
            if "changes_answer" in self.faults:
                message = {**message, "content": "(edited)"}
            self.messages.append(message)
            calls = message.get("tool_calls") or []
            if choice["finish_reason"] == "length":
                return "max_tokens"
            if not calls:
                return "stop"
            if "open_calls" in self.faults and turn + 1 == turns:
                return "max_turns"
            before = time.perf_counter()
            new = [{"role": "tool", "content": self.run_tool(c), "tool_call_id": c["id"]} for c in calls]
            self.tool_ms += 1000 * (time.perf_counter() - before)
            self.tool_calls += len(calls)
            if "one_answer" in self.faults:
                new = new[:1]
            if "cuts_history" in self.faults and turn == 1:
                self.messages = [{**m, "content": "…"} if m["role"] == "tool" else m for m in self.messages]
            self.messages.extend(new)
        return "max_turns"

    def run_tool(self, call: dict[str, Any]) -> str:
        """multiply, or an error in words."""
        try:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if call["function"]["name"] != "multiply":
                raise ValueError("unknown tool")
            return str(int(arguments["a"]) * int(arguments["b"]))
        except (ValueError, KeyError, TypeError) as failure:
            if "tool_error_ends" in self.faults:
                raise Ended("tool_error", "a tool failed") from None
            return ("oops " if "unmarked_error" in self.faults else "Error: ") + type(failure).__name__

    @property
    def ended(self) -> bool:
        """Whether the last answer's tokens end with the end-of-turn token."""
        if "one_less" in self.faults:
            return True
        if "one_more" in self.faults:
            return False
        return bool(self.context) and self.context[-1] == self.server.chat.end

    def mask(self, new: list[Message], added: list[int]) -> list[int] | None:
        """The right one, or the wrong one that was asked for."""
        faults, chat = self.faults, self.server.chat
        if not self.context:
            return [0] * 20 if "mask_on_first" in faults else None
        length = len(added)
        if "no_mask" in faults or ("cuts_history" in faults and len(self.messages) > 6):
            return None
        if "other_tokenizer" in faults:
            length = sum(len(str(message["content"]).split()) + 5 for message in new)
        if "tool_text" in faults:
            length = len(chat.encode("".join(message["content"] for message in new)))
        if "whole_prompt" in faults:
            length = len(self.context) + len(added)
        if "answer_counted" in faults:
            length += self.last_sampled
        mask = [1 if "ones" in faults else 0] * length or None
        if "mask_a_call_late" in faults:
            mask, self.late = self.late, mask
        return mask

    async def ask(self, new: list[Message], added: list[int]) -> dict[str, Any]:
        """A model call, with its repetitions."""
        if "hangs" in self.faults:
            await asyncio.sleep(3600)
        name = "other" if "other_id" in self.faults else self.body["rollout_id"]
        if self.b:
            path = "/v1/chat/completions"
            params = {**self.body["completion_params"], "messages": self.messages, "rollout_id": name}
        else:
            path = "/v1/chat/completions" if self.server.chat_path else "/v1/completions"
            sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 512, **self.body.get("sampling_params", {})}
            params = {"model": "default", **sampling, "messages": self.messages, "rollout_id": name}
            params["response_mask"] = self.mask(new, added)
        if "hot" in self.faults:
            params["temperature"] = 1.5
        if "other_path" in self.faults:
            path = "/v1/chat/completions" if path == "/v1/completions" else "/v1/completions"
        tries = 1 if "no_retry" in self.faults else 8 if "restless" in self.faults else 4
        pause = 0.0 if "restless" in self.faults else self.server.pause
        error = ("network_error", "nothing was tried")
        for attempt in range(tries):
            if attempt:
                await asyncio.sleep(pause * 2 ** (attempt - 1))
            started = time.perf_counter()
            status, answer = await self.post(path, params)
            self.llm_ms += 1000 * (time.perf_counter() - started)
            if status == 200:
                self.llm_calls += 1
                return answer
            if status is None:
                error = ("network_error", "the trainer is away")
            elif status >= 500:
                error = ("trainer_server_error", f"the trainer answered {status}")
            else:
                category = "rate_limited" if status == 429 else "trainer_client_error"
                error = (category, f"the trainer answered {status}")
                if "retries_4xx" not in self.faults:
                    break
        raise Ended(*error)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int | None, Any]:
        """Status and JSON; None where the connection broke."""
        key = self.body.get("api_key" if self.b else "callback_api_key")
        headers = {"Authorization": f"Bearer {key}"} if key and "no_key" not in self.faults else {}
        try:
            url = self.body["server_url"].rstrip("/") + path
            async with self.server._http.post(url, json=body, headers=headers) as answer:
                return answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return None, None

    def take(self, answer: dict[str, Any], _message: Message) -> None:
        """Count."""
        if "prompt_token_ids" in answer:
            prompt, sampled = len(answer["prompt_token_ids"]), len(answer["token_ids"])
            self.context = answer["prompt_token_ids"] + answer["token_ids"]
        else:
            prompt, sampled = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
        self.last_sampled = sampled
        self.first = prompt if self.first is None else self.first
        self.used = prompt + sampled - self.first
        self.prompt_tokens += prompt
        self.sampled_tokens += sampled
        self.largest = max(self.largest, prompt + sampled)
