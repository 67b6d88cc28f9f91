"""`rollout eval` where nothing needs to be started: what it hands on, prints and ends with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import cli
from rollout.trajectory import Trajectory
from tests.cluster.test_cli import Run, rollout, state_directory  # noqa: F401
from tests.cluster.test_evaluate import attempt, task, write


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the rollouts: writes `trajectories` and notes how it was called."""
    fake = SimpleNamespace(trajectories=[], interrupted=False, called=None)

    def roll_out(path: Path, overrides: Any, tasks: Any, directory: Path, n: int, overwrite: bool) -> Any:
        fake.called = ([each.task_id for each in tasks], overrides, n, overwrite)
        write(directory, fake.trajectories)
        return SimpleNamespace(interrupted=fake.interrupted, summary=lambda: {"trajectories": len(fake.trajectories)})

    monkeypatch.setattr(cli, "_roll_out", roll_out)
    return fake


@pytest.fixture
def arguments(tmp_path: Path) -> list[Any]:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(task(name, tag=name).model_dump_json() + "\n" for name in "abc"))
    return ["eval", "config.yaml", "--tasks", tasks, "--out", tmp_path / "out"]


def played(*rewards: float | None) -> list[Trajectory]:
    return [attempt(name, i, reward, metadata={"tag": name}) for name in "ab" for i, reward in enumerate(rewards)]


def test_the_scores_are_printed(rollout: Run, job: SimpleNamespace, arguments: list[Any]):  # noqa: F811
    job.trajectories = played(1.0, 0.0)
    more = ["--n", 2, "--limit", 2, "--overwrite", "--set", "sampling.temperature=0.5"]
    code, told, _ = rollout(*arguments, *more)
    assert (code, job.called) == (0, (["a", "b"], ["sampling.temperature=0.5"], 2, True))
    assert "pass@2" in told and "0.500" in told and "warning" not in told


def test_json_is_one_document(rollout: Run, job: SimpleNamespace, arguments: list[Any]):  # noqa: F811
    job.trajectories = played(0.9, 0.0)
    code, told, _ = rollout(*arguments, "--n", 2, "--k", 2, "--k", 1, "--pass-threshold", 0.9, "--json")
    found = json.loads(told)
    assert (code, found["job"], found["evaluation"]["ks"]) == (0, {"trajectories": 4}, [1, 2])
    assert found["evaluation"]["overall"]["pass_at"]["2"]["value"] == 1.0
    assert found["evaluation"]["warnings"] == ["1 of 3 tasks have no trajectory and are in no figure: c"]


def test_a_k_beyond_n_is_refused_before_anything_starts(rollout: Run, job: SimpleNamespace, arguments: list[Any]):  # noqa: F811
    code, _, complaint = rollout(*arguments, "--n", 4, "--k", 8)
    assert (code, job.called) == (1, None) and "k = 8 is outside 1 … 4" in complaint


def test_an_interrupted_evaluation_shows_what_it_has_and_ends_with_130(
    rollout: Run,  # noqa: F811
    job: SimpleNamespace,
    arguments: list[Any],
):
    job.trajectories, job.interrupted = played(1.0), True
    code, told, _ = rollout(*arguments, "--n", 2)
    assert code == 130 and "1.000" in told and "warning" in told


def test_where_nothing_is_scored_the_exit_code_is_1(rollout: Run, job: SimpleNamespace, arguments: list[Any]):  # noqa: F811
    job.trajectories = played(None)
    code, told, complaint = rollout(*arguments, "--n", 1)
    assert code == 1 and "no trajectory was scored" in told and "nothing could be scored" in complaint
