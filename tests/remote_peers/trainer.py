"""A trainer that speaks A, A1 and B, with a script for a model. It counts every token and refuses bad masks."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.remote_peers.chatml import ChatMl, Message, read_answer

SECONDS = 30.0


@dataclass
class Rollout:
    """What the trainer has of one rollout."""

    generation: str
    key: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    """The first one."""
    response: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 where `response` was sampled."""
    history: list[Message] = field(default_factory=list)
    calls: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class PeerTrainer:
    """`async with PeerTrainer(chat, script) as trainer: await trainer.play(url, messages)`."""

    def __init__(self, chat: ChatMl, script: list[str], *, generation: str = "A", arrays: bool = True) -> None:
        """`script`: what the model writes in each turn, with END where it is sampled. `arrays`: B tells tokens."""
        self.chat = chat
        self.script = script
        self.generation = generation
        self.arrays = arrays or generation != "B"
        self.rollouts: dict[str, Rollout] = {}
        self.faults: list[str] = []
        """What callers did wrong."""
        self.url = ""

    async def __aenter__(self) -> PeerTrainer:
        app = web.Application()
        # The other path is a 404, by which a server may find out whether this is A or A1.
        path = "/v1/completions" if self.generation == "A" else "/v1/chat/completions"
        app.router.add_post(path, self._complete)
        app.router.add_post("/v1/rollout/completed", self._completed)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def play(self, server: str, messages: list[Message], **more: Any) -> tuple[dict[str, Any], Rollout]:
        """Have a rollout played. Returns the server's report and what was counted here."""
        name, key = uuid.uuid4().hex, "key-" + uuid.uuid4().hex
        rollout = self.rollouts[name] = Rollout(self.generation, key)
        body: dict[str, Any] = {"rollout_id": name, "server_url": self.url + "/", "messages": messages, **more}
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            if self.generation == "B":
                body.setdefault("completion_params", {"temperature": 0.5, "max_tokens": 128})
                async with http.post(server + "/v1/rollout/init", json={**body, "api_key": key}) as answer:
                    assert answer.status == 202, await answer.text()
                    accepted = await answer.json()
                assert accepted["rollout_id"] == name
                rollout.tools = accepted["tools"]
                async with asyncio.timeout(SECONDS):
                    await rollout.ended.wait()
                return rollout.reports[0], rollout
            async with http.get(server + "/tools") as answer:
                rollout.tools = (await answer.json())["tools"]
            body.setdefault("sampling_params", {"temperature": 0.5, "max_tokens": 128})
            async with http.post(server + "/rollout", json={**body, "callback_api_key": key}) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json(), rollout

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        rollout = self.rollouts[body["rollout_id"]]
        wrong = self._wrong(request, rollout, body)
        if wrong is not None:
            self.faults.append(wrong)
            return web.json_response({"detail": wrong}, status=422)
        if rollout.calls == 0:
            rollout.prompt = self.chat.prompt(body["messages"], rollout.tools)
        else:
            added = self._added(rollout, body["messages"])
            rollout.response += added
            rollout.mask += [0] * len(added)
        prompt = rollout.prompt + rollout.response
        text = self.script[rollout.calls]
        sampled = self.chat.encode(text)
        rollout.response += sampled
        rollout.mask += [1] * len(sampled)
        message = read_answer(text, rollout.calls)
        rollout.calls += 1
        rollout.history = [*body["messages"], message]
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        answer: dict[str, Any] = {
            "id": "peer",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model", "default"),
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        }
        if self.arrays:
            answer |= {"token_ids": sampled, "logprobs": [-0.25] * len(sampled), "prompt_token_ids": prompt}
        if rollout.generation == "B":
            total = len(prompt) + len(sampled)
            counts = {"prompt_tokens": len(prompt), "completion_tokens": len(sampled), "total_tokens": total}
            answer["usage"] = counts
        return web.json_response(answer)

    def _wrong(self, request: web.Request, rollout: Rollout, body: dict[str, Any]) -> str | None:
        if request.headers.get("Authorization") != f"Bearer {rollout.key}":
            return "wrong key"
        messages, known = body["messages"], rollout.history
        if len(messages) < len(known) or [_said(m) for m in messages[: len(known)]] != [_said(m) for m in known]:
            return "the history changed"
        if rollout.generation == "B":
            return "B has no mask" if "response_mask" in body else None
        added = self._added(rollout, messages) if rollout.calls else []
        wanted = [0] * len(added) or None
        given = body.get("response_mask")
        if given != wanted:
            return f"mask of {len(given or [])}, {len(added)} tokens were added"
        return None

    def _added(self, rollout: Rollout, messages: list[Message]) -> list[int]:
        ended = rollout.response[-1] == self.chat.end
        return self.chat.after(messages[len(rollout.history) :], ended)

    async def _completed(self, request: web.Request) -> web.Response:
        body = await request.json()
        rollout = self.rollouts[body["rollout_id"]]
        if request.headers.get("Authorization") != f"Bearer {rollout.key}":
            self.faults.append("wrong key")
        rollout.reports.append(body)
        rollout.ended.set()
        return web.json_response({})


def _said(message: Message) -> list[Any]:
    calls = [(call["id"], call["function"]["name"]) for call in message.get("tool_calls") or []]
    return [message["role"], message.get("content") or "", calls, message.get("tool_call_id")]
