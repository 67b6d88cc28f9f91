"""What `rollout eval` does around its rollouts: refuse early, score, keep the scores, show them.

Invariant: whatever in task file, k or threshold would spoil the scores is refused before a cluster starts; the
scores are written beside the trajectories that they are of, and never stay beside others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollout.errors import RolloutError, TaskFileError
from rollout.evaluation import (
    CONFIDENCE,
    Estimate,
    Evaluation,
    Line,
    check_ks,
    check_threshold,
    evaluate,
    metadata_tags,
)
from rollout.tasks import Task, read_tasks
from rollout.trajectory_file import read_trajectories

FILE_NAME = "evaluation.json"
# Tasks without a trajectory that a warning names; the rest are counted.
MAX_NAMED = 3
# So many figures of pass@k stand side by side in 80 characters; more go on below.
PASSES_ABREAST = 5


def prepare(
    tasks_file: Path, *, n: int, ks: Sequence[int] | None, pass_threshold: float, limit: int | None = None
) -> list[Task]:
    """The tasks of a file, after everything that scoring will need was checked.

    Raises TaskFileError for a bad file or tags that cannot be read, RolloutError for a bad k or threshold.
    """
    check_threshold(pass_threshold)
    if ks:
        check_ks(ks, n)
    tasks = read_tasks(tasks_file)[:limit]
    for task in tasks:
        try:
            metadata_tags(task.metadata)
        except ValueError as error:
            raise TaskFileError(f"{tasks_file}: task {task.task_id!r}: {error}") from None
    return tasks


def forget_scores(directory: Path) -> None:
    """Remove the scores of trajectories that are about to be replaced."""
    (directory / FILE_NAME).unlink(missing_ok=True)


def evaluate_directory(
    directory: Path, tasks: Sequence[Task], *, n: int, ks: Sequence[int] | None = None, pass_threshold: float = 1.0
) -> Evaluation:
    """Score the trajectories of a directory and write FILE_NAME into it.

    `tasks` are those that were asked for: one without any trajectory is named in the warnings. Raises RecordError
    where there are no readable trajectories, RolloutError where the scores cannot be written.
    """
    table, _ = read_trajectories(directory)
    evaluation = evaluate(table, ks=ks or None, pass_threshold=pass_threshold, n=n)
    present = set(table["task_id"].unique().to_pylist())
    absent = [task.task_id for task in tasks if task.task_id not in present]
    if absent:
        named = ", ".join(absent[:MAX_NAMED]) + (", …" if len(absent) > MAX_NAMED else "")
        warning = f"{len(absent)} of {len(tasks)} tasks have no trajectory and are in no figure: {named}"
        evaluation = replace(evaluation, warnings=(warning, *evaluation.warnings))
    path = directory / FILE_NAME
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(evaluation.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RolloutError(f"{path}: the scores cannot be written: {error.strerror or error}") from None
    return evaluation


def evaluation_view(evaluation: Evaluation) -> RenderableType:
    """Scores, how the attempts went, and every warning."""
    lines = [evaluation.overall, *evaluation.tags]
    parts: list[RenderableType] = [_scores(evaluation, lines), Text()]
    for start in range(PASSES_ABREAST, len(evaluation.ks), PASSES_ABREAST):
        parts += [_passes(evaluation.ks[start : start + PASSES_ABREAST], lines), Text()]
    parts.append(_attempts(lines))
    parts += [Text(f"warning: {warning}", style="bold yellow") for warning in evaluation.warnings]
    return Group(*parts)


def _scores(evaluation: Evaluation, lines: Sequence[Line]) -> Table:
    title = f"scores, n = {evaluation.n}, passed from reward {evaluation.pass_threshold:g}"
    ks = evaluation.ks[:PASSES_ABREAST]
    view = _table(title, ["tasks", f"mean reward ({CONFIDENCE:.0%})", *(f"pass@{k}" for k in ks)])
    for line in lines:
        view.add_row(_name(line), str(line.tasks), _with_interval(line.reward), *(_pass(line, k) for k in ks))
    return view


def _passes(ks: Sequence[int], lines: Sequence[Line]) -> Table:
    view = _table(None, [f"pass@{k}" for k in ks])
    for line in lines:
        view.add_row(_name(line), *(_pass(line, k) for k in ks))
    return view


def _pass(line: Line, k: int) -> str:
    found = line.pass_at[k]
    # A star: it is over some of the line's tasks; the warnings say why.
    return _value(found) + ("*" if found is not None and found.tasks < line.tasks else "")


def _attempts(lines: Sequence[Line]) -> Table:
    view = _table("attempts", ["trajectories", "unscored", "truncated", "turns", "tokens"])
    view.add_column("ended by", overflow="fold", min_width=12)
    for line in lines:
        view.add_row(
            _name(line),
            str(line.trajectories),
            Text(str(line.num_unscored), style="bold red" if line.num_unscored else ""),
            "–" if line.truncated_share is None else f"{line.truncated_share:.1%}",
            "–" if line.mean_turns is None else f"{line.mean_turns:.1f}",
            "–" if line.mean_response_tokens is None else f"{line.mean_response_tokens:.0f}",
            ", ".join(f"{name} {number}" for name, number in line.stop_reasons.items()),
        )
    return view


def _table(title: str | None, names: Sequence[str]) -> Table:
    view = Table(title=title, box=None, header_style="dim", title_justify="left", title_style="bold", padding=(0, 1))
    view.add_column("", overflow="fold")
    for name in names:
        # Half a figure is a wrong figure: on a narrow terminal tags, intervals and endings fold, not these.
        view.add_column(name, justify="right", no_wrap=not name.startswith("mean"), min_width=7, overflow="fold")
    return view


def _name(line: Line) -> Text:
    # As Text: a tag may hold brackets, which are no markup.
    return Text("all", style="bold") if line.tag is None else Text(line.tag)


def _value(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f}"


def _with_interval(estimate: Estimate | None) -> Text:
    if estimate is None or estimate.low is None or estimate.high is None:
        return Text(_value(estimate))
    return Text(f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
