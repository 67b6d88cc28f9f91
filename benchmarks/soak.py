"""A soak: demo load for half an hour, something killed every other minute, and the memory of every process watched.

python -m benchmarks.soak [--minutes 30] [--out out/soak]

What must hold at the end: every task was delivered exactly once, no rollout failed, and no process that lived for a
while has grown. Growth is the slope of a straight line through a process's resident memory after it has warmed up.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.vllm_server import free_port

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "calculator" / "model"
# What is killed in turn, by what the process calls itself.
VICTIMS = (
    "ray::SessionWorker",
    "ray::ServeReplica:gateway",
    "VLLM::Worker_TP1",
    "ray::Controller",
    "ray::ServeReplica:engine",
)
KILL_EVERY_S = 120.0
# The last part of the soak is left in peace, so that every kind of process lives long enough to be judged.
QUIET_SHARE = 0.4
SAMPLE_S = 5.0
# A process is judged by what it does after so long, if it lived so long beyond it.
WARM_S, JUDGED_S = 180.0, 300.0
# Growth beyond it is not flat: MiB an hour, and of the size.
FLAT_MB_PER_HOUR, FLAT_SHARE_PER_HOUR = 60.0, 0.1
GROUP, WAVE = 8, 32

console = Console()


@dataclass
class Life:
    """One process's resident memory."""

    name: str
    times: list[float] = field(default_factory=list)
    """Seconds since the soak began."""
    mb: list[float] = field(default_factory=list)

    def growth(self) -> tuple[float, float] | None:
        """MiB an hour after the warm-up, and the size at its end; None: it did not live long enough."""
        times, sizes = np.array(self.times), np.array(self.mb)
        warm = times >= times[0] + WARM_S
        if not warm.any() or times[-1] - times[warm][0] < JUDGED_S:
            return None
        slope = float(np.polyfit(times[warm], sizes[warm], 1)[0])
        return 3600 * slope, float(sizes[-1])


class Watch:
    """Samples all processes of a cluster, in a thread."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.started = time.monotonic()
        self.lives: dict[tuple[int, float], Life] = {}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        from cluster import state

        while not self._stop.wait(SAMPLE_S):
            now = time.monotonic() - self.started
            for process in state.processes(self._cluster):
                try:
                    name, size = _name(process), process.memory_info().rss / 2**20
                    life = self.lives.setdefault((process.pid, process.create_time()), Life(name))
                except psutil.Error:
                    continue
                # Ray's workers are called something else until they are an actor.
                life.name = name
                life.times.append(now)
                life.mb.append(size)


def main(
    minutes: Annotated[float, typer.Option(min=1, help="How long.")] = 30.0,
    out: Annotated[Path, typer.Option(help="Where summary.json and memory.json go.")] = Path("out/soak"),
) -> None:
    """Run the soak. Exits with 1 where something was lost, failed or grew."""
    from cluster import launch
    from cluster.config import ClusterConfig

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = ClusterConfig.model_validate(
        {
            "name": "soak",
            "model": {"path": str(MODEL)},
            "engine": {
                "device": "cpu",
                "vllm": {"tensor_parallel_size": 2, "max_model_len": 1024, "max_num_seqs": 128},
            },
            "workers": {"count": 2, "sessions": 64},
            "environment": {"path": "examples.calculator.environment:Calculator"},
            "pythonpath": [str(ROOT)],
            "sampling": {"max_tokens": 128},
            "gateway": {"port": free_port()},
        }
    )
    cluster = launch.up(config, "", console.print)
    try:
        with Watch(cluster) as watch:
            summary = _load(cluster, 60 * minutes)
    finally:
        launch.down(cluster, forget=True)
    summary["memory"] = _memory(watch.lives)
    problems = _problems(summary)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "memory.json").write_text(json.dumps(_courses(watch.lives)) + "\n")
    console.print(_table(summary))
    console.print("\n".join(problems) or f"flat, and nothing lost; written to {out}/summary.json")
    raise typer.Exit(1 if problems else 0)


def _load(cluster: Any, seconds: float) -> dict[str, Any]:
    """Waves of groups until the time is over, with kills. Returns what was counted."""
    from rollout import Batch, RolloutClient, read_tasks

    tasks = read_tasks(ROOT / "examples" / "calculator" / "tasks.jsonl")
    started = time.monotonic()
    next_kill, kills = started + KILL_EVERY_S, Counter[str]()
    seen, stops = Counter[str](), Counter[str]()
    submitted = 0
    with RolloutClient(cluster.gateway) as client:
        run = client.create_run(name="soak", group_size=GROUP).run
        while True:
            now = time.monotonic() - started
            if now < seconds and submitted - len(seen) < 3 * WAVE:
                wave = [
                    tasks[index % len(tasks)].model_copy(update={"task_id": f"soak-{index:06d}"})
                    for index in range(submitted, submitted + WAVE)
                ]
                client.submit(run, wave)
                submitted += WAVE
            batch = client.lease(run, WAVE, min_groups=1, timeout=20)
            if isinstance(batch, Batch):
                seen.update(batch.groups)
                stops.update(batch.table["stop_reason"].to_pylist())
                client.acknowledge(batch)
            elif now >= seconds and batch.finished:
                break
            if now < seconds * (1 - QUIET_SHARE) and time.monotonic() >= next_kill:
                next_kill += KILL_EVERY_S
                victim = VICTIMS[sum(kills.values()) % len(VICTIMS)]
                kills[victim] += _kill(cluster, victim)
            if now > 2 * seconds + 600:
                raise RuntimeError(f"{submitted - len(seen)} groups do not come: {client.run_info(run)}")
        info = client.run_info(run)
    return {
        "minutes": (time.monotonic() - started) / 60,
        "submitted_groups": submitted,
        "delivered_groups": len(seen),
        "delivered_twice": sum(count > 1 for count in seen.values()),
        "trajectories": sum(stops.values()),
        "stop_reasons": dict(stops),
        "retried": info.sessions_retried,
        "kills": dict(kills),
    }


def _kill(cluster: Any, name: str) -> int:
    from cluster import state

    for process in state.processes(cluster):
        if _name(process).startswith(name):
            console.print(f"killing {name}")
            os.kill(process.pid, signal.SIGKILL)
            return 1
    return 0


def _name(process: psutil.Process) -> str:
    line = process.cmdline()
    first = line[0] if line else process.name()
    if first.startswith(("ray::", "VLLM::")):
        # Actors append the method that runs.
        return ":".join(part.split(".")[0] for part in first.split(":"))
    return process.name()


def _memory(lives: dict[tuple[int, float], Life]) -> dict[str, Any]:
    """By kind of process: how many were judged, and the one that grew most."""
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for life in lives.values():
        if (grown := life.growth()) is not None:
            by_kind[life.name].append(grown)
    return {
        name: {
            "judged": len(of),
            "mb_per_hour": max(of)[0],
            "mb": max(of)[1],
            "flat": all(g <= max(FLAT_MB_PER_HOUR, FLAT_SHARE_PER_HOUR * size) for g, size in of),
        }
        for name, of in sorted(by_kind.items())
    }


def _courses(lives: dict[tuple[int, float], Life]) -> list[dict[str, Any]]:
    """Every process's samples: a slope does not tell a leak from a step, such as an import."""
    found = []
    for (pid, _), life in lives.items():
        seconds, sizes = [round(t) for t in life.times], [round(mb) for mb in life.mb]
        found.append({"name": life.name, "pid": pid, "seconds": seconds, "mb": sizes})
    return found


def _problems(summary: dict[str, Any]) -> list[str]:
    problems = []
    if summary["submitted_groups"] != summary["delivered_groups"] or summary["delivered_twice"]:
        problems.append("not every group was delivered exactly once")
    if failed := summary["stop_reasons"].get("error", 0):
        problems.append(f"{failed} trajectories ended as error")
    problems += [f"{name} grows" for name, of in summary["memory"].items() if not of["flat"]]
    return problems


def _table(summary: dict[str, Any]) -> Table:
    view = Table(title="soak", title_justify="left", box=None, header_style="bold")
    for name in ("process", "judged", "MiB", "MiB an hour"):
        view.add_column(name, justify="left" if name == "process" else "right")
    for name, of in summary["memory"].items():
        view.add_row(name, str(of["judged"]), f"{of['mb']:,.0f}", f"{of['mb_per_hour']:+,.1f}")
    counted = {key: value for key, value in summary.items() if key != "memory"}
    view.caption = json.dumps(counted)
    return view


if __name__ == "__main__":
    typer.run(main)
