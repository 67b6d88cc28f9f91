"""What surrounds an evaluation: what is refused before anything starts, the scores on disk, and the table."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.evaluate import FILE_NAME, evaluate_directory, evaluation_view, forget_scores, prepare
from rollout.errors import RecordError, RolloutError, TaskFileError
from rollout.evaluation import evaluate
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.tasks import Task
from rollout.trajectory import SessionKey, Trajectory
from rollout.trajectory_file import TrajectoryWriter


def attempt(task: str, index: int, reward: float | None, **fields: Any) -> Trajectory:
    played = Segment(
        prompt_ids=array("i", [1]),
        response_ids=array("i", [2, 3, 4]),
        response_mask=array("b", [1, 1, 1]),
        logprobs=array("f", [-1, -1, -1]),
        policy_versions=array("i", [0, 0, 0]),
        turns=[TurnSpan("assistant", 0, 3, 0.1)],
    )
    fields = {"segments": [played], "stop_reason": "stop", "messages": [], "reward": reward} | fields
    return Trajectory(SessionKey("run", task, f"run/{task}", index), **fields)


def task(task_id: str, **metadata: Any) -> Task:
    return Task(task_id=task_id, messages=[{"role": "user", "content": "x"}], metadata=metadata)


MIXED = [
    attempt("a", 0, 1.0, metadata={"tag": "[odd]"}),
    attempt("a", 1, 0.0, metadata={"tag": "[odd]"}, stop_reason="max_turns"),
    attempt("b", 0, 1.0),
    attempt("b", 1, None, stop_reason="error", error="engine_died: gone", segments=[]),
]


def write(directory: Path, trajectories: list[Trajectory]) -> Path:
    with TrajectoryWriter(directory, overwrite=True) as writer:
        writer.write(to_table(trajectories))
    return directory


def lines(item: Any, width: int = 160) -> list[str]:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(item)
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(task(name, tags=["math"]).model_dump_json() + "\n" for name in "abc"))
    return path


# Before anything starts


def test_the_tasks_of_a_file_are_ready_to_run(tasks_file: Path):
    ready = prepare(tasks_file, n=4, ks=[1, 4], pass_threshold=1.0)
    assert [each.task_id for each in ready] == ["a", "b", "c"]
    assert len(prepare(tasks_file, n=4, ks=None, pass_threshold=0.5, limit=2)) == 2


def test_what_could_not_be_scored_is_refused_before_it_runs(tasks_file: Path):
    with pytest.raises(RolloutError, match=r"k = 8 is outside 1 … 4.*raise --n"):
        prepare(tasks_file, n=4, ks=[1, 8], pass_threshold=1.0)
    with pytest.raises(RolloutError, match="pass threshold is nan"):
        prepare(tasks_file, n=4, ks=None, pass_threshold=float("nan"))
    tasks_file.write_text(task("a", tags="math").model_dump_json())
    with pytest.raises(TaskFileError, match=r"tasks.jsonl: task 'a': metadata.tags must be a list of texts"):
        prepare(tasks_file, n=4, ks=None, pass_threshold=1.0)


def test_tags_of_tasks_beyond_the_limit_are_not_looked_at(tasks_file: Path):
    tasks_file.write_text(task("a").model_dump_json() + "\n" + task("b", tags=3).model_dump_json())
    assert len(prepare(tasks_file, n=1, ks=None, pass_threshold=1.0, limit=1)) == 1


# Scores of a directory


def test_the_scores_are_returned_and_written_beside_the_trajectories(tmp_path: Path):
    directory = write(tmp_path / "out", MIXED)
    found = evaluate_directory(directory, [task("a"), task("b")], n=2, ks=[1])
    assert found.overall.scored == 3 and found.ks == (1,)
    assert json.loads((directory / FILE_NAME).read_text()) == found.to_json()
    assert sorted(path.name for path in directory.iterdir()) == [FILE_NAME, "trajectories.parquet"]


def test_no_ks_means_the_powers_of_two(tmp_path: Path):
    directory = write(tmp_path / "out", MIXED)
    assert evaluate_directory(directory, [], n=2, ks=[]).ks == (1, 2)


def test_tasks_that_left_nothing_are_named_first(tmp_path: Path):
    directory = write(tmp_path / "out", MIXED)
    found = evaluate_directory(directory, [task(name) for name in "abcdefg"], n=2)
    assert found.warnings[0] == "5 of 7 tasks have no trajectory and are in no figure: c, d, e, …"
    assert json.loads((directory / FILE_NAME).read_text())["warnings"] == list(found.warnings)


def test_a_run_that_was_interrupted_early_is_scored_as_far_as_it_came(tmp_path: Path):
    directory = write(tmp_path / "out", [attempt("a", 0, 1.0)])
    found = evaluate_directory(directory, [task("a")], n=8, ks=[8])
    assert found.overall.pass_at == {8: None} and found.overall.reward is not None
    assert found.warnings[0] == "1 of 1 tasks have fewer than 8 trajectories"


def test_a_directory_without_trajectories_is_an_error(tmp_path: Path):
    with pytest.raises(RecordError, match=r"holds no trajectories\.parquet"):
        evaluate_directory(tmp_path, [], n=1)
    assert not (tmp_path / FILE_NAME).exists()


def test_scores_that_cannot_be_written_are_an_error(tmp_path: Path):
    directory = write(tmp_path / "out", MIXED)
    (directory / FILE_NAME).mkdir()
    with pytest.raises(RolloutError, match=r"evaluation.json: the scores cannot be written"):
        evaluate_directory(directory, [], n=2)


def test_scores_of_replaced_trajectories_are_forgotten(tmp_path: Path):
    forget_scores(tmp_path / "never there")
    (tmp_path / FILE_NAME).write_text("{}")
    forget_scores(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()


# The table


def test_the_table_shows_scores_endings_and_warnings():
    assert lines(evaluation_view(evaluate(to_table(MIXED)))) == [
        "scores, n = 2, passed from reward 1",
        "tasks mean reward (95%) pass@1 pass@2",
        "all 2 0.750 [0.500, 1.000] 0.750 1.000*",
        "[odd] 1 0.500 0.500 1.000",
        "attempts",
        "trajectories unscored truncated turns tokens ended by",
        "all 4 1 33.3% 1.0 3 stop 2, max_turns 1, error 1",
        "[odd] 2 0 50.0% 1.0 3 stop 1, max_turns 1",
        "warning: 1 of 4 trajectories are not scored and in no score (ended by: 1 error; errors: 1 engine_died)",
        "warning: pass@2 is over 1 of 2 tasks: the others have fewer than 2 scored attempts",
    ]


def test_what_is_not_known_is_a_dash_and_no_zero():
    found = evaluate(to_table([attempt("a", 0, None, stop_reason="error", error="engine: no", segments=[])]))
    shown = lines(evaluation_view(found))
    assert "all 1 – –" in shown
    assert "all 1 1 – – – error 1" in shown
    assert shown[-1] == "warning: no trajectory was scored, so there are no scores"


def test_an_empty_table_can_be_shown():
    shown = lines(evaluation_view(evaluate(to_table([]))))
    assert "all 0 –" in shown and shown[-1] == "warning: there are no trajectories"


def test_no_figure_is_cut_on_a_narrow_terminal():
    many = [attempt("a long name of a task", i, float(i % 2), metadata={"tag": "long " * 9}) for i in range(64)]
    shown = " ".join(lines(evaluation_view(evaluate(to_table(many))), width=80))
    assert shown.count("0.500") >= 3 and "pass@64" in shown and "…" not in shown
