"""Calculator tasks and the conversations that solve them.

Everything here is plain data: a :class:`Task` is what the user asks (with the operations behind it), and
:func:`solution_turns` is a solution of it, turn by turn, right or hasty. ``make_model.py`` trains the demo model on
such conversations and writes the shipped ``tasks.jsonl`` from the same generator.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from examples.calculator.environment import Calculator
from rollout.calculator import calculator_tools

# --- What the model is shown -------------------------------------------------------------------------------

SYSTEM_PROMPT = Calculator.system_prompt
TOOLS: list[dict[str, Any]] = [tool.spec for tool in calculator_tools()]
DIVISION_BY_ZERO = "Error: division by zero"
ROUNDING_DIGITS = 12  # significant digits of a quotient whose decimals never end

# --- Arithmetic --------------------------------------------------------------------------------------------

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
PRECEDENCE = {"add": 1, "subtract": 1, "multiply": 2, "divide": 2}


def apply_tool(tool: str, a: Fraction, b: Fraction) -> Fraction:
    """The exact value of one operation; raises ZeroDivisionError like any division."""
    if tool == "add":
        return a + b
    if tool == "subtract":
        return a - b
    if tool == "multiply":
        return a * b
    if tool == "divide":
        return a / b
    raise KeyError(tool)


def is_decimal(value: Fraction) -> bool:
    """Whether the value has finitely many decimals."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def format_number(value: Fraction) -> str:
    """The exact decimal text of a value, or 12 significant digits where the decimals never end."""
    if value.denominator == 1:
        return str(value.numerator)
    if is_decimal(value):
        # A denominator of 2**i * 5**j has at most max(i, j) <= bit_length decimals.
        places = value.denominator.bit_length()
        scaled = value * 10**places
        text = format(Decimal(scaled.numerator).scaleb(-places, Context(prec=4096)), "f")
    else:
        quotient = Context(prec=ROUNDING_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
        text = format(quotient, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def run_tool(tool: str, arguments: dict[str, Any]) -> str:
    """The text a tool answers with."""
    try:
        a, b = Fraction(str(arguments["a"])), Fraction(str(arguments["b"]))
        return format_number(apply_tool(tool, a, b))
    except ZeroDivisionError:
        return DIVISION_BY_ZERO
    except (KeyError, TypeError, ValueError):
        return "Error: unknown tool or bad arguments"


# --- Tasks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultOf:
    """An operand which is the result of an earlier operation of the same task."""

    index: int


@dataclass(frozen=True)
class Operation:
    tool: str
    a: int | ResultOf
    b: int | ResultOf


@dataclass(frozen=True)
class Task:
    """One question; ``answers`` are the operations' results the final answer has to name, in order."""

    kind: str  # "single", "nested" or "parallel"
    question: str
    operations: tuple[Operation, ...]
    answers: tuple[str, ...]

    def to_record(self, task_id: str) -> dict[str, Any]:
        """The task as one line of tasks.jsonl."""

        def operand(value: int | ResultOf) -> int | dict[str, int]:
            return {"result_of": value.index} if isinstance(value, ResultOf) else value

        operations = [{"tool": op.tool, "a": operand(op.a), "b": operand(op.b)} for op in self.operations]
        return {
            "task_id": task_id,
            "messages": [{"role": "user", "content": self.question}],
            "data": {"answers": list(self.answers), "operations": operations, "kind": self.kind},
        }


KIND_SHARES = {"single": 0.5, "nested": 0.3, "parallel": 0.2}
ONE_QUESTION = ("What is {}?", "Compute {}.", "Calculate {}.", "How much is {}?", "Work out {}.")
TWO_QUESTIONS = (
    "What are {} and {}?",
    "Compute {} and {}.",
    "Calculate both {} and {}.",
    "Work out {} and {}.",
)
MAX_ANSWER_LENGTH = 8  # longer results (mostly 1/3-like quotients) are kept only now and then


def _draw_operands(rng: random.Random, tool: str) -> tuple[int, int]:
    """Two integers that suit the tool: three digits to add, fewer to multiply, mostly exact quotients."""
    if tool in ("add", "subtract"):
        limit = rng.choice((99, 999, 999))
        return rng.randint(0, limit), rng.randint(0, limit)
    if tool == "multiply":
        return rng.randint(2, 99), rng.randint(2, 40)
    divisor = rng.randint(2, 30)
    if rng.random() < 0.9:
        return divisor * rng.randint(1, 40), divisor
    return rng.randint(1, 200), divisor


def _draw_nested(rng: random.Random) -> tuple[str, tuple[Operation, Operation]] | None:
    """An expression of two operations and the operations in the order they are done; None: not a nice one."""
    inner, outer = rng.choice(tuple(SYMBOLS)), rng.choice(tuple(SYMBOLS))
    a, b = _draw_operands(rng, inner)
    other = rng.randint(2, 30) if outer in ("multiply", "divide") else rng.randint(0, 999)
    inner_value = apply_tool(inner, Fraction(a), Fraction(b))
    inner_text = f"{a} {SYMBOLS[inner]} {b}"
    inner_first = rng.random() < 0.6
    if inner_first:
        operation = Operation(outer, ResultOf(0), other)
        optional_parentheses = PRECEDENCE[inner] >= PRECEDENCE[outer]
    else:
        operation = Operation(outer, other, ResultOf(0))
        optional_parentheses = PRECEDENCE[inner] > PRECEDENCE[outer]
        if outer == "divide" and inner_value == 0:
            return None
    if not (optional_parentheses and rng.random() < 0.7):
        inner_text = f"({inner_text})"
    left, right = (inner_text, str(other)) if inner_first else (str(other), inner_text)
    # Whole numbers in between, so that the questions read like ones people ask.
    if inner_value.denominator != 1:
        return None
    return f"{left} {SYMBOLS[outer]} {right}", (Operation(inner, a, b), operation)


def solve(operations: Sequence[Operation]) -> list[str]:
    """The result of each operation as the tools would give it."""
    results: list[str] = []
    for op in operations:
        a, b = (results[x.index] if isinstance(x, ResultOf) else x for x in (op.a, op.b))
        results.append(run_tool(op.tool, {"a": a, "b": b}))
    return results


def draw_task(rng: random.Random, shares: dict[str, float]) -> Task:
    """One random task."""
    kind = rng.choices(tuple(shares), tuple(shares.values()))[0]
    while True:
        if kind == "nested":
            drawn = _draw_nested(rng)
            if drawn is None:
                continue
            expression, operations = drawn
            question = rng.choice(ONE_QUESTION).format(expression)
            answers = solve(operations)[-1:]
        else:
            count = 2 if kind == "parallel" else 1
            tools = [rng.choice(tuple(SYMBOLS)) for _ in range(count)]
            operations = tuple(Operation(tool, *_draw_operands(rng, tool)) for tool in tools)
            expressions = [f"{op.a} {SYMBOLS[op.tool]} {op.b}" for op in operations]
            templates = TWO_QUESTIONS if kind == "parallel" else ONE_QUESTION
            question = rng.choice(templates).format(*expressions)
            answers = solve(operations)
        if all(len(answer) <= MAX_ANSWER_LENGTH for answer in answers) or rng.random() < 0.05:
            return Task(kind, question, tuple(operations), tuple(answers))


def draw_tasks(
    seed: int, shares: dict[str, float] = KIND_SHARES, exclude: Set[tuple[Operation, ...]] = frozenset()
) -> Iterator[Task]:
    """An endless stream of tasks; no question asks for the operations of an excluded task."""
    rng = random.Random(seed)
    while True:
        task = draw_task(rng, shares)
        if task.operations not in exclude:
            yield task


# --- Solutions ---------------------------------------------------------------------------------------------

_THOUGHTS = {
    "add": "add {} and {}",
    "subtract": "subtract {1} from {0}",
    "multiply": "multiply {} and {}",
    "divide": "divide {} by {}",
}


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the text it writes, and the tools' answers to it (none after the last turn)."""

    text: str
    tool_messages: tuple[dict[str, Any], ...] = ()


def tool_call_text(tool: str, a: str, b: str) -> str:
    """A tool call on the wire."""
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {{"a": {a}, "b": {b}}}}}\n</tool_call>'


def answer_text(answers: Sequence[str]) -> str:
    """The final sentence."""
    if len(answers) == 1:
        return f"The answer is {answers[0]}."
    return f"The answers are {' and '.join(answers)}."


def solution_turns(task: Task, hasty: bool = False) -> list[Turn]:
    """A solution of the task: think once, call the tools (independent calls together), then answer.

    A hasty one leaves out the last operation and answers with what there is: the first operand of a single one, the
    inner result of a nested one, one result of a pair. It is well formed, and wrong.
    """
    operations = task.operations[:-1] if hasty else task.operations
    results = solve(operations)
    groups = [operations] if task.kind == "parallel" else [(op,) for op in operations]
    turns: list[Turn] = []
    done = 0
    for group in groups:
        operands = [[results[x.index] if isinstance(x, ResultOf) else str(x) for x in (op.a, op.b)] for op in group]
        calls = "\n".join(tool_call_text(op.tool, *values) for op, values in zip(group, operands, strict=True))
        thought = ""
        if not turns:
            steps = [_THOUGHTS[op.tool].format(*values) for op, values in zip(group, operands, strict=True)]
            thought = f"<think>\n{', '.join(steps)}\n</think>\n\n"
        tool_messages = tuple(
            {
                "role": "tool",
                "name": op.tool,
                "tool_call_id": f"call_{done + i}",
                "content": results[done + i],
            }
            for i, op in enumerate(group)
        )
        turns.append(Turn(thought + calls, tool_messages))
        done += len(group)
    answers = (results[-1:] or [str(task.operations[0].a)]) if hasty else task.answers
    turns.append(Turn(answer_text(answers)))
    return turns


def first_messages(task: Task) -> list[dict[str, Any]]:
    """The messages a session starts with."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": task.question}]


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_right(answer: str, expected: Sequence[str]) -> bool:
    """Whether the numbers in the final text are the expected ones, in order."""
    return _NUMBER.findall(answer) == list(expected)


def dump_tasks(tasks: Sequence[Task]) -> str:
    """tasks.jsonl as text."""
    lines = [json.dumps(task.to_record(f"calc-{number:04d}")) for number, task in enumerate(tasks, 1)]
    return "\n".join(lines) + "\n"
