"""Environments: finding them by import path, and which tools they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout.environment import Environment, Episode, Turn, load_environment
from rollout.errors import EnvironmentError_
from rollout.tasks import Task
from rollout.tool_calls import ToolCall, ToolCallRecord, ToolSet
from rollout.tools import tool

SOURCE = """
from rollout.environment import Environment

class Plain(Environment):
    pass

class Taking(Environment):
    def __init__(self, level, name="x"):
        self.level, self.name = level, name

def make(level=1):
    return Taking(level)

def wrong():
    return 5

number = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.fixture
def playground(module: Any) -> str:
    return module("playground_for_tests", SOURCE)


def test_a_class_makes_a_fresh_environment_for_every_attempt(playground: str):
    make = load_environment(f"{playground}:Plain")
    first, second = make(), make()
    assert type(first).__name__ == "Plain" and isinstance(first, Environment)
    assert first is not second


def test_arguments_reach_the_class_or_function(playground: str):
    made = load_environment(f"{playground}:Taking", {"level": 3, "name": "y"})()
    assert (made.level, made.name) == (3, "y")  # type: ignore[attr-defined]
    assert load_environment(f"{playground}:make", {"level": 4})().level == 4  # type: ignore[attr-defined]
    assert load_environment(f"{playground}:make")().level == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["", "x", "x:", ":X", "some.module"])
def test_what_is_no_import_path(path: str):
    with pytest.raises(EnvironmentError_, match="is not an import path; write module:Class or module:function"):
        load_environment(path)


def test_what_is_missing_is_named(playground: str):
    with pytest.raises(EnvironmentError_, match=r"cannot import 'no_such_module_here' .* listed under `pythonpath`"):
        load_environment("no_such_module_here:X")
    with pytest.raises(EnvironmentError_, match="module 'playground_for_tests' has no 'Nothing'"):
        load_environment(f"{playground}:Nothing")
    with pytest.raises(EnvironmentError_, match="is a int, not a class or function"):
        load_environment(f"{playground}:number")


@pytest.mark.parametrize(
    ("name", "arguments"), [("Taking", {}), ("Taking", {"level": 1, "colour": 2}), ("Plain", {"level": 1})]
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_made(
    playground: str, name: str, arguments: dict[str, Any]
):
    with pytest.raises(EnvironmentError_, match=f":{name}' does not take these arguments"):
        load_environment(f"{playground}:{name}", arguments)


def test_a_function_that_makes_something_else(playground: str):
    make = load_environment(f"{playground}:wrong")
    with pytest.raises(EnvironmentError_, match="returned int, not an Environment"):
        make()


def test_an_import_that_fails_inside_the_module_is_named(module: Any):
    module("half_installed_env", "import package_that_is_not_there")
    with pytest.raises(EnvironmentError_, match=r"cannot import 'half_installed_env' .*package_that_is_not_there"):
        load_environment("half_installed_env:X")


@pytest.mark.parametrize("source", ["def broken(:", "1 / 0", "open('/no/such/file')", "raise SystemExit(1)"])
def test_a_module_that_fails_while_it_is_imported_is_named(module: Any, source: str):
    module("failing_env", source)
    with pytest.raises(EnvironmentError_, match="failing_env"):
        load_environment("failing_env:X")


@pytest.mark.parametrize("path", [".relative:X", "builtins:type"])
def test_odd_import_paths_are_refused_like_others(path: str):
    with pytest.raises(EnvironmentError_):
        load_environment(path)


@tool
def shout(text: str) -> str:
    """Shout it."""
    return text.upper()


class Base(Environment):
    """Holds a tool and a decorated method."""

    tools = (shout,)

    def __init__(self) -> None:
        self.seen: list[str] = []

    @tool
    def note(self, text: str) -> str:
        """Note it."""
        self.seen.append(text)
        return "noted"


class Derived(Base):
    """Adds one."""

    @tool
    def add_more(self) -> str:
        """Add."""
        return "more"


def test_tools_are_the_listed_ones_and_the_decorated_methods():
    assert [item.name for item in Environment().all_tools()] == []
    assert [item.name for item in Base().all_tools()] == ["shout", "note"]
    assert [item.name for item in Derived().all_tools()] == ["shout", "add_more", "note"]


async def test_a_method_runs_on_its_own_environment():
    first, second = Base(), Base()
    tools = ToolSet(first.all_tools())
    result = await tools.call(ToolCall("1", "note", {"text": "x"}), timeout=5, max_output_chars=100)
    assert (result.content, first.seen, second.seen) == ("noted", ["x"], [])


def test_the_defaults_do_and_score_nothing():
    environment = Environment()
    task = Task(task_id="a", messages=[{"role": "user", "content": "x"}])
    episode = Episode(task, [], [], "stop")
    assert environment.reply(episode) is None
    assert environment.turn_reward(Turn(0, "", None), episode) is None
    assert environment.reward(episode) is None
    assert (environment.system_prompt, environment.limits, environment.mcp_servers) == (None, None, ())


def test_an_episode_knows_its_answer_and_its_calls():
    task = Task(task_id="a", messages=[{"role": "user", "content": "x"}])
    calls = [ToolCallRecord(name, True, 0.1) for name in "abc"]
    turns = [Turn(0, "first", None, calls[:2]), Turn(1, "second", "thought", calls[2:]), Turn(2, "last", None)]
    episode = Episode(task, [], turns, None)
    assert episode.answer == "last"
    assert [call.name for call in episode.tool_calls] == ["a", "b", "c"]
    assert Episode(task, [], [], "error").answer == ""
