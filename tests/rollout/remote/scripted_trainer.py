"""A trainer for tests, as an httpx transport: it samples from a script, keeps tokens, and checks every mask."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from rollout.remote.hosts import AllowedHosts
from rollout.remote.mask import check_mask
from rollout.remote.trainer_client import TrainerClient
from rollout.rendering import ChatRenderer

URL = "http://127.0.0.1:9"
IM_END = "<|im_end|>"

Twist = Callable[[dict[str, Any]], dict[str, Any]]
"""Changes an answer before it is sent."""


class ScriptedTrainer:
    """Answers call number n with `turns[n]`. Knows no ledger of ours: it keeps ids in plain lists."""

    def __init__(
        self,
        chat: ChatRenderer,
        *turns: str,
        tools: Sequence[dict[str, Any]] = (),
        tool_calls: Sequence[Any] = (),
        finish: str = "stop",
        tokens: bool = True,
        anew: bool = False,
        twist: Twist | None = None,
    ) -> None:
        """`tools`: what its template shows. `tool_calls`: of the messages, by turn; the text is empty there.
        `anew`: it renders the whole history for each call, as the protocol's formula has it.
        """
        self._chat, self._turns, self._tools = chat, turns, list(tools)
        self._tool_calls, self._finish, self._tokens, self._twist = tool_calls, finish, tokens, twist
        self._anew = anew
        self._context: list[int] = []
        self._answer: list[int] = []
        self._seen: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[httpx.Headers] = []
        self.refusals: list[str] = []
        self.completed: list[dict[str, Any]] = []
        self.statuses: list[int | Exception] = []
        """What comes in the place of the next answers."""

    def client(self, generation: Any = "A", **options: Any) -> TrainerClient:
        return TrainerClient(
            URL, generation, AllowedHosts(), transport=httpx.MockTransport(self.handle), sleep=_no_sleep, **options
        )

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        self.headers.append(request.headers)
        if self.statuses:
            status = self.statuses.pop(0)
            if isinstance(status, Exception):
                raise status
            return httpx.Response(status)
        body = json.loads(request.content)
        if request.url.path.endswith("/completed"):
            self.completed.append(body)
            return httpx.Response(200, json={})
        problem = self._refusal(body)
        self.calls.append(body)
        if problem is not None:
            self.refusals.append(problem)
            return httpx.Response(422, json={"detail": problem})
        answer = self._sample(body)
        return httpx.Response(200, json=answer if self._twist is None else self._twist(answer))

    def _refusal(self, body: dict[str, Any]) -> str | None:
        messages = body["messages"]
        if messages[: len(self._seen)] != self._seen:
            return "history changed"
        first = not self.calls
        if first or self._anew:
            prompt = self._chat.render(messages, self._tools)
        else:
            extended = self._chat.extend(self._context, self._answer, messages[len(self._seen) :], self._tools)
            assert extended is not None
            prompt = extended
        added = len(prompt) - len(self._context) - len(self._answer)
        self._context = prompt
        if "response_mask" not in body:
            return None
        return check_mask(body["response_mask"], added, first=first)

    def _sample(self, body: dict[str, Any]) -> dict[str, Any]:
        turn = len(self.calls) - 1
        text = self._turns[turn]
        self._answer = self._chat.tokenizer.encode(text, add_special_tokens=False)
        message: dict[str, Any] = {"role": "assistant", "content": text.removesuffix(IM_END), "odd": turn}
        if turn < len(self._tool_calls) and self._tool_calls[turn]:
            message = {"role": "assistant", "content": None, "tool_calls": self._tool_calls[turn]}
        self._seen = [*body["messages"], message]
        answer: dict[str, Any] = {
            "id": f"c{turn}",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": self._finish}],
            "usage": {"prompt_tokens": len(self._context), "completion_tokens": len(self._answer)},
        }
        if self._tokens:
            answer["token_ids"] = self._answer
            answer["logprobs"] = [-0.5] * len(self._answer)
            answer["prompt_token_ids"] = self._context
        return answer


async def _no_sleep(seconds: float) -> None:
    pass
