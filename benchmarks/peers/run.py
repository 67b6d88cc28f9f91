"""Measure the peers: one vLLM server, every peer in turn against it, at every concurrency.

    python -m benchmarks.peers.run --model DIR --tp 2

A line that cannot be measured (a package that does not install, a client that fails) comes out as null with the
reason; the others are still measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import episodes
from benchmarks.peers.setup import REPOSITORY, REQUIREMENTS, InstallFailure, ensure_venv
from benchmarks.peers.vllm_server import MAX_MODEL_LEN, MAX_NUM_SEQS, stop_group, vllm_server

HERE = Path(__file__).resolve().parent
# A client also imports its libraries, warms up and may meet a machine slower than its warm-up suggested.
CLIENT_START_ALLOWANCE_S = 300.0
CLIENT_SLOWNESS_ALLOWANCE = 6.0


@dataclass(frozen=True)
class Line:
    """One line of the comparison."""

    name: str
    label: str
    script: str
    environment: str | None  # None: our own interpreter
    arguments: tuple[str, ...] = ()


LINES = (
    Line("plain_http", "plain HTTP (aiohttp, no renderer)", "plain_http.py", None),
    Line("skyrl", "SkyRL: gym generator, HTTP client", "skyrl_client.py", "skyrl"),
    Line(
        "verifiers_client",
        "verifiers: training client alone",
        "verifiers_client.py",
        "verifiers",
        ("--path", "client"),
    ),
    Line(
        "verifiers_agent",
        "verifiers: whole rollouts",
        "verifiers_client.py",
        "verifiers",
        ("--path", "agent"),
    ),
)


def _missing(reason: str) -> dict[str, Any]:
    return {"episodes_per_s": None, "tokens_per_s": None, "lost": None, "reason": reason}


def _run_client(
    python: Path, line: Line, base_url: str, model_dir: Path, concurrency: int, seconds: float
) -> dict[str, Any]:
    """One point of one line."""
    command = [
        *(str(python), str(HERE / line.script)),
        *("--base-url", base_url, "--model", str(model_dir)),
        *("--concurrency", str(concurrency), "--seconds", str(seconds)),
        *line.arguments,
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = CLIENT_START_ALLOWANCE_S + CLIENT_SLOWNESS_ALLOWANCE * seconds
    try:
        out, err = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        return _missing(f"the client took more than {deadline:.0f} s")
    finally:
        if process.poll() is None:
            stop_group(process)
    if process.returncode:
        tail = " ".join(err.decode(errors="replace").split())[-500:]
        return _missing(f"the client ended with status {process.returncode}: … {tail}")
    for text in reversed(out.decode(errors="replace").splitlines()):
        if text.startswith("{"):
            return json.loads(text)
    return _missing("the client printed no result")


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median run of a point, with the spread and the losses of all of them."""
    good = [run for run in runs if run["episodes_per_s"] is not None]
    if not good:
        return dict(runs[0])
    rates = [run["episodes_per_s"] for run in good]
    middle = min(good, key=lambda run: abs(run["episodes_per_s"] - statistics.median(rates)))
    return {
        **middle,
        "episodes_per_s": statistics.median(rates),
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in good),
        "lost": sum(run["lost"] for run in good),
        "episodes": sum(run["episodes"] for run in good),
        "runs": [round(rate, 2) for rate in rates],
        "reason": next((run["reason"] for run in runs if run.get("reason")), None),
    }


def run_peers(
    model_dir: Path | str,
    *,
    tensor_parallel_size: int,
    concurrency: Sequence[int] = (64, 256),
    seconds_per_point: float = 20.0,
    rounds: int = 1,
    lines: Sequence[str] | None = None,
    log_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Measure the lines (all of them unless named) and return everything as one JSON-ready dictionary.

    ``results[line][str(concurrency)]`` holds ``episodes_per_s``, ``tokens_per_s``, ``lost``, ``version`` …, or null
    figures and a ``reason``. With several rounds the order of the lines turns from round to round and the medians
    are returned, which takes out some of a machine's drift.
    """
    model = Path(model_dir).resolve()
    chosen = [line for line in LINES if lines is None or line.name in lines]
    unknown = set(lines or ()) - {line.name for line in LINES}
    if unknown:
        raise ValueError(f"no such line: {', '.join(sorted(unknown))}")
    logs = Path(log_dir) if log_dir is not None else REPOSITORY / "out" / "bench"
    pythons: dict[str, Path | InstallFailure] = {
        name: ensure_venv(name, REQUIREMENTS[name])
        for name in dict.fromkeys(line.environment for line in chosen if line.environment)
    }
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    try:
        with vllm_server(
            model, tensor_parallel_size=tensor_parallel_size, log_file=logs / "vllm-server.log"
        ) as base_url:
            for number in range(rounds):
                turned = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
                for count in concurrency:
                    for line in turned:
                        python = pythons[line.environment] if line.environment else Path(sys.executable)
                        if isinstance(python, InstallFailure):
                            run = _missing(python.reason)
                        else:
                            run = _run_client(python, line, base_url, model, count, seconds_per_point)
                        points.setdefault((line.name, count), []).append(run)
    except RuntimeError as error:  # the server did not start
        for line in chosen:
            for count in concurrency:
                points.setdefault((line.name, count), [_missing(str(error))])
    return {
        "work": {
            "turns": episodes.TURNS,
            "tokens_per_turn": episodes.TOKENS_PER_TURN,
            "temperature": episodes.TEMPERATURE,
            "samples_per_task": episodes.SAMPLES_PER_TASK,
            "log_probabilities": "of every sampled token",
            "seconds_per_point": seconds_per_point,
            "rounds": rounds,
        },
        "server": {
            "what": "vllm.entrypoints.openai.api_server",
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
        },
        "labels": {line.name: line.label for line in chosen},
        "results": {
            line.name: {str(count): _summary(points[line.name, count]) for count in concurrency} for line in chosen
        },
    }


def peers_table(outcome: dict[str, Any]) -> Table:
    """The outcome of ``run_peers`` as a table for people."""
    counts = list(next(iter(outcome["results"].values())))
    table = Table(title="Episodes of three 64-token turns a second, over HTTP to vLLM's server", title_justify="left")
    table.add_column("path")
    table.add_column("version")
    for count in counts:
        table.add_column(f"{count} concurrent", justify="right")
    table.add_column("lost", justify="right")
    for name, by_count in outcome["results"].items():
        reference = outcome["results"].get("plain_http", {})
        cells = []
        for count in counts:
            rate = by_count[count]["episodes_per_s"]
            plain = reference.get(count, {}).get("episodes_per_s")
            share = f" ({rate / plain:.2f})" if rate is not None and plain and name != "plain_http" else ""
            cells.append("–" if rate is None else f"{rate:.1f}{share}")
        losses = [by_count[count]["lost"] for count in counts]
        version = next((by_count[count].get("version") for count in counts if by_count[count].get("version")), "–")
        lost = "–" if all(loss is None for loss in losses) else str(sum(loss or 0 for loss in losses))
        table.add_row(outcome["labels"][name], version, *cells, lost)
    table.caption = "in brackets: share of plain HTTP"
    return table


def reasons(outcome: dict[str, Any]) -> list[str]:
    """Why figures are missing and how episodes were lost, one sentence each."""
    found = []
    for name, by_count in outcome["results"].items():
        for count, point in by_count.items():
            why = point.get("reason") or point.get("first_failure")
            if why:
                found.append(f"{outcome['labels'][name]}, {count} concurrent: {why}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "examples" / "calculator" / "model")
    parser.add_argument("--tp", type=int, default=2, help="tensor parallel size of the server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds a point should take")
    parser.add_argument("--rounds", type=int, default=1, help="rounds to take the median of")
    parser.add_argument("--lines", nargs="+", choices=[line.name for line in LINES], default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the JSON here instead of printing it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by the finally blocks that stop the server
    outcome = run_peers(
        options.model,
        tensor_parallel_size=options.tp,
        concurrency=options.concurrency,
        seconds_per_point=options.seconds,
        rounds=options.rounds,
        lines=options.lines,
    )
    console = Console(stderr=True)
    console.print(peers_table(outcome))
    for reason in reasons(outcome):
        console.print(reason, style="yellow", markup=False)
    text = json.dumps(outcome, indent=2)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
