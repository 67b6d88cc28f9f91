"""Task files: read whole, and a bad line named with its number."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout import tasks as tasks_module
from rollout.errors import TaskFileError
from rollout.tasks import Task, parse_task, read_tasks

USER = {"role": "user", "content": "Hello"}


def line(**fields: Any) -> str:
    return json.dumps({"task_id": "a", "messages": [USER]} | fields)


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(lines))
    return path


def refused(text: str | bytes) -> str:
    with pytest.raises(TaskFileError) as caught:
        parse_task(text)
    return str(caught.value)


def test_a_file_is_read_in_order_and_blank_lines_are_skipped(tmp_path: Path):
    path = write(tmp_path, line(task_id="a"), "", "   ", line(task_id="b", data={"x": 1}, metadata={"y": 2}), "")
    first, second = read_tasks(path)
    assert first == Task(task_id="a", messages=[USER])
    assert (first.data, first.metadata, first.environment) == ({}, {}, None)
    assert (second.task_id, second.data, second.metadata) == ("b", {"x": 1}, {"y": 2})
    assert [task.task_id for task in read_tasks(str(path))] == ["a", "b"]


def test_bad_lines_are_named_with_number_and_field(tmp_path: Path):
    path = write(tmp_path, line(), "{", line(task_id="b", message=[]), "[1]")
    with pytest.raises(TaskFileError) as caught:
        read_tasks(path)
    second, third, fourth = str(caught.value).splitlines()
    assert second.startswith(f"{path}:2: not JSON: ")
    assert third == f"{path}:3: message: unknown field; a task has task_id, messages, data, metadata, environment"
    assert fourth == f"{path}:4: a task is a JSON object, not list"


def test_of_many_bad_lines_five_are_named_and_the_rest_counted(tmp_path: Path):
    path = write(tmp_path, *["x"] * 12)
    with pytest.raises(TaskFileError) as caught:
        read_tasks(path)
    lines = str(caught.value).splitlines()
    assert [text.split(": ")[0] for text in lines[:5]] == [f"{path}:{number}" for number in range(1, 6)]
    assert lines[5:] == ["... and 7 more"]


def test_exactly_five_bad_lines_leave_nothing_to_count(tmp_path: Path):
    with pytest.raises(TaskFileError) as caught:
        read_tasks(write(tmp_path, *["x"] * 5))
    assert len(str(caught.value).splitlines()) == 5


def test_a_task_id_that_comes_twice_names_both_lines(tmp_path: Path):
    path = write(tmp_path, line(task_id="a"), line(task_id="b"), line(task_id="a"), line(task_id="a"))
    with pytest.raises(TaskFileError) as caught:
        read_tasks(path)
    assert str(caught.value).splitlines() == [
        f"{path}:3: task_id 'a' is already on line 1",
        f"{path}:4: task_id 'a' is already on line 1",
    ]


def test_files_without_tasks(tmp_path: Path):
    with pytest.raises(TaskFileError, match="has no tasks; write one JSON object a line"):
        read_tasks(write(tmp_path, "", "  "))
    with pytest.raises(TaskFileError, match="cannot be read: No such file or directory"):
        read_tasks(tmp_path / "missing.jsonl")
    with pytest.raises(TaskFileError, match="cannot be read: Is a directory"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"task_id": ""}, "task_id: String should have at least 1 character"),
        ({"task_id": "x" * 257}, "task_id: String should have at most 256 characters"),
        ({"task_id": 3}, "task_id: Input should be a valid string"),
        ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
        ({"messages": ["hi"]}, "messages.0: Input should be a valid dictionary"),
        (
            {"messages": [USER, {"role": "robot", "content": "x"}]},
            "messages: messages.1.role is 'robot'; use one of assistant, developer, system, tool, user",
        ),
        ({"messages": [{"role": "user"}]}, "messages: messages.0.content must be text or a list of parts"),
        ({"messages": [{"role": "user", "content": None}]}, "messages: messages.0.content must be text or a list"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages: messages.0.content must be text or a list"),
        ({"data": []}, "data: Input should be a valid dictionary"),
        ({"environment": 1}, "environment: Input should be a valid string"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], problem: str):
    assert refused(line(**fields)).startswith(problem)


def test_several_problems_of_a_line_are_told_at_once():
    text = refused(line(task_id="", data=1))
    assert "task_id: " in text and "; data: " in text


def test_missing_fields_are_named():
    assert refused("{}") == "task_id: Field required; messages: Field required"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "developer", "content": ""},
        {"role": "system", "content": "x"},
    ],
)
def test_messages_of_all_roles_pass_unchanged(message: dict[str, Any]):
    assert parse_task(line(messages=[message])).messages == [message]


def test_lines_that_are_too_long_or_too_deep(monkeypatch: pytest.MonkeyPatch):
    assert refused(b"[" * 100_000).startswith("not JSON: ")
    monkeypatch.setattr(tasks_module, "MAX_LINE_BYTES", 10)
    assert refused("x" * 11) == "the line has 11 bytes, more than 10"
    assert refused("x" * 10).startswith("not JSON: ")


def test_bytes_that_are_no_text_are_a_bad_line_like_any_other(tmp_path: Path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(line().encode() + b"\n\xff\xfe\xfa\n")
    with pytest.raises(TaskFileError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}:2: not JSON: ")


def test_a_byte_order_mark_is_no_problem():
    assert parse_task(b"\xef\xbb\xbf" + line().encode()).task_id == "a"


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_no_line_raises_anything_else(text: str | bytes):
    with contextlib.suppress(TaskFileError):
        parse_task(text)


def test_a_task_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        Task(task_id="a", messages=[USER]).task_id = "b"
