"""What a person sees while a job runs, and the table at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.deploy import Report
from cluster.job import JobResult, OnProgress
from rollout.api import RunInfo

# Where the output is no terminal, a line is printed this often instead of a moving bar, in seconds.
PLAIN_SECONDS = 5.0


@contextmanager
def steps(console: Console) -> Iterator[Report]:
    """A line that says what is being waited for, and for how long; each finished step stays as a line."""
    started = time.monotonic()
    if not console.is_terminal:
        yield _plain_steps(console, started)
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as view:
        task = view.add_task("starting")
        yield lambda text: view.update(task, description=text)


def _plain_steps(console: Console, started: float) -> Report:
    last = ""

    def report(text: str) -> None:
        nonlocal last
        if text != last:
            console.print(f"[dim]{time.monotonic() - started:5.1f} s[/dim]  {text}", highlight=False)
            last = text

    return report


@contextmanager
def job_progress(console: Console) -> Iterator[OnProgress]:
    """A bar with what is done and running, tokens per second, mean reward and failures."""
    if not console.is_terminal:
        yield _plain_progress(console)
        return
    with Progress(
        TextColumn("rollouts"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[line]}", style="dim"),
        TimeElapsedColumn(),
        console=console,
    ) as view:
        task = view.add_task("rollouts", total=None, line="")

        def report(info: RunInfo, seconds: float) -> None:
            total = info.submitted * info.group_size
            view.update(task, completed=info.sessions_done, total=total, line=_line(info, seconds))

        yield report


def _plain_progress(console: Console) -> OnProgress:
    last = 0.0

    def report(info: RunInfo, seconds: float) -> None:
        nonlocal last
        total = info.submitted * info.group_size
        if seconds - last >= PLAIN_SECONDS or info.finished:
            last = seconds
            console.print(f"rollouts {info.sessions_done}/{total}  {_line(info, seconds)}", highlight=False)

    return report


def _line(info: RunInfo, seconds: float) -> str:
    reward = info.mean_reward
    parts = [
        f"{info.sessions_running} running",
        f"{info.tokens / seconds if seconds else 0:,.0f} tok/s",
        f"reward {'–' if reward is None else f'{reward:.3f}'}",
        f"{info.failures} failed",
    ]
    if info.sessions_retried:
        parts.append(f"{info.sessions_retried} retried")
    return "  ".join(parts)


def closing_table(result: JobResult, table: pa.Table) -> Table:
    """The figures of a finished job."""
    info = result.info
    view = Table(title="rollouts", box=None, show_header=False, title_justify="left", title_style="bold")
    view.add_column(style="dim")
    view.add_column()
    done = info.sessions_done
    groups = len(pc.unique(table["group_id"])) if table.num_rows else 0
    view.add_row("trajectories", f"{done} of {result.sessions} in {groups} groups, {table.num_rows} segments")
    view.add_row("time", f"{result.seconds:.1f} s, {done / max(result.seconds, 1e-9):.1f} trajectories/s")
    view.add_row("sampled", f"{info.tokens:,} tokens in {info.turns:,} turns, {result.tokens_per_s:,.0f} tok/s")
    if info.scored:
        view.add_row("reward", f"{info.mean_reward:.3f} mean over {info.scored} scored{_mixed(table)}")
    else:
        view.add_row("reward", "none was scored")
    view.add_row("ended by", ", ".join(f"{name} {n}" for name, n in _ordered(info.stop_reasons)))
    view.add_row("tool calls", f"{info.tool_calls:,}, {info.tool_errors:,} of them failed")
    if table.num_rows:
        lengths = pc.list_value_length(table["response_ids"])
        view.add_row("response", f"{pc.mean(lengths).as_py():.0f} tokens mean, {pc.max(lengths).as_py()} longest")
        view.add_row("seconds", _timing(table))
    if info.sessions_retried or info.workers_lost:
        view.add_row("deaths", f"{info.sessions_retried} attempts repeated, {info.workers_lost} workers lost")
    lag = max((worker.loop_lag_p99_s for worker in result.workers), default=0.0)
    view.add_row("event loop lag", f"{1000 * lag:.0f} ms p99")
    view.add_row("written to", Text(str(result.path)))
    return view


def _ordered(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: -item[1])


def _mixed(table: pa.Table) -> str:
    """How many groups an advantage can be computed in: those whose rewards differ."""
    groups = table.group_by("group_id").aggregate([("reward", "min"), ("reward", "max")])
    mixed = pc.sum(pc.less(groups["reward_min"], groups["reward_max"])).as_py() or 0
    return f", rewards differ in {mixed} of {groups.num_rows} groups"


def _timing(table: pa.Table) -> str:
    names = ("queue_s", "engine_s", "tool_s", "env_s")
    means = {name: pc.mean(pc.struct_field(table["timing"], name)).as_py() for name in names}
    return (
        ", ".join(f"{name.removesuffix('_s')} {value:.3f}" for name, value in means.items()) + " (mean a trajectory)"
    )
