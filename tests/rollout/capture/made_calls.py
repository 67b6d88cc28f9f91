"""Calls for tests, made without an engine."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

from rollout.capture.calls import CapturedCall
from rollout.engine import VersionSpan

_numbers = itertools.count()


def made(
    prompt: list[int],
    sampled: list[int],
    *times: float,
    logprobs: list[float] | None = None,
    version: int = 3,
    **fields: Any,
) -> CapturedCall:
    """A call; `times` are its start and its end. Without them each call begins after all that were made before."""
    number = next(_numbers)
    started, finished = times or (float(number), number + 0.5)
    fields = {"call_id": f"call-{number}", "finish_reason": "stop", "api": "chat"} | fields
    return CapturedCall(
        prompt_ids=array("i", prompt),
        token_ids=array("i", sampled),
        logprobs=array("f", [-0.5] * len(sampled) if logprobs is None else logprobs),
        versions=[VersionSpan(version, 0, len(sampled))],
        started=started,
        finished=finished,
        **fields,
    )
