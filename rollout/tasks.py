"""Tasks: what the trainer wants done, one JSON object a line.

A task file is read whole before anything runs, and a bad line is named with its number, so that nothing is
ever half-run because of line 40,000.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rollout.errors import TaskFileError

# A line longer than this is refused before it is parsed.
MAX_LINE_BYTES = 16 * 1024 * 1024
# Bad lines named in one error; the rest are counted.
MAX_REPORTED = 5
# Characters of a wrong value that a message repeats.
MAX_SHOWN = 100

Message = dict[str, Any]
"""A chat message in OpenAI's form: role, content, and where they apply tool_calls, tool_call_id, name."""

_ROLES = {"system", "developer", "user", "assistant", "tool"}


class Task(BaseModel):
    """One task. Unknown fields are refused: a misspelt `messages` would otherwise be an empty prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task_id: str = Field(min_length=1, max_length=256)
    """Unique within a run."""
    messages: list[Message] = Field(min_length=1)
    """The opening of the conversation, after the environment's system prompt."""
    data: dict[str, Any] = Field(default_factory=dict)
    """What the environment needs to score (answers, tests); the model never sees it."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Carried into the record unread."""
    environment: str | None = None
    """Import path of an environment for this task alone; None: the run's."""

    @field_validator("messages")
    @classmethod
    def _well_formed(cls, messages: list[Message]) -> list[Message]:
        for index, message in enumerate(messages):
            role = message.get("role")
            if not isinstance(role, str) or role not in _ROLES:
                shown = repr(role)[:MAX_SHOWN]
                raise ValueError(f"messages.{index}.role is {shown}; use one of {', '.join(sorted(_ROLES))}")
            content = message.get("content")
            if not (isinstance(content, str | list) or (content is None and role == "assistant")):
                raise ValueError(f"messages.{index}.content must be text or a list of parts")
        return messages


def read_tasks(path: Path | str) -> list[Task]:
    """All tasks of a JSONL file; blank lines are skipped.

    Raises TaskFileError, which names up to MAX_REPORTED bad lines with number, field and problem, for a file
    that is missing, empty, not JSON, invalid, or that has a task_id twice.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _collect(path, file)
    except OSError as error:
        raise TaskFileError(f"{path}: cannot be read: {error.strerror or error}") from None


def _collect(path: Path, lines: Iterable[bytes]) -> list[Task]:
    tasks: list[Task] = []
    problems: list[str] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            task = parse_task(line)
        except TaskFileError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if task.task_id in first_seen:
            problems.append(
                f"{path}:{number}: task_id {task.task_id!r} is already on line {first_seen[task.task_id]}"
            )
        first_seen.setdefault(task.task_id, number)
        tasks.append(task)
    if problems:
        more = f"\n... and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
        raise TaskFileError("\n".join(problems[:MAX_REPORTED]) + more)
    if not tasks:
        raise TaskFileError(f"{path}: has no tasks; write one JSON object a line")
    return tasks


def parse_task(line: bytes | str) -> Task:
    """One task from one line of JSON. Raises TaskFileError with the field and the problem."""
    if len(line) > MAX_LINE_BYTES:
        raise TaskFileError(f"the line has {len(line)} bytes, more than {MAX_LINE_BYTES}")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskFileError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TaskFileError(f"a task is a JSON object, not {type(value).__name__}")
    try:
        return Task.model_validate(value)
    except ValidationError as error:
        raise TaskFileError("; ".join(_explain(error, value))) from None


def _explain(error: ValidationError, value: dict[str, Any]) -> Iterator[str]:
    for issue in error.errors(include_url=False):
        field = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            yield f"{field}: unknown field; a task has {', '.join(Task.model_fields)}"
        else:
            yield f"{field}: {issue['msg'].removeprefix('Value error, ')}"
