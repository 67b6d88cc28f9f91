"""A user's filter: Python code that looks at a group's rows and decides whether it is worth training on.

Invariant: it runs in a thread of its own, under a deadline; whatever it raises or returns wrongly is a FilterError,
which the caller turns into a note on the run, never into lost trajectories.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from rollout.errors import RolloutError

# A filter sees one group; one that needs longer is stuck.
FILTER_SECONDS = 30.0
# Longest reason that is counted under its own name.
MAX_REASON_CHARS = 64


class FilterError(RolloutError):
    """The user's filter failed."""

    category = "filter"


class FilterFunction:
    """A function `module:name` that takes a group's rows (an Arrow table of the record)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._function: Callable[[pa.Table], Any] | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="filter")
        # One group at a time: the time that others take must not count.
        self._turn = asyncio.Lock()

    async def judge(self, rows: pa.Table) -> str | None:
        """The reason to drop the group; None: keep it. Raises FilterError."""
        loop = asyncio.get_running_loop()
        try:
            async with self._turn, asyncio.timeout(FILTER_SECONDS):
                verdict = await loop.run_in_executor(self._threads, self._call, rows)
        except TimeoutError:
            # The thread cannot be stopped; the next group gets another.
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="filter")
            raise FilterError(f"{self._path} took longer than {FILTER_SECONDS:g} s") from None
        except FilterError:
            raise
        except Exception as failure:
            raise FilterError(f"{self._path} raised {type(failure).__name__}: {failure}") from failure
        if verdict is True or verdict is False:
            return None if verdict else "filter"
        if isinstance(verdict, str) and verdict:
            return verdict[:MAX_REASON_CHARS]
        raise FilterError(f"{self._path} returned {verdict!r}; return True to keep a group, else False or a reason")

    def _call(self, rows: pa.Table) -> Any:
        if self._function is None:
            self._function = load_function(self._path)
        return self._function(rows)


def load_function(path: str) -> Callable[[pa.Table], Any]:
    """The function behind `module:name`. Raises FilterError that says what is missing."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name or "filter", None)
    except Exception as failure:
        raise FilterError(f"cannot import {module_name!r} for {path!r}: {failure}") from failure
    if not callable(function):
        raise FilterError(f"{path!r} is not a function; write module:function")
    return function
