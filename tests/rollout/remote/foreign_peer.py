"""A remote rollout server in this process (a test double), behind httpx's transport: generations A, A1 and B.

It counts its masks as a server of generation A does: by rendering the whole history and taking the lengths.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx

from rollout.environment import EnvironmentFactory
from rollout.limits import Limits
from rollout.remote.foreign_client import ForeignClient, RemoteSpec
from rollout.remote.foreign_session import ForeignSession, Trainer
from rollout.remote.wire import CompletionRequest, Generation, RolloutResponse
from rollout.rendering import ChatRenderer
from rollout.sampling import Sampling
from rollout.tasks import Task
from rollout.trajectory import SessionKey
from tests.rollout.sessions import Adder

TOOLS = [tool.spec for tool in Adder.tools]
SECRET = b"s" * 32
Play = Callable[["Peer", dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


class Peer:
    """The server. `play` is told itself and the request, and returns the body of the end."""

    def __init__(self, generation: Generation, chat: ChatRenderer, play: Play | None = None) -> None:
        self.generation: Generation = generation
        self.chat = chat
        self.play: Play = play or calculate
        self.sessions: dict[str, ForeignSession] = {}
        self.requests: list[httpx.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] | None = TOOLS
        self.answers: list[httpx.Response | Exception] = []
        """What it answers to the next posts, in place of playing."""
        self.running: set[asyncio.Task[Any]] = set()
        self.reported: list[dict[str, Any]] = []

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._handle)

    async def call(self, rollout_id: str, **fields: Any) -> dict[str, Any]:
        """A model call, as JSON in both directions."""
        request = CompletionRequest.model_validate_json(json.dumps({"rollout_id": rollout_id, **fields}))
        answer = await self.sessions[rollout_id].complete(request)
        return json.loads(json.dumps(answer.body()))

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.path == "/tools":
            return httpx.Response(404) if self.tools is None else httpx.Response(200, json={"tools": self.tools})
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if request.url.path == "/rollout":
            # A server's handler goes on when its client is gone.
            return httpx.Response(200, json=await asyncio.shield(self._keep(self.play(self, body))))
        self._keep(self._play_b(body))
        return httpx.Response(202, json={"rollout_id": body["rollout_id"], "tools": self.tools or []})

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    async def _play_b(self, body: dict[str, Any]) -> None:
        try:
            report = await self.play(self, body)
        except Exception as failure:
            # A test's own assertion must end its session, not hang it.
            report = end(body, status="ERROR", error_message=repr(failure))
        self.reported.append(report)
        await self.sessions[body["rollout_id"]].completed(RolloutResponse.model_validate(report))


def end(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The body of an end."""
    return {"rollout_id": body["rollout_id"], "status": "COMPLETED", "finish_reason": "stop", **fields}


def results(message: dict[str, Any]) -> list[dict[str, Any]]:
    """What the tools answer to a message: sums."""
    found = []
    for call in message.get("tool_calls") or []:
        given = json.loads(call["function"]["arguments"])
        text = str(given["a"] + given["b"]) if {"a", "b"} <= given.keys() else "Error: no such numbers"
        found.append({"role": "tool", "content": text, "tool_call_id": call["id"]})
    return found


class Conversation:
    """One rollout's history, as a server keeps it."""

    def __init__(self, peer: Peer, body: dict[str, Any]) -> None:
        self.peer = peer
        self.body = body
        self.messages: list[dict[str, Any]] = list(body["messages"])
        self.last: int | None = None
        self.sampled: list[list[int]] = []
        self.masks: list[list[int] | None] = []

    def mask(self) -> list[int] | None:
        """The mask of the next call."""
        if self.peer.generation == "B" or self.last is None:
            return None
        return [0] * (len(self.peer.chat.render(self.messages, self.peer.tools or [])) - self.last)

    async def ask(self, **fields: Any) -> dict[str, Any]:
        """The next assistant message, which joins the history."""
        mask = fields.pop("response_mask", self.mask())
        self.masks.append(mask)
        answer = await self.peer.call(self.body["rollout_id"], messages=self.messages, response_mask=mask, **fields)
        self.last = len(answer["prompt_token_ids"]) + len(answer["token_ids"])
        self.sampled.append(answer["token_ids"])
        message: dict[str, Any] = answer["choices"][0]["message"]
        self.messages = [*self.messages, message]
        return message

    async def ask_and_calculate(self) -> None:
        """The next assistant message, and what the tools say to it."""
        message = await self.ask()
        self.messages = [*self.messages, *results(message)]


async def calculate(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
    """The usual loop: ask, run tools, ask again."""
    talk = Conversation(peer, body)
    for _ in range(body["max_turns"]):
        answers = results(await talk.ask())
        if not answers:
            return end(body, final_messages=talk.messages)
        talk.messages = [*talk.messages, *answers]
    return end(body, final_messages=talk.messages, finish_reason="max_turns")


def foreign_session(
    chat: ChatRenderer,
    engine: Any,
    peer: Peer,
    *,
    messages: Sequence[dict[str, Any]] = ({"role": "user", "content": "2+3?"},),
    environment: EnvironmentFactory | None = None,
    sampling: Sampling | None = None,
    data: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    key_env: str | None = None,
    **limits: Any,
) -> ForeignSession:
    """A session ready to run at a peer."""
    task = Task(task_id="t", messages=list(messages), data=data or {}, metadata=metadata or {"level": 1})
    spec = RemoteSpec("http://peer:9000", peer.generation, key_env)
    made = ForeignSession(
        SessionKey("run", "t", "run/t", 0),
        task,
        trainer=Trainer(engine, chat, "http://gateway/remote/w", SECRET, "org/model", "main"),
        client=ForeignClient(spec, 4, env={"ROLLOUT_REMOTE_KEY": "sesame"}, transport=peer.transport),
        sampling=sampling or Sampling(max_tokens=64),
        limits=Limits(**limits),
        environment=environment,
    )
    peer.sessions[made.rollout_id] = made
    return made
