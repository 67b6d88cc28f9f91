"""The cluster's own tools: an echo, the time in any zone, and exact arithmetic.

Invariant: nothing is evaluated as code, nothing is invented, and no result is larger than what is written here: a
zone that does not exist is an error that names it, never another zone's time.
"""

from __future__ import annotations

import difflib
import functools
import zoneinfo
from datetime import UTC, datetime

from rollout.calculator import calculator_tools
from rollout.errors import ToolError
from rollout.tools import Tool, tool

# Half of what a session takes of one result by default (`limits.max_tool_output_chars`).
MAX_ECHO_CHARS = 8_192
# The longest name of a zone has 32 characters; of something else so many are repeated in the error.
MAX_SHOWN_CHARS = 60


@functools.cache
def builtin_tools() -> tuple[Tool, ...]:
    """echo, get_time, and the calculator's add, subtract, multiply and divide. Made once: schemas take a while."""

    @tool
    async def echo(text: str) -> str:
        """Return the text as it is.

        Args:
            text: The text to return.
        """
        if len(text) > MAX_ECHO_CHARS:
            raise ToolError(f"the text has {len(text)} characters, more than {MAX_ECHO_CHARS}; send less")
        return text

    # In a thread, as sync tools are: the first call reads the machine's list of zones, some 20 ms of disk.
    @tool
    def get_time(zone: str = "UTC") -> str:
        """Return the present date, time and weekday in a time zone.

        Args:
            zone: The zone's IANA name, such as Europe/Berlin.
        """
        return time_in(zone, datetime.now(UTC))

    return echo, get_time, *calculator_tools()


def time_in(zone: str, now: datetime) -> str:
    """An instant (aware) as "2026-01-31T09:00:00+01:00 (Saturday, Europe/Berlin)". Raises ToolError for no zone."""
    name = zone.strip()
    if name == "UTC":
        # The one zone that needs no data of the machine.
        return _shown(now.astimezone(UTC), name)
    known = _zones()
    if name not in known:
        raise ToolError(_unknown(name, known))
    return _shown(now.astimezone(zoneinfo.ZoneInfo(name)), name)


def _shown(local: datetime, zone: str) -> str:
    return f"{local.isoformat(timespec='seconds')} ({_WEEKDAYS[local.weekday()]}, {zone})"


# Not from `calendar`, whose names follow the process's locale.
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@functools.cache
def _zones() -> frozenset[str]:
    """Asked first, so that a name which is a path or a directory of the time zone data never reaches the disk."""
    return frozenset(zoneinfo.available_timezones())


def _unknown(name: str, known: frozenset[str]) -> str:
    shown = name if len(name) <= MAX_SHOWN_CHARS else name[: MAX_SHOWN_CHARS - 1] + "…"
    if not known:
        return f"the time zone {shown!r} cannot be looked up: this machine has no time zone data; install tzdata"
    by_lower = {zone.lower(): zone for zone in sorted(known)}
    wanted = shown.lower().replace(" ", "_")
    # A city alone is what people write most.
    near = [zone for lower, zone in by_lower.items() if lower.rpartition("/")[2] == wanted]
    near = near or [by_lower[lower] for lower in difflib.get_close_matches(wanted, by_lower, n=1)]
    hint = f"did you mean {near[0]}?" if near else "use an IANA name such as Europe/Berlin"
    return f"there is no time zone {shown!r}; {hint}"
