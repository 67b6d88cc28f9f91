"""Calculator tools with exact arithmetic: what the demo's model calls, and a ready example of tools.

Numbers are decimals of up to MAX_DIGITS digits, between 10**-MAX_DIGITS and 10**MAX_DIGITS. Sums, differences and
products are exact; a quotient that does not terminate is rounded to QUOTIENT_DIGITS significant digits. Nothing is
ever evaluated as code.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable
from decimal import Context, Decimal, Inexact, localcontext
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

from rollout.errors import ToolError
from rollout.tools import Tool, tool

# Bounds the cost of one call: without it 1e999999 * 1e999999 would fill the memory.
MAX_DIGITS = 100
QUOTIENT_DIGITS = 12
_TOO_LARGE = 10 ** (MAX_DIGITS + 1)


def _decimal(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number")
    # Before anything is done with the digits: a text or a whole number may have millions, and Python itself refuses
    # to write whole numbers of more than 4300, in words that mean nothing to a model.
    if (isinstance(value, str) and len(value) > 2 * MAX_DIGITS) or (
        isinstance(value, int) and abs(value) >= _TOO_LARGE
    ):
        raise ValueError(f"has more than {MAX_DIGITS} digits")
    try:
        number = Decimal(str(value).strip())
    except ArithmeticError:
        raise ValueError("must be a number") from None
    if not number.is_finite():
        raise ValueError("must be a finite number")
    return number


def _bounded(value: object) -> Decimal:
    number = _decimal(value)
    if number and (abs(number.adjusted()) > MAX_DIGITS or len(number.as_tuple().digits) > MAX_DIGITS):
        raise ValueError(f"has more than {MAX_DIGITS} digits")
    return number


Number = Annotated[Decimal, BeforeValidator(_bounded), WithJsonSchema({"type": "number"})]


def to_plain(number: Decimal) -> str:
    """A decimal without exponent and without trailing zeros: "229", "0.5", "-3".

    Raises ToolError for a result of more digits than the calculator keeps.
    """
    if number and abs(number.adjusted()) > 2 * MAX_DIGITS:
        raise ToolError(f"the result has more than {2 * MAX_DIGITS} digits")
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _exact(operation: Callable[[], Decimal]) -> str:
    # Wide enough that operands of MAX_DIGITS digits at opposite ends of the range still add without rounding.
    with localcontext(Context(prec=6 * MAX_DIGITS, traps=[Inexact])):
        return to_plain(operation())


async def _wait(max_delay_s: float) -> None:
    if max_delay_s > 0:
        await asyncio.sleep(random.uniform(0.2, 1.0) * max_delay_s)


@functools.cache
def calculator_tools(max_delay_s: float = 0.0) -> tuple[Tool, ...]:
    """add, subtract, multiply, divide; made once, as the making of a schema costs about a millisecond.

    Each waits 20 to 100 % of `max_delay_s` seconds before it answers: a stand-in for tools that are slow.
    """

    @tool
    async def add(a: Number, b: Number) -> str:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        await _wait(max_delay_s)
        return _exact(lambda: a + b)

    @tool
    async def subtract(a: Number, b: Number) -> str:
        """Subtract b from a.

        Args:
            a: The first number.
            b: The second number.
        """
        await _wait(max_delay_s)
        return _exact(lambda: a - b)

    @tool
    async def multiply(a: Number, b: Number) -> str:
        """Multiply two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        await _wait(max_delay_s)
        return _exact(lambda: a * b)

    @tool
    async def divide(a: Number, b: Number) -> str:
        """Divide a by b.

        Args:
            a: The first number.
            b: The second number.
        """
        await _wait(max_delay_s)
        if b == 0:
            raise ToolError("division by zero")
        return to_plain(quotient(Fraction(a) / Fraction(b)))

    return add, subtract, multiply, divide


def quotient(value: Fraction) -> Decimal:
    """A fraction as a decimal: exact where it terminates within MAX_DIGITS, else rounded to QUOTIENT_DIGITS."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    digits = MAX_DIGITS if rest == 1 else QUOTIENT_DIGITS
    return Context(prec=digits).divide(Decimal(value.numerator), Decimal(value.denominator))
