"""How failures are named and bounded in a trajectory's `error` column."""

from __future__ import annotations

import inspect

import pytest

from rollout import errors
from rollout.errors import MAX_ERROR_CHARS, EngineDied, EngineError, RolloutError, ToolError, describe

CLASSES = [
    value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.RolloutError)
]

# Dashboards and trainers group by these names, so they may grow but not change.
CATEGORIES = {
    "RolloutError": "internal",
    "ConfigError": "config",
    "TaskFileError": "tasks",
    "LedgerError": "ledger",
    "PrefixError": "prefix",
    "RecordError": "record",
    "RenderError": "render",
    "ToolError": "tool",
    "EnvironmentError_": "environment",
    "EngineError": "engine",
    "EngineRefused": "engine_refused",
    "EngineTimeout": "engine_timeout",
    "EngineDied": "engine_died",
    "SessionTimeout": "session_timeout",
    "WorkerDied": "worker_died",
}


def test_the_categories_are_stable_and_different():
    found = {kind.__name__: kind.category for kind in CLASSES}
    assert {name: found.get(name) for name in CATEGORIES} == CATEGORIES
    assert len(set(found.values())) == len(found)


def test_only_dead_infrastructure_is_worth_another_attempt():
    assert {kind.__name__ for kind in CLASSES if kind.retryable} == {"EngineDied", "WorkerDied", "RemoteDied"}


def test_engine_errors_are_caught_as_one():
    assert {kind.__name__ for kind in CLASSES if issubclass(kind, EngineError)} == {
        "EngineError",
        "EngineRefused",
        "EngineTimeout",
        "EngineDied",
    }


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ToolError("no such file"), "tool: no such file"),
        (EngineDied("replica a"), "engine_died: replica a"),
        (RolloutError("what"), "internal: what"),
        (KeyError("x"), "internal: KeyError: 'x'"),
        (ValueError(), "internal: ValueError: "),
    ],
)
def test_describe(error: Exception, text: str):
    assert describe(error) == text


@pytest.mark.parametrize("extra", [0, 1, 100_000])
def test_a_description_is_bounded(extra: int):
    fits = MAX_ERROR_CHARS - len("tool: ")
    text = describe(ToolError("x" * (fits + extra)))
    assert len(text) == MAX_ERROR_CHARS
    assert text.endswith("…") == (extra > 0)
    assert text.startswith("tool: xxx")
