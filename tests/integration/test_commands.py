"""The command line against the running cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from rollout.trajectory_file import read_trajectories
from tests.conftest import ROOT
from tests.integration.conftest import CONFIG, TASKS, rollout

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


def test_status_of_the_running_cluster(cluster):
    done = rollout("status", "--json")
    (found,) = [item for item in json.loads(done.stdout) if item["name"] == "integration"]
    assert found["alive"] is True
    assert found["engine"]["tensor_parallel_size"] == 2
    assert found["engine"]["max_model_len"] == 1024
    assert len(found["workers"]) == 2
    assert "integration" in rollout("status").stdout


def test_up_twice_is_refused(cluster):
    again = rollout("up", CONFIG)
    assert again.returncode == 1
    assert "already up" in again.stderr


def test_run_uses_the_running_cluster_and_leaves_it(cluster, tmp_path):
    out = tmp_path / "out"
    done = rollout("run", CONFIG, "--tasks", TASKS, "--out", out, "--limit", "8", "--group-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["trajectories"], summary["submitted"], summary["failures"]) == (16, 16, 0)
    table, info = read_trajectories(out)
    assert len(set(table["trajectory_id"].to_pylist())) == 16
    assert info["environment"] == "examples.calculator.environment:Calculator"
    assert "rollouts 16/16" in done.stderr

    listed = rollout("show", out, "--list")
    assert listed.stdout.count("calc-") == 16
    shown = rollout("show", out)
    assert "trained on (mask 1)" in shown.stdout and "calculator" in shown.stdout
    assert rollout("run", CONFIG, "--tasks", TASKS, "--out", out).returncode == 1, "never written over by accident"
    assert json.loads(rollout("status", "--json").stdout)[0]["alive"] is True


def test_a_bad_line_is_named_and_nothing_runs(cluster, tmp_path):
    bad = tmp_path / "bad.jsonl"
    lines = TASKS.read_text().splitlines()[:3]
    bad.write_text("\n".join([*lines[:2], '{"task_id": "x", "mesages": []}', lines[2]]))
    done = rollout("run", CONFIG, "--tasks", bad, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"{bad}:3:" in done.stderr.replace("\n", "") and "mesages" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_misspelt_field_is_named_with_its_line(cluster, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model:\n  path: Qwen/Qwen3-0.6B\nsampling:\n  temprature: 1\n")
    done = rollout("run", wrong, "--tasks", TASKS, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"{wrong}:4: sampling.temprature" in done.stderr.replace("\n", "")
    assert "temperature" in done.stderr


def test_ctrl_c_keeps_what_has_finished(cluster, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "cluster", "run", str(CONFIG), "--tasks", str(TASKS), "--out", str(out),
            # Long turns in large groups: minutes of work, of which a few seconds are let happen.
            "--group-size", "16", "--set", "sampling.min_tokens=96",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("parts/part-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    table, _ = read_trajectories(out)
    reasons = set(table["stop_reason"].to_pylist())
    assert "cancelled" in reasons and reasons - {"cancelled"}, reasons
    whole = Counter(row.rpartition("/")[0] for row in set(table["trajectory_id"].to_pylist()))
    assert set(whole.values()) == {16}, "of every group that was begun, every sample has its row"
    assert len(whole) < 256
    assert json.loads(rollout("status", "--json").stdout)[0]["alive"] is True
