"""The cluster's own tools: an echo that is one, the time of the zone that was asked for, and clear refusals."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from rollout import builtin_tools as room
from rollout.builtin_tools import MAX_ECHO_CHARS, builtin_tools, time_in
from rollout.errors import ToolError
from rollout.limits import Limits
from rollout.tool_calls import ToolCall, ToolResult, ToolSet

WINTER = datetime(2026, 1, 31, 23, 30, 5, 999_999, tzinfo=UTC)
SUMMER = datetime(2026, 7, 4, 12, 0, tzinfo=UTC)


async def call(name: str, **arguments: Any) -> ToolResult:
    tools = ToolSet(builtin_tools())
    return await tools.call(ToolCall("1", name, arguments), timeout=10, max_output_chars=16_384)


def test_the_model_is_shown_names_descriptions_and_defaults():
    specs = {spec["function"]["name"]: spec["function"] for spec in ToolSet(builtin_tools()).specs}
    assert list(specs) == ["echo", "get_time", "add", "subtract", "multiply", "divide"]
    assert specs["echo"]["parameters"]["required"] == ["text"]
    assert specs["get_time"]["parameters"] == {
        "type": "object",
        "properties": {
            "zone": {
                "type": "string",
                "default": "UTC",
                "description": "The zone's IANA name, such as Europe/Berlin.",
            }
        },
    }


@pytest.mark.parametrize("text", ["", "plain", "zwölf\n€ \u2028\x00", '{"a": 1}', "x" * MAX_ECHO_CHARS])
async def test_an_echo_is_the_text_itself(text: str):
    result = await call("echo", text=text)
    assert result.record.ok and result.content == text


async def test_an_echo_is_bounded():
    result = await call("echo", text="x" * (MAX_ECHO_CHARS + 1))
    assert result.content == "Error: the text has 8193 characters, more than 8192; send less"
    assert Limits().max_tool_output_chars >= MAX_ECHO_CHARS, "an echo of the longest text is no oversize result"


@pytest.mark.parametrize(
    ("now", "zone", "shown"),
    [
        (WINTER, "UTC", "2026-01-31T23:30:05+00:00 (Saturday, UTC)"),
        (WINTER, "Europe/Berlin", "2026-02-01T00:30:05+01:00 (Sunday, Europe/Berlin)"),
        (SUMMER, "Europe/Berlin", "2026-07-04T14:00:00+02:00 (Saturday, Europe/Berlin)"),
        (SUMMER, "America/New_York", "2026-07-04T08:00:00-04:00 (Saturday, America/New_York)"),
        (SUMMER, "Asia/Kathmandu", "2026-07-04T17:45:00+05:45 (Saturday, Asia/Kathmandu)"),
        (SUMMER, " Etc/UTC ", "2026-07-04T12:00:00+00:00 (Saturday, Etc/UTC)"),
        (SUMMER.astimezone(timezone(timedelta(hours=9))), "UTC", "2026-07-04T12:00:00+00:00 (Saturday, UTC)"),
    ],
)
def test_the_time_is_that_of_the_zone(now: datetime, zone: str, shown: str):
    assert time_in(zone, now) == shown


async def test_get_time_is_now():
    before = datetime.now(UTC).replace(microsecond=0)
    told = [await call("get_time"), await call("get_time", zone="Australia/Sydney")]
    after = datetime.now(UTC)
    for result, ending in zip(told, ("UTC)", "Australia/Sydney)"), strict=True):
        assert result.record.ok and result.content.endswith(ending)
        assert before <= datetime.fromisoformat(result.content.split()[0]) <= after


@pytest.mark.parametrize(
    ("zone", "problem"),
    [
        ("Europe/Berlinn", "there is no time zone 'Europe/Berlinn'; did you mean Europe/Berlin?"),
        ("berlin", "there is no time zone 'berlin'; did you mean Europe/Berlin?"),
        ("New York", "there is no time zone 'New York'; did you mean America/New_York?"),
        ("europe/paris", "there is no time zone 'europe/paris'; did you mean Europe/Paris?"),
        ("", "there is no time zone ''; use an IANA name such as Europe/Berlin"),
        ("Europe", "there is no time zone 'Europe'"),
        ("../../etc/passwd", "there is no time zone '../../etc/passwd'"),
        ("/etc/localtime", "there is no time zone '/etc/localtime'"),
        ("a\x00b", "there is no time zone 'a\\x00b'"),
        ("x" * 100_000, "there is no time zone 'xxxxxxxxxx"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_an_unknown_zone_is_an_error_that_names_it(zone: str, problem: str):
    started = time.monotonic()
    result = await call("get_time", zone=zone)
    assert result.outcome == "exception" and not result.record.ok
    assert result.content.startswith(f"Error: {problem}") and len(result.content) < 200
    assert time.monotonic() - started < 5


async def test_a_zone_of_a_wrong_type_is_no_zone():
    assert (await call("get_time", zone=2)).outcome == "invalid_arguments"
    assert (await call("get_time", city="Berlin")).outcome == "invalid_arguments"


def test_without_time_zone_data_only_utc_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "_zones", frozenset)
    assert time_in("UTC", SUMMER) == "2026-07-04T12:00:00+00:00 (Saturday, UTC)"
    with pytest.raises(ToolError, match=r"'Europe/Berlin' cannot be looked up.*install tzdata"):
        time_in("Europe/Berlin", SUMMER)


async def test_a_result_that_would_be_huge_is_refused_at_once():
    started = time.monotonic()
    for a in ("1e999999999", 10**5_000, 10**4_000_000, "9" * 1_000_000):
        result = await call("multiply", a=a, b=a)
        assert result.outcome == "invalid_arguments" and "a: has more than 100 digits" in result.content
    assert time.monotonic() - started < 5
