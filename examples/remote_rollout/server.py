"""A remote rollout server in one file: a foreign trainer's model plays, the tools are ours. Copy it and change it.

It speaks three generations of the protocol. A: `POST /rollout` answers when the rollout has ended, and every call to
the trainer has a `response_mask`. A1: the same, with the other path of the trainer (`--chat-path`). B: `POST
/v1/rollout/init` answers at once, and the end is reported to the trainer; no mask.

Invariant: every accepted rollout ends with exactly one report, whatever happens; the history only grows; a mask is
computed from the trainer's own tokens and checked against them, never guessed.

Needs fastapi, uvicorn and httpx, and for A and A1 transformers. What you will want to change: the tools (part 2) and
the reward (part 3). What you should leave alone: the mask (part 4).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import math
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Context, Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Message = dict[str, Any]
Generation = Literal["A", "A1", "B"]
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

MAX_BODY_BYTES, MAX_ANSWER_BYTES, MAX_METADATA_BYTES = 16 * 2**20, 64 * 2**20, 2**20
CALL_SECONDS, CONNECT_SECONDS = 300.0, 10.0
CALL_RETRIES, REPORT_RETRIES = 3, 2
MAX_PAUSE_SECONDS = 30.0
# How long the answer of a finished rollout is kept for those who ask again.
REMEMBER_SECONDS, MAX_REMEMBERED = 3600.0, 10_000
SHUTDOWN_SECONDS = 15.0
MAX_DIGITS, QUOTIENT_DIGITS = 100, 12


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    tokenizer: str | None = None
    """Directory or hub name of the trainer's tokenizer; without one only generation B is served."""
    chat_path: bool = False
    """A1 instead of A: call the trainer at /v1/chat/completions."""
    api_key: str | None = field(default=None, repr=False)
    """What callers must bring as `Authorization: Bearer KEY`; None: everybody may call."""
    callback_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    """Trainers that we call: host or host:port. A server that calls any URL it is given is a hole in your network."""
    max_running: int = 64
    max_waiting: int = 256
    tool_delay_s: float = 0.0
    """Tools wait 20 to 100 % of it, as slow ones would."""
    rollout_seconds: float = 1800.0


# 1. The wire. Unknown fields are ignored, bounds are those of the protocol.


def _checked_messages(messages: list[Message]) -> list[Message]:
    for message in messages:
        if message.get("role") not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise ValueError("role must be system, user, assistant, tool or function")
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError("content must be text, a list or null")
    return messages


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.username or parts.query)
    if not plain or parts.port == 0:  # a port that is none is a ValueError by itself
        raise ValueError("must be a plain http(s) URL")
    return url.rstrip("/")


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(metadata)) > MAX_METADATA_BYTES:
        raise ValueError("is larger than 1 MB")
    return metadata


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    rollout_id: Annotated[str, AfterValidator(_not_blank)] = Field(min_length=1, max_length=256)
    server_url: Annotated[str, AfterValidator(_checked_url)] = Field(max_length=2048)
    messages: Annotated[list[Message], AfterValidator(_checked_messages)] = Field(min_length=1)
    max_turns: int = Field(default=10, ge=1, le=100)
    max_tokens_total: int = Field(default=8192, ge=1, le=1_000_000)
    """Tokens after the first prompt, the model's and the tools' together."""
    metadata: Annotated[dict[str, Any], AfterValidator(_checked_metadata)] = Field(default_factory=dict)


class SamplingParams(BaseModel):
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, ge=0.0, le=1.0)
    max_tokens: int = Field(default=512, ge=1, le=32_768)
    stop: list[str] | None = None
    logprobs: bool | int = True


class RolloutRequest(_Body):
    """Generations A and A1. `tokenizer_name` is ignored: nobody but us says what is loaded here."""

    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    callback_api_key: str | None = Field(default=None, repr=False)


class InitRequest(_Body):
    """Generation B."""

    completion_params: dict[str, Any]
    api_key: str | None = Field(default=None, repr=False)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=256)


class Failure(Exception):
    """Why a rollout ends as an ERROR. The text goes to the trainer, so it holds nothing of ours."""

    def __init__(self, category: str, text: str) -> None:
        super().__init__(text)
        self.category = category


# 2. The tools: exact arithmetic. Numbers become fractions, and nothing is evaluated as code.


def _tool(name: str, description: str) -> dict[str, Any]:
    numbers = {"a": {"type": "number"}, "b": {"type": "number"}}
    parameters = {"type": "object", "properties": numbers, "required": ["a", "b"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool("add", "Add two numbers."),
    _tool("subtract", "Subtract b from a."),
    _tool("multiply", "Multiply two numbers."),
    _tool("divide", "Divide a by b."),
]


class ToolError(Exception):
    """What the model reads after `Error: `."""


def _number(arguments: dict[str, Any], name: str) -> Fraction:
    value = arguments.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ToolError(f"{name} must be a number")
    try:
        # Decimals keep what was written: 0.1 is a tenth. The bounds keep 1e999999 from filling the memory.
        text = str(value)
        number = Decimal(text)
    except (ArithmeticError, ValueError):
        raise ToolError(f"{name} must be a number") from None
    if len(text) > MAX_DIGITS or not number.is_finite() or abs(number.adjusted()) > MAX_DIGITS:
        raise ToolError(f"{name} must be a number of at most {MAX_DIGITS} digits")
    return Fraction(number)


def _plain(value: Fraction) -> str:
    """229, 0.5, -3: exact where the decimal ends, else rounded."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    precision = 4 * MAX_DIGITS if rest == 1 else QUOTIENT_DIGITS
    text = format(Context(prec=precision).divide(Decimal(value.numerator), Decimal(value.denominator)), "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


async def call_tool(call: dict[str, Any], delay_s: float) -> str:
    """The tool's answer; a failing tool's begins with `Error:`, and the rollout goes on."""
    if delay_s > 0:
        await asyncio.sleep(random.uniform(0.2, 1.0) * delay_s)
    try:
        function = call.get("function")
        given = function if isinstance(function, dict) else {}
        arguments = given.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ToolError("the arguments are not valid JSON") from None
        if not isinstance(arguments, dict):
            raise ToolError("the arguments must be an object")
        name = given.get("name")
        if name not in ("add", "subtract", "multiply", "divide"):
            raise ToolError("there is no such tool; use add, subtract, multiply or divide")
        a, b = _number(arguments, "a"), _number(arguments, "b")
        if name == "divide" and b == 0:
            raise ToolError("division by zero")
        if name == "divide":
            return _plain(a / b)
        return _plain({"add": a + b, "subtract": a - b, "multiply": a * b}[name])
    except ToolError as failure:
        return f"Error: {failure}"


# 3. The reward, for generation B; the trainer scores A itself.


def reward_of(messages: Sequence[Message], metadata: dict[str, Any]) -> float | None:
    """1 if the last turn names exactly the expected numbers in order; None where nobody says what is expected."""
    data = metadata.get("data")
    expected = data.get("answers") if isinstance(data, dict) else None
    if not isinstance(expected, list):
        return None
    answer = messages[-1].get("content")
    return float(re.findall(r"-?\d+(?:\.\d+)?", answer if isinstance(answer, str) else "") == expected)


# 4. The mask. The trainer gives 1 to every token that it sampled; we say 0 for each token that the chat template and
#    the tools added after its last answer. So the mask of a call is as long as what was added, no more and no less.


class Template:
    """The trainer's tokenizer and chat template, loaded once, before the first request."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self._lock = asyncio.Lock()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Off the event loop, as long histories take milliseconds; one at a time: tokenizers are not for threads."""
        async with self._lock:
            return await asyncio.to_thread(work, *arguments)

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """The whole conversation, ready for the next answer."""
        return list(
            self._tokenizer.apply_chat_template(
                _with_objects(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def after_answer(self, new: Sequence[Message], sampled: list[int]) -> list[int]:
        """The template's tokens from the end of an answer to the beginning of the next, whatever came before."""
        mark = "@answer@"
        stub = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}, *_with_objects(new)]
        text = self._tokenizer.apply_chat_template(stub, add_generation_prompt=True, tokenize=False)
        ids = list(self._tokenizer.encode(text.partition(mark)[2], add_special_tokens=False))
        # The end-of-turn token is the model's own where it sampled it; else it is the first token that is added.
        return ids[1:] if sampled and ids and sampled[-1] == ids[0] else ids


def _with_objects(messages: Sequence[Message]) -> list[Message]:
    """Templates write a call's arguments themselves, and want them as an object."""
    changed = []
    for message in messages:
        if isinstance(calls := message.get("tool_calls"), list):
            message = {**message, "tool_calls": [_with_object(call) for call in calls]}
        changed.append(message)
    return changed


def _with_object(call: Any) -> Any:
    try:
        return {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
    except (KeyError, TypeError, ValueError):
        return call


class Mask:
    """One rollout's tokens, as the trainer has them. The trainer names its prompt with each answer, so that we
    compare tokens and not only lengths: another tokenizer is found at the second call, not in the trained model."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.run = template.run
        self._tools: list[dict[str, Any]] | None = None
        self._context: list[int] = []
        self._sampled: list[int] = []
        self._prompt: list[int] | None = None
        self.first_prompt = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the context, with those that the next call adds."""
        return len(self._context if self._prompt is None else self._prompt)

    def before_call(self, messages: Sequence[Message], new: Sequence[Message]) -> list[int] | None:
        """The mask to send. `new`: the messages since the last answer."""
        if not self._context:
            return None
        rendered = self._template.prompt(messages, self._tools)
        known = len(self._context)
        if rendered[:known] == self._context:
            added = rendered[known:]
        else:
            # The template writes the past in another way than the model did: it drops old thinking, or spaces JSON
            # differently. What was sampled stays as it is; only what comes after it is the template's.
            added = self._template.after_answer(new, self._sampled)
        self._prompt = self._context + added
        return [0] * len(added) or None

    def after_call(self, messages: Sequence[Message], prompt_ids: list[int], sampled: list[int]) -> None:
        """Take the trainer's tokens. Raises Failure where its prompt is not ours, token by token."""
        if self._prompt is None:
            self.first_prompt = len(prompt_ids)
            # A trainer that knows our tools writes them into the prompt, another does not.
            self._tools = TOOLS if self._template.prompt(messages, TOOLS) == prompt_ids else None
        elif self._prompt != prompt_ids:
            pairs = zip(self._prompt, prompt_ids, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._prompt), len(prompt_ids)))
            raise Failure(
                "tokenizer_error",
                f"the trainer's prompt has {len(prompt_ids)} tokens, ours {len(self._prompt)}; they differ from "
                f"position {place} on: is our tokenizer another, or does its template rewrite the past?",
            )
        self._context, self._sampled = [*prompt_ids, *sampled], sampled


# 5. The trainer.


class Trainer:
    """Calls one rollout's trainer, on a connection of its own.

    One client for all would look through all of its connections at every call: with 256 rollouts that took the whole
    process.
    """

    def __init__(self, tls: ssl.SSLContext, url: str, key: str | None) -> None:
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS),
            verify=tls,  # made once: it takes longer than a call
            follow_redirects=False,  # a redirect would lead around the list of callback hosts
            trust_env=False,
        )
        self._url = url
        # Uncompressed: a few bytes may unpack to gigabytes before any limit is looked at.
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def post(self, path: str, body: bytes, retries: int) -> dict[str, Any]:
        """JSON for JSON. 5xx, timeouts and broken connections are tried again, 4xx never. Raises Failure."""
        failure = Failure("network_error", "the trainer was not called")
        for attempt in range(retries + 1):
            if attempt:
                await asyncio.sleep(min(2.0 ** (attempt - 1), MAX_PAUSE_SECONDS))
            try:
                status, content = await self._post(path, body)
            except httpx.TimeoutException:
                failure = Failure("network_error", f"the trainer did not answer within {CALL_SECONDS:g} s")
                continue
            except httpx.HTTPError as error:
                failure = Failure("network_error", f"the trainer could not be reached ({type(error).__name__})")
                continue
            except (httpx.InvalidURL, ValueError) as error:
                # A URL or a key that no request can be made with.
                raise Failure("validation_error", f"the trainer cannot be called ({type(error).__name__})") from None
            if status == 200:
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(answer := json.loads(content or b"{}"), dict):
                        return answer
                raise Failure("trainer_error", "the trainer's answer is no JSON object")
            if status < 500:
                category = "rate_limited" if status == 429 else "trainer_client_error"
                said = content[:300].decode("utf-8", "replace")
                raise Failure(category, f"the trainer answered {status}: {said}")
            failure = Failure("trainer_server_error", f"the trainer answered {status}")
        raise failure

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        async with self._http.stream("POST", self._url + path, content=body, headers=self._headers) as response:
            if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                raise Failure("trainer_error", "the trainer's answer is compressed, which was not asked for")
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise Failure("trainer_error", "the trainer's answer is too large")
            return response.status_code, content


def as_json(value: dict[str, Any]) -> bytes:
    """In ASCII, so that half a surrogate pair goes back as it came. Raises Failure for what no JSON has, as NaN."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise Failure("internal_error", "the conversation has values that JSON does not know") from None


# 6. One rollout.


@dataclass
class Metrics:
    total_latency_ms: float = 0.0
    llm_latency_ms: float = 0.0
    tool_latency_ms: float = 0.0
    num_llm_calls: int = 0
    num_tool_calls: int = 0
    prompt_tokens: int = 0
    """Of all calls together, as the trainer's engine had to read them."""
    response_tokens: int = 0
    max_context_tokens: int = 0


class Rollout:
    """Asks the trainer, calls the tools, asks again."""

    def __init__(
        self, request: RolloutRequest | InitRequest, trainer: Trainer, settings: Settings, template: Template | None
    ) -> None:
        self._request = request
        self._trainer = trainer
        self._settings = settings
        self._mask = Mask(template) if template is not None and isinstance(request, RolloutRequest) else None
        self._messages: list[Message] = list(request.messages)
        self._metrics = Metrics()
        self._used = 0
        self._first_prompt: int | None = None

    async def play(self) -> dict[str, Any]:
        """The whole rollout; its report, whatever happens."""
        started = time.perf_counter()
        reason: str | None = None
        failure: Failure | None = None
        try:
            async with asyncio.timeout(self._settings.rollout_seconds):
                reason = await self._loop()
        except Failure as known:
            failure = known
        except TimeoutError:
            failure = Failure("internal_error", f"took longer than {self._settings.rollout_seconds:g} s")
        except asyncio.CancelledError:
            failure = Failure("internal_error", "the rollout server is shutting down")
        except Exception as bug:
            # Its text may hold what is none of the trainer's business.
            failure = Failure("internal_error", f"the rollout server failed ({type(bug).__name__})")
        self._metrics.total_latency_ms = 1000 * (time.perf_counter() - started)
        return self.report(reason, failure)

    def report(self, reason: str | None, failure: Failure | None) -> dict[str, Any]:
        """How it ended, as the trainer is told."""
        return {
            "rollout_id": self._request.rollout_id,
            "status": "COMPLETED" if failure is None else "ERROR",
            "final_messages": self._messages,
            "finish_reason": reason,
            "error_message": None if failure is None else str(failure),
            "metrics": asdict(self._metrics),
            "extra_fields": {} if failure is None else {"error_category": failure.category},
        }

    def scored(self, report: dict[str, Any]) -> dict[str, Any]:
        """The same for generation B, whose server scores: a report all the same where the reward fails."""
        reward = None
        if report["status"] == "COMPLETED":
            try:
                reward = reward_of(report["final_messages"], self._request.metadata)
                if reward is not None and not math.isfinite(reward):
                    raise ValueError
            except Exception as bug:
                reward = None
                failure = Failure("internal_error", f"the reward could not be computed ({type(bug).__name__})")
                report = self.report(None, failure)
        reason = report["finish_reason"] if report["status"] == "COMPLETED" else "error"
        return {**report, "finish_reason": reason, "reward": reward}

    async def _loop(self) -> str:
        new: list[Message] = []
        for _ in range(self._request.max_turns):
            mask = None
            if self._mask is not None:
                mask = await self._mask.run(self._mask.before_call, list(self._messages), new)
                self._used = self._mask.num_tokens - self._mask.first_prompt
            if self._used >= self._request.max_tokens_total:
                return "max_tokens"
            message, cut = await self._ask(mask)
            self._messages.append(message)
            calls = message.get("tool_calls") or []
            if cut:
                # Half a turn is not acted upon. Its calls are answered, as a history without answers is broken.
                self._messages.extend(_answer(call, "Error: the turn was cut, nothing was called") for call in calls)
                return "max_tokens"
            if not calls:
                return "stop"
            started = time.perf_counter()
            texts = await asyncio.gather(*(call_tool(call, self._settings.tool_delay_s) for call in calls))
            self._metrics.tool_latency_ms += 1000 * (time.perf_counter() - started)
            self._metrics.num_tool_calls += len(calls)
            new = [_answer(call, text) for call, text in zip(calls, texts, strict=True)]
            self._messages.extend(new)
        return "max_turns"

    async def _ask(self, mask: list[int] | None) -> tuple[Message, bool]:
        """The next assistant message, and whether it was cut."""
        request = self._request
        if isinstance(request, RolloutRequest):
            body = request.sampling_params.model_dump() | {"model": "default", "response_mask": mask}
            body["logprobs"] = bool(body["logprobs"])
            path = "/v1/chat/completions" if self._settings.chat_path else "/v1/completions"
        else:
            params = {name: value for name, value in request.completion_params.items() if value is not None}
            body = {"model": "default", **params}
            path = "/v1/chat/completions"
        body |= {"messages": self._messages, "rollout_id": request.rollout_id}
        if isinstance(wanted := body.get("max_tokens"), int):
            body["max_tokens"] = min(wanted, request.max_tokens_total - self._used)
        started = time.perf_counter()
        answer = await self._trainer.post(path, as_json(body), CALL_RETRIES)
        self._metrics.llm_latency_ms += 1000 * (time.perf_counter() - started)
        self._metrics.num_llm_calls += 1
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            prompt_ids, sampled = answer.get("prompt_token_ids"), answer.get("token_ids")
            usage = answer.get("usage") or {}
            num_prompt = len(prompt_ids) if prompt_ids is not None else int(usage.get("prompt_tokens", 0))
            num_sampled = len(sampled) if sampled is not None else int(usage.get("completion_tokens", 0))
            if message.get("role", "assistant") != "assistant":
                raise ValueError
            if not all(isinstance(call, dict) for call in message.get("tool_calls") or []):
                raise ValueError
            if not (0 <= num_prompt < 2**31 and 0 <= num_sampled < 2**31):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
            raise Failure("trainer_error", "the trainer's answer is none of the protocol") from None
        if self._mask is not None:
            if prompt_ids is None or sampled is None:
                raise Failure("trainer_error", "the trainer's answer has no token_ids or no prompt_token_ids")
            await self._mask.run(self._mask.after_call, list(self._messages), prompt_ids, sampled)
        self._first_prompt = num_prompt if self._first_prompt is None else self._first_prompt
        self._used = num_prompt + num_sampled - self._first_prompt
        self._metrics.prompt_tokens += num_prompt
        self._metrics.response_tokens += num_sampled
        self._metrics.max_context_tokens = max(self._metrics.max_context_tokens, num_prompt + num_sampled)
        # As it came: the trainer compares it with what it said.
        return {"role": "assistant", **message}, choice.get("finish_reason") == "length"


def _answer(call: dict[str, Any], text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": call.get("id")}


# 7. The service.


@dataclass
class _Known:
    playing: asyncio.Task[dict[str, Any]]
    task: asyncio.Task[bytes]
    """Plays, reports, and has the report as JSON. Never cancelled: `playing` is, and its end is still reported."""
    since: float


class Service:
    """All rollouts of this process. What it remembers of them is the process's alone: run one, not several."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.template = Template(settings.tokenizer) if settings.tokenizer else None
        self.active = 0
        self.completed = 0
        self._slots = asyncio.Semaphore(settings.max_running)
        self._known: dict[str, _Known] = {}
        self._tls = ssl.create_default_context()

    def begin(self, key: str, request: RolloutRequest | InitRequest) -> asyncio.Task[bytes]:
        """Start a rollout, or find the one that is known by this key. Raises HTTPException."""
        now = time.monotonic()
        for old, known in list(self._known.items()):
            if known.task.done() and (now - known.since > REMEMBER_SECONDS or len(self._known) > MAX_REMEMBERED):
                del self._known[old]
        if key in self._known:
            return self._known[key].task
        parts = urlsplit(request.server_url)
        if not {parts.hostname, parts.netloc} & set(self.settings.callback_hosts):
            raise HTTPException(422, "server_url: this host is not one that this server calls (--callback-host)")
        if self.active >= self.settings.max_running + self.settings.max_waiting:
            raise HTTPException(429, "too many rollouts at once", headers={"retry-after": "1"})
        bearer = request.callback_api_key if isinstance(request, RolloutRequest) else request.api_key
        trainer = Trainer(self._tls, request.server_url, bearer)
        rollout = Rollout(request, trainer, self.settings, self.template)
        playing = asyncio.create_task(self._play(rollout))
        task = asyncio.create_task(self._run(request, rollout, trainer, playing))
        self.active += 1
        self._known[key] = _Known(playing, task, now)
        return task

    async def _play(self, rollout: Rollout) -> dict[str, Any]:
        # The deadline of a rollout begins with the rollout, not with the waiting.
        async with self._slots:
            return await rollout.play()

    async def _run(
        self,
        request: RolloutRequest | InitRequest,
        rollout: Rollout,
        trainer: Trainer,
        playing: asyncio.Task[dict[str, Any]],
    ) -> bytes:
        try:
            try:
                report = await playing
            except asyncio.CancelledError:
                report = rollout.report(None, Failure("internal_error", "the rollout server is shutting down"))
            is_b = isinstance(request, InitRequest)
            try:
                content = as_json(rollout.scored(report) if is_b else report)
            except Failure as failure:
                # What cannot be told is left out; that the rollout has ended is not.
                report = {**rollout.report(None, failure), "final_messages": []}
                content = as_json(rollout.scored(report) if is_b else report)
            if is_b:
                # A trainer that cannot be told has its own deadline.
                with contextlib.suppress(Failure):
                    await trainer.post("/v1/rollout/completed", content, REPORT_RETRIES)
            return content
        finally:
            self.active -= 1
            self.completed += 1
            await trainer.close()

    async def close(self) -> None:
        """End what is playing; every rollout still reports, those too that are just reporting."""
        running = [known for known in self._known.values() if not known.task.done()]
        for known in running:
            known.playing.cancel()
        if running:
            await asyncio.wait([known.task for known in running], timeout=SHUTDOWN_SECONDS)

    def health(self) -> dict[str, Any]:
        """For whoever watches."""
        counts = {"active_rollouts": self.active, "completed_rollouts": self.completed}
        return {"status": "healthy", "service": "rollout-server", "agent_loop": "calculator", **counts}


async def _raw(request: Request) -> bytes:
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise HTTPException(413, "the body is too large")
    return content


def _parsed(model: type[M], raw: bytes) -> M:
    try:
        return model.model_validate_json(raw)
    except ValidationError as failure:
        detail = failure.errors(include_url=False, include_context=False, include_input=False)
        raise HTTPException(422, detail) from None


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application. Loads the tokenizer when it starts."""
    service: Service | None = None

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        nonlocal service
        service = Service(settings)
        yield
        await service.close()

    def running() -> Service:
        assert service is not None
        return service

    def admitted(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if given[:7].lower() == "bearer ":
            given = given[7:]
        if settings.api_key and not hmac.compare_digest(given.strip().encode(), settings.api_key.encode()):
            raise HTTPException(401, "Invalid or missing API key")

    app = FastAPI(title="Remote rollout server", lifespan=lifespan, openapi_url=None)
    guarded = [Depends(admitted)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return running().health()

    @app.get("/platform/health", dependencies=guarded)
    async def platform_health() -> dict[str, Any]:
        return running().health()

    @app.get("/tools")
    async def tools() -> dict[str, Any]:
        return {"tools": TOOLS}

    @app.post("/rollout", dependencies=guarded)
    async def rollout(raw: Annotated[bytes, Depends(_raw)]) -> Response:
        request = _parsed(RolloutRequest, raw)
        if running().template is None:
            raise HTTPException(501, "generation A needs the trainer's tokenizer (--tokenizer)")
        # Shielded: that a caller went away does not end what another may ask for again.
        report = await asyncio.shield(running().begin(f"rollout {request.rollout_id}", request))
        return Response(report, media_type="application/json")

    @app.post("/v1/rollout/init", status_code=202, dependencies=guarded)
    async def init(raw: Annotated[bytes, Depends(_raw)]) -> JSONResponse:
        request = _parsed(InitRequest, raw)
        running().begin(f"init {request.idempotency_key or request.rollout_id}", request)
        return JSONResponse({"rollout_id": request.rollout_id, "tools": TOOLS}, 202)

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--tokenizer", default=os.environ.get("ROLLOUT_TOKENIZER"), help="or ROLLOUT_TOKENIZER")
    parser.add_argument("--chat-path", action="store_true", help="A1: call /v1/chat/completions instead of A's path")
    parser.add_argument("--callback-host", action="append", default=[], help="a trainer beside loopback; may repeat")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--tool-delay", type=float, default=0.0, help="seconds; 0.5 waits 0.1 to 0.5")
    chosen = parser.parse_args(arguments)
    settings = Settings(
        tokenizer=chosen.tokenizer,
        chat_path=chosen.chat_path,
        api_key=os.environ.get("ROLLOUT_API_KEY") or None,
        callback_hosts=(*Settings.callback_hosts, *chosen.callback_host),
        max_running=chosen.max_running,
        tool_delay_s=chosen.tool_delay,
    )
    uvicorn.run(create_app(settings), host=chosen.host, port=chosen.port, log_level="info")


if __name__ == "__main__":
    main()
