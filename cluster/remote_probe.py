"""Play the trainer against a remote rollout server: the requests around, and every scenario of the plan.

Invariant: whatever the server does this ends, within its deadlines, and leaves nothing behind; whatever it answers is
judged, too much and nothing included. What is played and how it is judged stand in `rollout.remote`; here are the
requests and the order of things.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from cluster.remote_trainer import ScriptedTrainer, Voice
from rollout.errors import ConfigError, RolloutError
from rollout.remote.conformance import CHECKS, Begun, Deviation, Played, shown
from rollout.remote.conformance_judge import judge
from rollout.remote.conformance_plan import SCENARIOS, Scenario, bad_bodies, example_call
from rollout.remote.wire import INIT_PATH, ROLLOUT_PATH, Generation
from rollout.rendering import ChatRenderer
from rollout.tasks import Message

# Rollouts of the check that are played at once.
CONCURRENT = 4
# Of requests that are answered at once.
ANSWER_SECONDS = 10.0
CONNECT_SECONDS = 5.0
MAX_ANSWER_BYTES = 16 * 2**20
# A server that calls whoever it is told to takes longer than this to find out that there is nobody.
FOREIGN_HOST_SECONDS = 3.0
# No name under .invalid ever has an address (RFC 2606).
FOREIGN_HOST = "http://rollout-check.invalid"
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 256, "logprobs": True}
MESSAGES: list[Message] = [
    {"role": "system", "content": "You are careful. Use the tools."},
    {"role": "user", "content": "What is 3 times 4?"},
]


@dataclass(frozen=True)
class Target:
    """What is checked, and how."""

    url: str
    generation: Generation = "A"
    api_key: str | None = field(default=None, repr=False)
    chat: ChatRenderer | None = None
    """The trainer's; generations A and A1 need one."""
    timeout: float = 60.0
    """Seconds for one rollout."""
    listen: tuple[str, int] = ("127.0.0.1", 0)
    callback: str | None = None
    """The URL by which the server reaches `listen`, if another."""
    tool: str | None = None
    tool_arguments: str | None = None
    tools_in_prompt: bool = True
    only: tuple[str, ...] = ()
    """Names of scenarios; empty: all, and the requests around them."""


@dataclass
class Outcome:
    """What was found."""

    url: str
    generation: Generation
    played: list[Played] = field(default_factory=list)
    """In the order of the plan."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Scenario → why."""
    deviations: list[Deviation] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the server keeps the protocol, as far as was seen."""
        return all(deviation.advice for deviation in self.deviations)

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {
            "url": self.url,
            "generation": self.generation,
            "ok": self.ok,
            "scenarios": [
                {"name": played.scenario.name, "seconds": round(played.seconds, 3), "calls": len(played.calls)}
                for played in self.played
            ],
            "skipped": self.skipped,
            "deviations": [
                {"check": d.check, "where": d.where, "text": d.text, "advice": d.advice, "why": CHECKS[d.check]}
                for d in self.deviations
            ],
        }


async def check_server(target: Target, on_played: Callable[[Played], object] = lambda _played: None) -> Outcome:
    """Play everything against a server.

    Raises ConfigError for what cannot be checked, RolloutError where no server answers.
    """
    if target.generation != "B" and target.chat is None:
        raise ConfigError(
            f"generation {target.generation} needs --tokenizer DIR_OR_NAME, the trainer's: masks count its tokens"
        )
    if unknown := set(target.only) - {scenario.name for scenario in SCENARIOS}:
        known = ", ".join(scenario.name for scenario in SCENARIOS)
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: there is no such scenario; known are {known}")
    try:
        # httpx itself finds a port out of range only when it connects, and not as an error of its own.
        _ = httpx.URL(target.url), urlsplit(target.url).port
    except (httpx.InvalidURL, ValueError) as failure:
        raise ConfigError(f"{target.url}: is no address: {failure}") from None
    outcome = Outcome(target.url, target.generation)
    headers = {"accept-encoding": "identity"}
    if target.api_key is not None:
        headers["authorization"] = f"Bearer {target.api_key}"
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=timeout, trust_env=False) as http:
        around = _Around(target, http, outcome)
        await around.health()
        tools = await around.tools()
        trainer = ScriptedTrainer(Voice(target.chat), target.listen, target.callback)
        await trainer.start()
        try:
            if not tools and target.generation == "B":
                tools = await _tools_of_init(_Player(target, http, trainer))
            trainer.voice.know(tools, example_call(tools, target.tool, target.tool_arguments), target.tools_in_prompt)
            if not target.only:
                await around.bad_bodies(trainer)
                await around.keys(trainer)
            await _play_all(target, http, trainer, outcome, on_played, has_tools=bool(tools or target.tool))
            if not target.only:
                await around.foreign_host()
            if trainer.failure is not None:
                raise trainer.failure
        finally:
            await trainer.close()
    return outcome


async def _tools_of_init(player: _Player) -> list[dict[str, Any]]:
    """What B's 202 says; a server of that generation need not have GET /tools."""
    single = next(scenario for scenario in SCENARIOS if scenario.name == "single_turn")
    begun = (await player.play(single)).begun
    said = begun[0].said if begun else None
    tools = said.get("tools") if isinstance(said, dict) else None
    return [tool for tool in tools if _is_tool(tool)] if isinstance(tools, list) else []


async def _play_all(
    target: Target,
    http: httpx.AsyncClient,
    trainer: ScriptedTrainer,
    outcome: Outcome,
    on_played: Callable[[Played], object],
    *,
    has_tools: bool,
) -> None:
    slots = asyncio.Semaphore(CONCURRENT)

    async def one(scenario: Scenario) -> Played:
        async with slots:
            played = await _Player(target, http, trainer).play(scenario)
            on_played(played)
            return played

    chosen = []
    for scenario in SCENARIOS:
        if target.generation not in scenario.generations or (target.only and scenario.name not in target.only):
            continue
        if scenario.needs_tool and not has_tools:
            outcome.skipped[scenario.name] = "the server has no tools; name one with --tool and --tool-arguments"
        else:
            chosen.append(scenario)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(scenario)) for scenario in chosen]
    for task in tasks:
        outcome.played.append(task.result())
        outcome.deviations += judge(task.result())


class _Player:
    """One scenario, from the request to the end."""

    def __init__(self, target: Target, http: httpx.AsyncClient, trainer: ScriptedTrainer) -> None:
        self._target = target
        self._http = http
        self._trainer = trainer

    async def play(self, scenario: Scenario) -> Played:
        rollout_id = f"conformance-{scenario.name}-{uuid.uuid4().hex[:8]}"
        key = f"key-{uuid.uuid4().hex}"
        played = Played(scenario, self._target.generation, rollout_id, key, list(MESSAGES))
        server_url = self._trainer.expect(played, SAMPLING)
        path, body = request_body(self._target.generation, rollout_id, server_url, key)
        body |= {"max_turns": scenario.max_turns, "max_tokens_total": scenario.max_tokens_total}
        if scenario.extra_fields:
            body["x_conformance"] = {"unknown": True}
            body["messages"] = [{**message, "x_conformance": 1} for message in MESSAGES]
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._target.timeout):
                for _ in range(scenario.begun):
                    await self._begin(played, path, body)
                if self._target.generation == "B" and played.begun[0].status == 202:
                    await self._trainer.ended(rollout_id)
                    if scenario.begun > 1:
                        await self._begin(played, path, body)
        except TimeoutError:
            played.timed_out = True
        played.seconds = time.perf_counter() - started
        await asyncio.sleep(scenario.linger_s)
        return played

    async def _begin(self, played: Played, path: str, body: dict[str, Any]) -> None:
        """Hand the rollout over; as long as the server is full, again."""
        full: Begun | None = None
        try:
            while True:
                try:
                    status, said, wait = await _send(self._http, "POST", path, body, timeout=self._target.timeout)
                except _NoAnswer as failure:
                    played.begun.append(Begun(None, str(failure)))
                    return
                if status != 429:
                    played.begun.append(Begun(status, said))
                    return
                full = Begun(status, said)
                await asyncio.sleep(wait)
        except asyncio.CancelledError:
            # The rollout's time is over: that the server was full all along is what it did.
            if full is not None:
                played.begun.append(full)
            raise


class _Around:
    """The requests beside the rollouts."""

    def __init__(self, target: Target, http: httpx.AsyncClient, outcome: Outcome) -> None:
        self._target = target
        self._http = http
        self._outcome = outcome

    def _off(self, check: str, where: str, text: str, advice: bool = False) -> None:
        self._outcome.deviations.append(Deviation(check, where, text, advice))

    async def health(self) -> None:
        try:
            status, said, _ = await _send(self._http, "GET", "/health")
        except _NoAnswer as failure:
            raise RolloutError(f"no rollout server answers at {self._target.url}: {failure}") from None
        if status != 200 or not isinstance(said, dict) or said.get("status") != "healthy":
            self._off("health", "GET /health", f'answered {status}, without "status": "healthy"')
        elif self._target.generation == "B":
            wanted = ("agent_loop", "active_rollouts", "completed_rollouts")
            if missing := [name for name in wanted if name not in said]:
                self._off("health", "GET /health", f"does not tell {', '.join(missing)}", advice=True)

    async def tools(self) -> list[dict[str, Any]]:
        """The server's tools; where it does not list them, those of B's 202."""
        where = "GET /tools"
        try:
            status, said, _ = await _send(self._http, "GET", "/tools")
        except _NoAnswer as failure:
            self._off("tools", where, f"{failure} instead of an answer")
            return []
        tools = said.get("tools") if isinstance(said, dict) else None
        if status != 200 or not isinstance(tools, list):
            self._off("tools", where, f'answered {status} and no {{"tools": [...]}}', advice=True)
            return []
        good = [tool for tool in tools if _is_tool(tool)]
        if len(good) < len(tools):
            self._off("tools", where, f"{len(tools) - len(good)} of {len(tools)} tools are not in OpenAI's form")
        return good

    async def bad_bodies(self, trainer: ScriptedTrainer) -> None:
        path, _ = request_body(self._target.generation, "", "", "")
        for bad in bad_bodies(self._target.generation, trainer.address("conformance-invalid")):
            try:
                status, _, _ = await _send(self._http, "POST", path, bad.content)
            except _NoAnswer as failure:
                self._off("validation", f"POST {path}", f"{bad.about}: {failure} instead of an answer")
                continue
            if status not in bad.statuses:
                self._off("validation", f"POST {path}", f"{bad.about}: answered {status}, not {bad.statuses[0]}")

    async def keys(self, trainer: ScriptedTrainer) -> None:
        if self._target.api_key is None:
            return
        path, body = request_body(self._target.generation, "conformance-no-key", trainer.address("none"), "none")
        for what, headers in (("no key", {"authorization": ""}), ("a wrong key", {"authorization": "Bearer wrong"})):
            try:
                status, _, _ = await _send(self._http, "POST", path, body, headers=headers)
            except _NoAnswer as failure:
                self._off("auth", f"POST {path}", f"{what}: {failure} instead of an answer")
                continue
            if status != 401:
                self._off("auth", f"POST {path}", f"{what}: answered {status}, not 401")

    async def foreign_host(self) -> None:
        rollout_id = f"conformance-{uuid.uuid4().hex}"
        path, body = request_body(self._target.generation, rollout_id, FOREIGN_HOST, "none")
        try:
            status, said, _ = await _send(self._http, "POST", path, body, timeout=FOREIGN_HOST_SECONDS)
        except _NoAnswer:
            status, said = 0, None
        extra = said.get("extra_fields") if isinstance(said, dict) else None
        category = extra.get("error_category") if isinstance(extra, dict) else None
        if not (400 <= status < 500 or category == "validation_error"):
            text = f"a server_url with a host that nobody listed ({FOREIGN_HOST}) was not refused"
            self._off("callback-host", f"POST {path}", text, advice=True)


def request_body(generation: Generation, rollout_id: str, server_url: str, key: str) -> tuple[str, dict[str, Any]]:
    """Where a rollout is begun, and with what."""
    common: dict[str, Any] = {"rollout_id": rollout_id, "server_url": server_url, "messages": MESSAGES}
    if generation == "B":
        return INIT_PATH, {**common, "completion_params": SAMPLING, "api_key": key}
    return ROLLOUT_PATH, {**common, "sampling_params": SAMPLING, "callback_api_key": key}


class _NoAnswer(Exception):
    """Nothing came back that could be judged; what came in its place."""


async def _send(
    http: httpx.AsyncClient,
    method: str,
    path: str,
    body: dict[str, Any] | bytes | None = None,
    *,
    timeout: float | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, float]:
    """Status, JSON (or the text that is none), and the seconds after which a full server wants to be asked again.

    `timeout`: seconds for all of it; None: ANSWER_SECONDS. Raises _NoAnswer.
    """
    timeout = ANSWER_SECONDS if timeout is None else timeout
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **(headers or {})}
    try:
        # httpx counts from byte to byte: a server that sends one now and then would be waited for without end.
        async with (
            asyncio.timeout(timeout),
            http.stream(method, path, content=content, headers=sent, timeout=timeout) as response,
        ):
            received = await _read(response)
    except TimeoutError:
        raise _NoAnswer(f"nothing whole within {timeout:g} s") from None
    except httpx.HTTPError as failure:
        raise _NoAnswer(type(failure).__name__) from None
    given = response.headers.get("retry-after", "")
    wait = min(float(given), ANSWER_SECONDS) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", given) else 1.0
    try:
        return response.status_code, json.loads(received), max(wait, 0.1)
    except (ValueError, RecursionError):
        return response.status_code, received.decode("utf-8", "replace"), max(wait, 0.1)


async def _read(response: httpx.Response) -> bytes:
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding not in ("", "identity"):
        # One chunk from the network may unpack to gigabytes before any limit is looked at.
        raise _NoAnswer(f"a compressed body ({shown(coding)}, not asked for)")
    chunks, size = [], 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise _NoAnswer(f"more than {MAX_ANSWER_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
