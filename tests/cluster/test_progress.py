"""What a person sees while a job runs, where the output is no terminal, and the table at its end."""

from __future__ import annotations

import io
from array import array
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.messages import WorkerStats
from cluster import progress as progress_module
from cluster.job import JobResult
from cluster.progress import closing_table, job_progress, steps
from rollout.api import RunInfo
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.trajectory import SessionKey, Timing, Trajectory


def plain() -> Console:
    return Console(file=io.StringIO(), width=160, force_terminal=False, color_system=None)


def lines(console: Console) -> list[str]:
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def info(**fields: Any) -> RunInfo:
    """Four groups of two: one delivered, two running, one waiting, unless told otherwise."""
    usual = {"submitted": 4, "waiting": 1, "running": 2, "delivered": 1, "sessions_running": 4, "sessions_done": 2}
    return RunInfo("r", "running", "m:E", 2, **(usual | fields))


NOTHING: dict[str, Any] = {"submitted": 0, "waiting": 0, "running": 0, "delivered": 0, "sessions_done": 0}
ALL: dict[str, Any] = {"waiting": 0, "running": 0, "delivered": 4, "sessions_running": 0, "sessions_done": 8}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    return clock


def test_each_step_is_one_line_with_its_time(now: list[float]):
    console = plain()
    with steps(console) as report:
        report("starting Ray")
        now[0] += 1.25
        report("starting Ray")
        report("loading weights")
        now[0] += 10
        report("starting Ray")
    assert lines(console) == ["0.0 s starting Ray", "1.2 s loading weights", "11.2 s starting Ray"]


def test_on_a_terminal_the_steps_are_one_line_that_goes_away():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with steps(console) as report:
        report("starting Ray")
    assert "starting Ray" in console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_is_a_line_every_few_seconds_and_one_at_the_end():
    console = plain()
    with job_progress(console) as report:
        report(info(tokens=100), 1.0)
        report(info(tokens=5000), 5.0)
        report(info(tokens=6000, scored=2, reward_sum=1.0, stop_reasons={"error": 1, "stop": 1}), 9.0)
        report(info(tokens=20_000, scored=2, reward_sum=1.0, stop_reasons={"error": 1, "stop": 1}), 10.0)
        report(info(tokens=12_000, **ALL, sessions_retried=3, scored=8, reward_sum=6.0), 10.5)
    assert lines(console) == [
        "rollouts 2/8 4 running 1,000 tok/s reward – 0 failed",
        "rollouts 2/8 4 running 2,000 tok/s reward 0.500 1 failed",
        "rollouts 8/8 0 running 1,143 tok/s reward 0.750 0 failed 3 retried",
    ]


def test_progress_at_second_zero_divides_by_nothing():
    console = plain()
    with job_progress(console) as report:
        report(info(**ALL, tokens=5), 0.0)
    assert lines(console) == ["rollouts 8/8 0 running 0 tok/s reward – 0 failed"]


def test_on_a_terminal_there_is_a_bar():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with job_progress(console) as report:
        report(info(), 1.0)
    assert "2/8" in console.file.getvalue()  # type: ignore[attr-defined]


def trajectory(task: str, index: int, reward: float | None, length: int) -> Trajectory:
    segment = Segment(
        array("i", [1]), array("i", [5] * length), array("b", [1] * length), array("f", [-1.0] * length),
        array("i", [0] * length), [TurnSpan("assistant", 0, length, 0.5)],
    )  # fmt: skip
    key = SessionKey("run", task, f"run/{task}", index)
    return Trajectory(key, [segment], "stop", [], reward=reward, timing=Timing(0.5, 1.0, 0.25, 0.125, 2.0))


def table_lines(result: JobResult, trajectories: list[Trajectory]) -> dict[str, str]:
    console = plain()
    console.print(closing_table(result, to_table(trajectories)))
    title, *rest = (line for line in console.file.getvalue().splitlines() if line.strip())  # type: ignore[attr-defined]
    assert title.strip() == "rollouts"
    split = [line.strip().partition("  ") for line in rest]
    return {name: text.strip() for name, _, text in split}


def test_the_closing_table():
    made = [
        trajectory("a", 0, 1.0, 10),
        trajectory("a", 1, 0.0, 20),
        trajectory("b", 0, 1.0, 30),
        trajectory("b", 1, 1.0, 40),
        trajectory("c", 0, None, 50),
    ]
    final = info(
        submitted=3,
        sessions_done=5,
        sessions_retried=2,
        tokens=12_345,
        turns=1234,
        tool_calls=2000,
        tool_errors=7,
        scored=4,
        reward_sum=3.0,
        stop_reasons={"error": 1, "stop": 3, "length": 1},
        workers_lost=1,
    )
    workers = [WorkerStats(loop_lag_p99_s=0.002), WorkerStats(loop_lag_p99_s=0.0125)]
    assert table_lines(JobResult(Path("/out/t.parquet"), final, 2.0, False, workers), made) == {
        "trajectories": "5 of 6 in 3 groups, 5 segments",
        "time": "2.0 s, 2.5 trajectories/s",
        "sampled": "12,345 tokens in 1,234 turns, 6,172 tok/s",
        "reward": "0.750 mean over 4 scored, rewards differ in 1 of 3 groups",
        "ended by": "stop 3, error 1, length 1",
        "tool calls": "2,000, 7 of them failed",
        "response": "30 tokens mean, 50 longest",
        "seconds": "queue 0.500, engine 1.000, tool 0.250, env 0.125 (mean a trajectory)",
        "deaths": "2 attempts repeated, 1 workers lost",
        "event loop lag": "12 ms p99",
        "written to": "/out/t.parquet",
    }


def test_the_closing_table_of_nothing():
    found = table_lines(JobResult(Path("/out"), info(**NOTHING), 0.0, True), [])
    assert found["trajectories"] == "0 of 0 in 0 groups, 0 segments"
    assert found["reward"] == "none was scored"
    assert found["event loop lag"] == "0 ms p99"
    assert found["ended by"] == ""
    assert not {"response", "seconds", "deaths"} & found.keys()


def test_no_group_in_which_rewards_differ():
    final = info(submitted=1, sessions_done=2, scored=2, reward_sum=2.0, stop_reasons={"stop": 2})
    made = [trajectory("a", 0, 1.0, 1), trajectory("a", 1, 1.0, 1)]
    found = table_lines(JobResult(Path("/out"), final, 1.0, False), made)
    assert found["reward"] == "1.000 mean over 2 scored, rewards differ in 0 of 1 groups"


def test_the_summary_for_scripts():
    final = info(
        submitted=3, sessions_done=5, sessions_retried=2, tokens=1000, turns=30, tool_calls=20, tool_errors=7,
        forks=1, scored=4, reward_sum=3.0, stop_reasons={"error": 1, "stop": 4},
    )  # fmt: skip
    assert JobResult(Path("/out/t.parquet"), final, 3.0, True).summary() == {
        "path": "/out/t.parquet", "run": "r", "trajectories": 5, "submitted": 6, "interrupted": True, "seconds": 3.0,
        "tokens": 1000, "tokens_per_s": 333.3, "turns": 30, "tool_calls": 20, "tool_errors": 7, "forks": 1,
        "mean_reward": 0.75, "stop_reasons": {"error": 1, "stop": 4}, "retried": 2, "failures": 1,
        "policy_version": 0,
    }  # fmt: skip
    assert JobResult(Path("/out"), info(**NOTHING), 0.0, False).summary()["tokens_per_s"] == 0.0
