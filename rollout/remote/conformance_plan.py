"""What is played against a remote rollout server to see whether it keeps the protocol.

Invariant: a plan is data. It says what a scripted trainer answers to each call and how the rollout must then end;
nothing here knows a socket, and what a server did is judged in `rollout.remote.conformance` alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from rollout.errors import ConfigError
from rollout.remote.wire import FinishReason, Generation, Status

Speech = Literal["text", "tool", "two_tools", "unknown_tool", "bad_arguments", "cut"]

# A rollout that has spent so many tokens is over. An answer of the script has 20 to 60.
SMALL_TOKENS = 150
# Longer than a client that gives up at once waits, and far below the protocol's 300 s.
SLOW_SECONDS = 3.0
RETRY_AFTER_SECONDS = 1.0
# What a server may do in all with a trainer that always fails: the call and three repetitions.
MAX_TRIES = 4
# After the end: long enough to see a report that is posted again although it was taken.
LINGER_SECONDS = 2.5
UNKNOWN_TOOL = "no_such_tool"
BROKEN_ARGUMENTS = '{"a": 1, '
TEXT = "The answer is 12."
BEFORE_TOOL = "I will use the tool."
CUT_TEXT = "Let me think about this step by step: first of all we need to know what is"


@dataclass(frozen=True, slots=True)
class Step:
    """What the trainer does with one call."""

    speech: Speech = "text"
    status: int = 200
    """Any other: nothing is said, and this is answered."""
    hang_up: bool = False
    """Close the connection without an answer."""
    delay_s: float = 0.0
    retry_after: float | None = None
    end_sampled: bool = True
    """Whether token_ids end with the end-of-turn token; an engine that stops at a text leaves it out."""

    @property
    def fails(self) -> bool:
        """Whether the call gets no turn."""
        return self.hang_up or self.status != 200


@dataclass(frozen=True, slots=True)
class Scenario:
    """One rollout, and how it must end."""

    name: str
    about: str
    """In plain words, for the table."""
    steps: tuple[Step, ...]
    """For call 1, 2, …"""
    endless: Step | None = None
    """For every call after the steps; None: the last step again."""
    generations: tuple[Generation, ...] = ("A", "A1", "B")
    max_turns: int = 10
    max_tokens_total: int = 8_192
    report_statuses: tuple[int, ...] = ()
    """What B's completed callback gets before 200."""
    begun: int = 1
    """How often the rollout is begun under the same id; once more after its end where that is above 1."""
    extra_fields: bool = False
    """Whether the request has fields that the protocol does not know."""
    linger_s: float = 0.0
    status: Status = "COMPLETED"
    finish: tuple[FinishReason | None, ...] = ("stop",)
    calls: tuple[int, int] = (1, 1)
    """Fewest and most calls of the server, failed ones included."""
    categories: tuple[str, ...] = ()
    """error_category, one of them; an ERROR alone has one."""

    def step(self, call: int) -> Step:
        """What call number `call`, from 0, gets."""
        if call < len(self.steps):
            return self.steps[call]
        return self.endless or self.steps[-1]

    @property
    def needs_tool(self) -> bool:
        """Whether the script calls a tool that the server must have."""
        said = {step.speech for step in (*self.steps, *([self.endless] if self.endless else []))}
        return bool(said & {"tool", "two_tools"})


_TOOL, _TEXT = Step("tool"), Step("text")
_ERROR: tuple[FinishReason | None, ...] = (None, "error", "stop")

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("gives_up", "the trainer always fails with 500: a few tries, then ERROR",
             (Step(status=500),), status="ERROR", finish=_ERROR, calls=(2, MAX_TRIES),
             categories=("trainer_server_error", "trainer_error")),
    Scenario("single_turn", "one answer, no tools", (_TEXT,)),
    Scenario("tools", "two turns that call a tool, then the answer", (_TOOL, _TOOL, _TEXT), calls=(3, 3)),
    Scenario("two_calls", "two tool calls in one turn", (Step("two_tools"), _TEXT), calls=(2, 2)),
    Scenario("end_not_sampled", "an answer without its end-of-turn token: the mask has one 0 more",
             (Step("tool", end_sampled=False), _TEXT), generations=("A", "A1"), calls=(2, 2)),
    Scenario("tool_error", "a tool that does not exist, then broken arguments: the model is told, and goes on",
             (Step("unknown_tool"), Step("bad_arguments"), _TEXT), calls=(3, 3)),
    Scenario("max_turns", "a model that never stops calling tools, with max_turns 2", (_TOOL,), max_turns=2,
             finish=("max_turns",), calls=(2, 2)),
    Scenario("max_tokens", f"the same, with max_tokens_total {SMALL_TOKENS}", (_TOOL,), max_turns=100,
             max_tokens_total=SMALL_TOKENS, finish=("max_tokens",), calls=(0, 100)),
    Scenario("truncated", "a turn that was cut at its length: kept, and not acted upon", (Step("cut"), _TEXT),
             finish=("max_tokens",), calls=(1, 1)),
    Scenario("server_error", "500 to the first call: it must be made again", (Step(status=500), _TOOL, _TEXT),
             calls=(3, 3)),
    Scenario("hang_up", "a connection that breaks before the answer: the call must be made again",
             (Step(hang_up=True), _TEXT), calls=(2, 2)),
    Scenario("slow", f"an answer after {SLOW_SECONDS:g} s: it must be waited for",
             (Step("text", delay_s=SLOW_SECONDS),), calls=(1, 1)),
    Scenario("rate_limited", "429 with Retry-After: ERROR, or the call again when that time is over",
             (Step(status=429, retry_after=RETRY_AFTER_SECONDS), _TEXT), finish=("stop",), calls=(1, 2),
             categories=("rate_limited",)),
    Scenario("client_error", "400 to a call: ERROR at once, and no second call", (Step(status=400), _TEXT),
             status="ERROR", finish=_ERROR, calls=(1, 1),
             categories=("trainer_client_error", "trainer_error", "validation_error")),
    Scenario("unknown_fields", "a request with fields that the protocol does not know", (_TEXT,), extra_fields=True),
    Scenario("begun_twice", "the same rollout begun three times: played once", (Step("text", delay_s=0.3),),
             generations=("B",), begun=2),
    Scenario("report_again", "500 to the report of the end: it must come again, and no more once it was taken",
             (_TEXT,), generations=("B",), report_statuses=(500,), linger_s=LINGER_SECONDS),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BadBody:
    """A request that must be refused, and why."""

    about: str
    content: bytes
    statuses: tuple[int, ...] = (422,)


def bad_bodies(generation: Generation, server_url: str) -> list[BadBody]:
    """Requests that break one rule of the protocol each."""
    good: dict[str, Any] = {
        "rollout_id": "conformance-invalid",
        "server_url": server_url,
        "messages": [{"role": "user", "content": "?"}],
    }
    if generation == "B":
        good["completion_params"] = {}
    changes: dict[str, dict[str, Any]] = {
        "no messages": {"messages": []},
        "messages that are no list": {"messages": "hello"},
        "a message without a role": {"messages": [{"content": "?"}]},
        "a server_url that is not http(s)": {"server_url": "ftp://127.0.0.1/"},
        "a rollout_id of 257 characters": {"rollout_id": "x" * 257},
        "an empty rollout_id": {"rollout_id": ""},
        "max_turns 0": {"max_turns": 0},
    }
    if generation == "B":
        changes["a blank rollout_id"] = {"rollout_id": "  "}
        changes["completion_params that are no object"] = {"completion_params": "hot"}
    else:
        changes["max_turns 101"] = {"max_turns": 101}
        changes["temperature 3"] = {"sampling_params": {"temperature": 3}}
        changes["max_tokens 0"] = {"sampling_params": {"max_tokens": 0}}
        changes["an unknown role"] = {"messages": [{"role": "oracle", "content": "?"}]}
    bodies = [BadBody(about, json.dumps({**good, **change}).encode()) for about, change in changes.items()]
    missing = ["rollout_id", "server_url", "messages", *(["completion_params"] if generation == "B" else [])]
    for name in missing:
        left = {key: value for key, value in good.items() if key != name}
        bodies.append(BadBody(f"no {name}", json.dumps(left).encode()))
    bodies.append(BadBody("no JSON", b"{", (400, 422)))
    return bodies


def example_call(tools: list[dict[str, Any]], name: str | None, arguments: str | None) -> tuple[str, str] | None:
    """Name and JSON arguments of a tool call that the server should be able to run; None where it has no tools.

    `name`, `arguments`: as the user wants them; otherwise the first tool, with values that fit its schema.
    Raises ConfigError for a name that is not among the tools, or arguments that are no JSON object.
    """
    if arguments is not None:
        try:
            if not isinstance(json.loads(arguments), dict):
                raise ValueError
        except ValueError:
            raise ConfigError("--tool-arguments must be a JSON object") from None
    functions = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            functions[function["name"]] = function
    if name is None:
        if not functions:
            return None
        name = next(iter(functions))
    elif functions and name not in functions:
        raise ConfigError(f"--tool {name}: the server has no such tool; it has {', '.join(functions)}")
    if arguments is None:
        arguments = json.dumps(_value(functions.get(name, {}).get("parameters") or {"type": "object"}, 0))
    return name, arguments


_PLAIN: dict[str, Any] = {"number": 3, "integer": 3, "boolean": True, "string": "3", "array": [], "null": None}
_MAX_DEPTH = 5


def _value(schema: Any, depth: int) -> Any:
    """A value that fits a JSON schema, as far as simple ones go."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return "3"
    if "const" in schema:
        return schema["const"]
    for name in ("enum", "examples"):
        if isinstance(schema.get(name), list) and schema[name]:
            return schema[name][0]
    if "default" in schema:
        return schema["default"]
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            return _value(schema[name][0], depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        required = schema.get("required")
        names = required if isinstance(required, list) else []
        return {key: _value(known.get(key, {}), depth + 1) for key in names}
    if kind in ("number", "integer") and isinstance(schema.get("minimum"), int):
        return schema["minimum"]
    return _PLAIN.get(kind, "3") if isinstance(kind, str) else "3"
