"""The calculator: exact where it says so, bounded, and never surprised by what a model writes."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.calculator import MAX_DIGITS, QUOTIENT_DIGITS, calculator_tools, quotient, to_plain
from rollout.errors import ToolError
from rollout.tool_calls import ToolCall, ToolResult, ToolSet

TOOLS = ToolSet(calculator_tools())
integers = st.integers(-(10**MAX_DIGITS) + 1, 10**MAX_DIGITS - 1)


def result_of(name: str, a: Any, b: Any) -> ToolResult:
    call = ToolCall("1", name, {"a": a, "b": b})
    return asyncio.run(TOOLS.call(call, timeout=5, max_output_chars=10_000))


def compute(name: str, a: Any, b: Any) -> str:
    result = result_of(name, a, b)
    assert result.record.ok, result.content
    return result.content


def test_the_model_is_shown_plain_numbers():
    assert [spec["function"]["name"] for spec in TOOLS.specs] == ["add", "subtract", "multiply", "divide"]
    assert TOOLS.specs[1]["function"] == {
        "name": "subtract",
        "description": "Subtract b from a.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number", "description": "The first number."},
                "b": {"type": "number", "description": "The second number."},
            },
            "required": ["a", "b"],
        },
    }


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("add", 0.1, 0.2, "0.3"),
        ("add", 1, 2, "3"),
        ("add", "1e100", "1e-100", "1" + "0" * 100 + "." + "0" * 99 + "1"),
        ("add", -5, 5, "0"),
        ("add", "-0", 0, "0"),
        ("subtract", 3, 10, "-7"),
        ("subtract", "  2.50 ", 1, "1.5"),
        ("multiply", 99999999999999999999, 99999999999999999999, "9999999999999999999800000000000000000001"),
        ("multiply", -0.5, 0.5, "-0.25"),
        ("multiply", 0, -3, "0"),
        ("multiply", "1e100", "1e100", "1" + "0" * 200),
        ("divide", 442, 26, "17"),
        ("divide", 1, 8, "0.125"),
        ("divide", 1, 3, "0.333333333333"),
        ("divide", -2, 3, "-0.666666666667"),
        ("divide", 1, 1024, "0.0009765625"),
        ("divide", 100, 1e-2, "10000"),
        ("divide", 0, -7, "0"),
    ],
)
def test_results(name: str, a: Any, b: Any, expected: str):
    assert compute(name, a, b) == expected


@given(integers, integers)
def test_integers_are_exact(a: int, b: int):
    assert compute("add", a, b) == str(a + b)
    assert compute("subtract", a, b) == str(a - b)
    assert compute("multiply", a, b) == str(a * b)


@given(integers, st.integers(1, 60), st.integers(0, 60))
def test_quotients_that_terminate_are_exact(numerator: int, twos: int, fives: int):
    value = Fraction(numerator % 10**20, 2**twos * 5**fives)
    assert Fraction(quotient(value)) == value


@given(integers, integers.filter(bool))
def test_other_quotients_are_correctly_rounded(a: int, b: int):
    value = Fraction(a, b)
    found = quotient(value)
    assert abs(Fraction(found) - value) <= abs(value) / 2 / 10 ** (QUOTIENT_DIGITS - 1)
    assert len(found.as_tuple().digits) <= MAX_DIGITS


@pytest.mark.parametrize(
    ("a", "problem"),
    [
        ("12 apples", "must be a number"),
        ("", "must be a number"),
        ("__import__('os')", "must be a number"),
        (True, "must be a number"),
        (None, "must be a number"),
        ([1], "must be a number"),
        (float("nan"), "must be a finite number"),
        ("sNaN", "must be a finite number"),
        ("-Infinity", "must be a finite number"),
        ("1e101", "has more than 100 digits"),
        ("1e-101", "has more than 100 digits"),
        ("1e999999999", "has more than 100 digits"),
        (10**MAX_DIGITS + 1, "has more than 100 digits"),
        (-(10**MAX_DIGITS) * 10, "has more than 100 digits"),
        ("1" * 10_000, "has more than 100 digits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_number_is_told_to_the_model(a: Any, problem: str):
    result = result_of("add", a, 1)
    assert result.outcome == "invalid_arguments"
    assert result.content == f"Error: invalid arguments for add: a: {problem}"


@pytest.mark.parametrize("digits", [5_000, 4_000_000])
def test_whole_numbers_that_python_itself_will_not_write_are_refused_in_the_same_words(digits: int):
    result = result_of("multiply", 10**digits, 3)
    assert result.content == "Error: invalid arguments for multiply: a: has more than 100 digits"
    assert result.record.seconds < 1.0


def test_division_by_zero_and_results_that_are_too_large():
    assert result_of("divide", 1, 0).content == "Error: division by zero"
    assert result_of("divide", 1, "0.00").content == "Error: division by zero"
    assert result_of("multiply", "5e100", "5e100").content == "Error: the result has more than 200 digits"


@pytest.mark.parametrize("zero", ["0e-999999999", "0e999999999", "-0.0e5"])
@pytest.mark.parametrize("name", ["add", "multiply", "divide"])
def test_a_zero_with_a_huge_exponent_costs_nothing(name: str, zero: str):
    result = result_of(name, zero, 3)
    assert result.content == ("3" if name == "add" else "0")
    assert result.record.seconds < 1.0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("229", "229"),
        ("0.50", "0.5"),
        ("-3.000", "-3"),
        ("1E+3", "1000"),
        ("-0.0", "0"),
        ("0E-10", "0"),
        ("100", "100"),
    ],
)
def test_plain_numbers(number: str, text: str):
    assert to_plain(Decimal(number)) == text


def test_plain_numbers_are_bounded():
    assert to_plain(Decimal("1E+200")) == "1" + "0" * 200
    for number in ("1E+201", "1E-201", "1E+999999"):
        with pytest.raises(ToolError, match="the result has more than 200 digits"):
            to_plain(Decimal(number))


async def test_slow_tools_wait_a_part_of_the_delay(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("rollout.calculator.asyncio.sleep", sleep)
    slow = ToolSet(calculator_tools(max_delay_s=2.0))
    for _ in range(20):
        call = ToolCall("1", "add", {"a": 1, "b": 1})
        assert (await slow.call(call, timeout=5, max_output_chars=100)).content == "2"
    assert len(slept) == 20 and all(0.4 <= seconds <= 2.0 for seconds in slept) and len(set(slept)) > 1
    slept.clear()
    await TOOLS.call(ToolCall("1", "add", {"a": 1, "b": 1}), timeout=5, max_output_chars=100)
    assert slept == []
