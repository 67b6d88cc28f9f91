"""What a captured call must hold to be one."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import pytest

from rollout.capture.calls import CapturedCall
from rollout.engine import VersionSpan
from rollout.errors import LedgerError
from tests.rollout.capture.made_calls import made


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "call_id": "c",
        "prompt_ids": array("i", [1, 2]),
        "token_ids": array("i", [3, 4]),
        "logprobs": array("f", [-0.5, -0.25]),
        "versions": [VersionSpan(0, 0, 2)],
        "finish_reason": "stop",
        "started": 1.0,
        "finished": 2.0,
        "api": "chat",
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"call_id": ""}, "needs a call_id"),
        ({"prompt_ids": array("i")}, "'c': a segment needs a prompt of at least one token"),
        ({"prompt_ids": [1, 2]}, r"prompt_ids is list; give array\('i'\)"),
        ({"token_ids": array("q", [3, 4])}, r"token_ids is array\('q'\); give array\('i'\)"),
        ({"logprobs": array("d", [-0.5, -0.25])}, r"logprobs is array\('d'\); give array\('f'\)"),
        ({"logprobs": array("f", [-0.5])}, "2 sampled tokens came with 1 log-probabilities"),
        ({"logprobs": array("f", [-0.5, float("nan")])}, "nan is not a log-probability"),
        ({"versions": [VersionSpan(0, 0, 1)]}, "2 sampled tokens came with versions for 1"),
        ({"versions": [VersionSpan(-1, 0, 2)]}, "cannot carry version -1"),
        ({"finish_reason": "tool_calls"}, "finish_reason is 'tool_calls'; use one of stop, length, abort"),
        ({"finished": 0.5}, "cannot have started at 1.0 and finished at 0.5"),
        ({"started": float("nan")}, "cannot have started at nan"),
        ({"finished": float("inf")}, "finished at inf"),
        ({"messages": ["hello"]}, "messages must be a list of objects"),
    ],
)
def test_a_call_that_does_not_fit_together_is_not_made(changes: dict[str, Any], message: str):
    with pytest.raises(LedgerError, match=message):
        CapturedCall(**fields(**changes))


def test_a_call_that_was_cut_off_is_kept_with_what_was_sampled():
    call = made([1, 2], [3], finish_reason="abort")
    assert call.cut and call.token_ids.tolist() == [3]
    nothing = made([1, 2], [], finish_reason="abort")
    assert nothing.cut and nothing.num_tokens == 2
    assert not made([1], [2], finish_reason="length").cut


def test_roles_outlive_the_messages_that_they_were_taken_from():
    messages = [{"role": "user", "content": "hi"}, {"type": "reasoning"}]
    call = made([1], [2], messages=messages, answer={"role": "assistant", "content": "yo"})
    bare = call.without_messages()
    assert bare.roles == ("user", "unknown")
    assert (bare.messages, bare.answer) == (None, None)
    assert call.messages == messages, "the call itself is untouched"


def test_calls_cross_processes():
    call = made([1, 2], [3, 4], messages=[{"role": "user", "content": "hi"}])
    assert pickle.loads(pickle.dumps(call)) == call
