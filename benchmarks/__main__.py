"""`make bench`: every figure that docs/performance.md quotes, into out/bench/summary.json.

python -m benchmarks [--only session_path,turn_cost,peers] [--rounds N] [--tp N]
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "calculator" / "model"
PARTS = ("turn_cost", "agent_turn", "journal", "delivery", "session_path", "serving", "remote", "peers")
CONCURRENCY = (64, 256)
STREAMS = (1, 16, 64)
# The peers' clients are processes beside the server: with two ranks that hold both cores of a small machine, they
# starve (verifiers: 0.1 of plain HTTP), and what is measured is the operating system.
PEERS_TP = 1
PEERS_SECONDS = 12.0
# `python -m benchmarks.peers.run` has one more: verifiers' whole rollouts, which are slower than its client alone.
PEERS_LINES = ("plain_http", "skyrl", "verifiers_client")
# What the figures should be at least (or at most, for costs and growth).
AT_LEAST = {
    "session_path_vs_engine_64": 0.9,
    "session_path_vs_engine_256": 0.9,
    "rollouts_vs_verifiers_64": 2.0,
    "rollouts_vs_verifiers_256": 2.0,
    "rollouts_vs_skyrl_64": 1.2,
    "rollouts_vs_skyrl_256": 1.2,
    "journal_trajectories_per_s": 2_000.0,
    **{f"serving_vs_vllm_tokens_{n}": 0.9 for n in STREAMS},
}
AT_MOST = {
    "turn_cost_growth_10k": 1.2,
    "journal_growth_10x": 1.2,
    **{f"serving_vs_vllm_ttft_{n}": 1.2 for n in STREAMS},
}

console = Console()


def main(
    only: Annotated[str, typer.Option(help="Comma-separated parts.")] = ",".join(PARTS),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each comparison; medians are reported.")] = 3,
    tp: Annotated[int, typer.Option("--tp", min=1, help="tensor_parallel_size of the session path's engine.")] = 2,
    model: Annotated[Path, typer.Option(help="Model directory.")] = MODEL,
    out: Annotated[Path, typer.Option(help="Where summary.json goes.")] = Path("out/bench"),
) -> None:
    """Run the benchmarks and print the ratios."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [part.strip() for part in only.split(",")]
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    summary["machine"] = _machine() | {"tensor_parallel_size": tp}
    for part in PARTS:
        if part in chosen:
            console.print(f"[bold]{part}[/bold] …")
            started = time.monotonic()
            _BY_NAME[part](summary, model, rounds, tp)
            console.print(f"  [dim]{time.monotonic() - started:.0f} s[/dim]")
            path.write_text(json.dumps(summary, indent=2) + "\n")
    console.print(_table(summary))
    console.print(f"[dim]written to {path}[/dim]")


def _turn_cost(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import turn_cost

    found = turn_cost.measure(model)
    summary["turn_cost_growth_10k"] = found["growth"]
    summary["session_memory_kb"] = found["memory_kb"]
    for concurrent, point in found["concurrency"].items():
        summary[f"turn_cpu_ms_{concurrent}"] = point["cpu_ms_per_turn"]


def _agent_turn(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import agent_turn

    summary |= agent_turn.measure()


def _journal(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import journal

    found = journal.measure()
    summary["journal_trajectories_per_s"] = found["per_s"]
    summary["journal_growth_10x"] = found["growth_10x"]


def _delivery(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import delivery

    for name, value in delivery.measure().items():
        summary[f"delivery_{name}" if name == "batch_mb" else f"delivery_mb_s_{name}"] = value


def _session_path(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import session_path

    found = session_path.measure(model, tensor_parallel_size=tp, concurrency=CONCURRENCY, rounds=rounds)
    for concurrent, point in found["concurrency"].items():
        summary[f"session_path_vs_engine_{concurrent}"] = point["ratio"]
        summary[f"session_tokens_per_s_{concurrent}"] = point["session_tokens_per_s"]
        summary[f"engine_tokens_per_s_{concurrent}"] = point["raw_tokens_per_s"]
        summary[f"session_episodes_per_s_{concurrent}"] = point["session_episodes_per_s"]
    summary["update_pause_ms_p50"] = found["update_pause_ms_p50"]


def _serving(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import serving

    found = serving.measure(model, tensor_parallel_size=tp, concurrency=STREAMS, rounds=rounds)
    for streams, point in found.items():
        for ratio in ("tokens", "ttft"):
            summary[f"serving_vs_vllm_{ratio}_{streams}"] = point.pop(ratio)
        summary |= {f"serving_{name}_{streams}": value for name, value in point.items()}


def _remote(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import remote

    summary |= remote.measure(model, tensor_parallel_size=tp, rounds=rounds)


def _peers(summary: dict[str, Any], model: Path, rounds: int, tp: int) -> None:
    from benchmarks import session_path
    from benchmarks.peers.run import peers_table, run_peers

    # Ours once more, on the peers' engine. A point of a peer takes as long as several rounds of ours; one is enough.
    own = session_path.measure(model, tensor_parallel_size=PEERS_TP, concurrency=CONCURRENCY, rounds=2)["concurrency"]
    outcome = run_peers(
        model,
        tensor_parallel_size=PEERS_TP,
        concurrency=CONCURRENCY,
        rounds=1,
        seconds_per_point=PEERS_SECONDS,
        lines=PEERS_LINES,
    )
    console.print(peers_table(outcome))
    summary["peers"] = outcome["results"]
    for concurrent in CONCURRENCY:
        ours = own[concurrent]["session_episodes_per_s"]
        summary[f"peers_session_episodes_per_s_{concurrent}"] = ours
        speeds = {
            line: points.get(str(concurrent), {}).get("episodes_per_s") for line, points in outcome["results"].items()
        }
        verifiers = [speed for line, speed in speeds.items() if line.startswith("verifiers") and speed]
        theirs = {"verifiers": max(verifiers, default=None), "skyrl": speeds.get("skyrl")}
        for name, speed in theirs.items():
            summary[f"rollouts_vs_{name}_{concurrent}"] = ours / speed if speed else None


_BY_NAME = {
    "turn_cost": _turn_cost,
    "agent_turn": _agent_turn,
    "journal": _journal,
    "delivery": _delivery,
    "session_path": _session_path,
    "serving": _serving,
    "remote": _remote,
    "peers": _peers,
}


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def _table(summary: dict[str, Any]) -> Table:
    view = Table(title="benchmarks", title_justify="left", box=None, header_style="bold")
    for name in ("figure", "value", "wanted"):
        view.add_column(name, justify="left" if name == "figure" else "right")
    for key, value in sorted(summary.items()):
        if isinstance(value, dict):
            continue
        wanted = f">= {AT_LEAST[key]}" if key in AT_LEAST else f"<= {AT_MOST[key]}" if key in AT_MOST else ""
        missed = value is not None and (value < AT_LEAST.get(key, value) or value > AT_MOST.get(key, value))
        text = "not measured" if value is None else f"{value:,.3f}"
        view.add_row(key, f"[red]{text}[/red]" if missed else text, wanted)
    return view


if __name__ == "__main__":
    typer.run(main)
