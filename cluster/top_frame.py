"""One frame of `rollout top`: what the cluster said at a moment, as plain figures and as tables for a terminal.

Invariant: a figure that nobody gave is None and shown as "–", never as 0; a gateway without some endpoint costs its
figures and nothing else. Pure: answers in, figures out; who asks is cluster.top.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

# Rates are over the newest answers: trajectories come in bunches, and a shorter window would flicker.
RATE_SECONDS = 15.0
# Rows of a table; the rest is counted.
MAX_ROWS = 24
# Characters of a line that hold all columns.
WIDE = 110
# From here on a loop's lag is worth a colour (docs/operations.md).
LAG_SECONDS = 0.05
LAG = "rollout_event_loop_lag_seconds"
MIB, GIB = 2**20, 2**30
UNKNOWN = "–"

Labels = Mapping[str, str]
Figures = dict[str, Any]


class Samples:
    """The samples of a Prometheus text, by name."""

    def __init__(self, samples: Iterable[tuple[str, Labels, float]] = ()) -> None:
        self._by_name: dict[str, list[tuple[Labels, float]]] = {}
        for name, labels, value in samples:
            # Prometheus writes NaN for what it does not know, and so do we: not at all.
            if math.isfinite(value):
                self._by_name.setdefault(name, []).append((labels, value))

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of the samples with these labels; None where there are none."""
        found = [value for having, value in self._by_name.get(name, ()) if labels.items() <= having.items()]
        return sum(found) if found else None

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums by the values of one label."""
        sums: dict[str, float] = {}
        for having, value in self._by_name.get(name, ()):
            if label in having and labels.items() <= having.items():
                sums[having[label]] = sums.get(having[label], 0.0) + value
        return sums


def parse(text: str, prefix: str) -> Samples:
    """The samples of a Prometheus text whose names begin with `prefix`. Raises ValueError for what is none."""
    from prometheus_client.parser import text_string_to_metric_families

    # A node's metrics are thousands of lines, and nearly all of them are others.
    lines = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(prefix))
    families = text_string_to_metric_families(lines)
    return Samples((sample.name, sample.labels, sample.value) for family in families for sample in family.samples)


@dataclass
class Answers:
    """What was heard in one round. None: nobody said."""

    at: float
    """Seconds since the epoch."""
    runs: list[Figures] | None = None
    """GET /v1/runs."""
    weights: Figures | None = None
    """GET /v1/weights."""
    metrics: Samples | None = None
    """GET /metrics."""
    engines: Samples | None = None
    """vLLM's metrics, from Ray's own address."""
    problems: list[str] = field(default_factory=list)
    """What could not be asked, and why."""


class Rates:
    """How fast counters grow, over the newest answers."""

    def __init__(self) -> None:
        self._heard: deque[tuple[float, dict[str, float]]] = deque()

    def add(self, at: float, counters: Mapping[str, float | None]) -> dict[str, float | None]:
        """Per second, by name; None for those that were not there before, or that began anew."""
        now = {name: value for name, value in counters.items() if value is not None}
        # One that lies before the window stays, so that slow rounds have something to compare with.
        while len(self._heard) > 1 and at - self._heard[1][0] >= RATE_SECONDS:
            self._heard.popleft()
        rates: dict[str, float | None] = {}
        for name in counters:
            rates[name] = None
            known = [(when, heard[name]) for when, heard in self._heard if name in heard]
            if name in now and known and at > known[0][0] and now[name] >= known[-1][1] >= known[0][1]:
                rates[name] = (now[name] - known[0][1]) / (at - known[0][0])
        self._heard.append((at, now))
        return rates


def frame(name: str, address: str, answers: Answers, rates: Rates) -> Figures:
    """All figures of a moment, as plain data."""
    metrics, engines = answers.metrics or Samples(), answers.engines or Samples()
    runs = [info for info in answers.runs or () if isinstance(info, dict) and isinstance(info.get("run"), str)]
    phases = metrics.by("rollout_loading_phase", "phase")
    loaded = metrics.by("rollout_loading_ratio", "replica")
    counters: dict[str, float | None] = {f"tokens/{info['run']}": info.get("tokens") for info in runs}
    counters["tokens"] = sum(info.get("tokens", 0) for info in runs) if answers.runs is not None else None
    counters["sessions"] = sum(info.get("sessions_done", 0) for info in runs) if answers.runs is not None else None
    counters["generated"] = engines.total("ray_vllm_generation_tokens_total")
    speed = rates.add(answers.at, counters)
    shown = [_run(info, metrics, speed[f"tokens/{info['run']}"]) for info in runs]
    return {
        "cluster": name,
        "address": address,
        "time": answers.at,
        "problems": answers.problems,
        "policy_version": (answers.weights or {}).get("version"),
        "totals": {
            "sessions_running": _sum(shown, "sessions_running"),
            "sessions_queued": _sum(shown, "sessions_queued"),
            "backlog_groups": _sum(shown, "waiting", "running") if answers.runs is not None else None,
            "ready_groups": _sum(shown, "ready") if answers.runs is not None else None,
            "tokens_per_s": speed["tokens"],
            "trajectories_per_s": speed["sessions"],
            "generated_tokens_per_s": speed["generated"],
            "leases_open": metrics.total("rollout_leases_open"),
            "leases_expired": metrics.total("rollout_lease_events_total", event="expired"),
            "finished_rows_bytes": metrics.total("rollout_finished_rows_bytes"),
            "journal_bytes": metrics.total("rollout_journal_bytes"),
            "captured_sessions": metrics.total("rollout_capture_sessions"),
            "retries": metrics.total("rollout_retries_total"),
            "deaths": metrics.by("rollout_deaths_total", "kind"),
        },
        "runs": shown,
        "replicas": _replicas(answers.weights, engines),
        "workers": _workers(metrics),
        "controller_lag_p99_s": metrics.total(LAG, process="controller", quantile="0.99"),
        "loading": {
            "phase": next((phase for phase, on in phases.items() if on), None),
            "ratio": sum(loaded.values()) / len(loaded) if loaded else None,
        },
    }


def _run(info: Figures, metrics: Samples, speed: float | None) -> Figures:
    name, scored = info["run"], info.get("scored", 0)
    recent = metrics.total("rollout_reward_mean", run=name)
    groups = info.get("delivered", 0)
    return {
        "run": name,
        "state": info.get("state"),
        "held_by": info.get("held_by"),
        "sessions_running": info.get("sessions_running"),
        "sessions_queued": metrics.total("rollout_sessions", run=name, state="queued"),
        "sessions_done": info.get("sessions_done"),
        **{key: info.get(key) for key in ("waiting", "running", "ready", "leased", "delivered", "submitted")},
        "dropped": sum((info.get("dropped") or {}).values()),
        "tokens_per_s": speed,
        "reward_mean": recent if recent is not None else _ratio(info.get("reward_sum"), scored),
        "staleness_mean": _ratio(info.get("staleness_sum"), groups),
        "staleness_max": info.get("staleness_max") if groups else None,
        "failures": (info.get("stop_reasons") or {}).get("error", 0),
        "tool_errors": info.get("tool_errors"),
    }


def _replicas(weights: Figures | None, engines: Samples) -> list[Figures]:
    states: Figures = (weights or {}).get("replicas") or {}
    load = {key: engines.by(f"ray_vllm_{key}", "ReplicaId") for key in _LOAD}
    return [
        {
            "replica": name,
            "version": state.get("version"),
            "health": state.get("health"),
            "reason": state.get("reason"),
            **{key: load[key].get(name) for key in _LOAD},
        }
        for name, state in sorted(states.items())
    ]


_LOAD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def _workers(metrics: Samples) -> list[Figures]:
    sessions = metrics.by("rollout_worker_sessions", "worker")
    memory = metrics.by("rollout_worker_memory_bytes", "worker")
    lag = {q: metrics.by(LAG, "process", quantile=q) for q in ("0.5", "0.99")}
    return [
        {
            "worker": name,
            "sessions": number,
            "loop_lag_p50_s": lag["0.5"].get(name),
            "loop_lag_p99_s": lag["0.99"].get(name),
            "memory_bytes": memory.get(name),
        }
        for name, number in sorted(sessions.items(), key=lambda item: (len(item[0]), item[0]))
    ]


def _ratio(total: float | None, number: float) -> float | None:
    return total / number if total is not None and number else None


def _sum(rows: Iterable[Figures], *keys: str) -> float | None:
    found = [row[key] for row in rows for key in keys if row.get(key) is not None]
    return sum(found) if found else None


# As a person reads it


def view(figures: Figures, width: int = WIDE) -> Group:
    """A frame as tables, on a terminal of so many characters: narrow ones get the columns that matter most."""
    narrow = width < WIDE
    parts: list[Any] = [_head(figures)]
    parts += [Text(f"! {problem}", style="yellow") for problem in figures["problems"]]
    parts.append(_totals(figures))
    for title, rows, columns in (
        ("runs", figures["runs"], tuple(column for column in _RUNS if not (narrow and column[0] in _WIDE_ONLY))),
        ("replicas", figures["replicas"], _REPLICAS),
        ("workers", figures["workers"], _WORKERS),
    ):
        if rows:
            parts.append(_table(title, rows, columns))
    if figures["problems"] == [] and not figures["runs"]:
        parts.append(Text("no runs; a trainer makes one, or `rollout run`", style="dim"))
    return Group(*parts)


def _head(figures: Figures) -> Text:
    when = datetime.fromtimestamp(figures["time"]).strftime("%H:%M:%S")
    text = Text()
    text.append(figures["cluster"], style="bold")
    text.append(f"  {figures['address']}  weights {_count(figures['policy_version'])}  {when}", style="dim")
    if figures["loading"]["phase"] == "loading":
        text.append(f"  engines are loading, {_share(figures['loading']['ratio'])}", style="yellow")
    return text


def _totals(figures: Figures) -> Table:
    totals = figures["totals"]
    view = Table.grid(padding=(0, 3))
    deaths = ", ".join(f"{kind} {n:.0f}" for kind, n in sorted(totals["deaths"].items()) if n) or "none"
    cells = (
        ("sessions", f"{_count(totals['sessions_running'])} running, {_count(totals['sessions_queued'])} queued"),
        ("groups", f"{_count(totals['backlog_groups'])} to do, {_count(totals['ready_groups'])} ready"),
        ("sampled", f"{_count(totals['tokens_per_s'])} tok/s, {_count(totals['trajectories_per_s'], 1)} sessions/s"),
        ("engines", f"{_count(totals['generated_tokens_per_s'])} tok/s"),
        ("leases", f"{_count(totals['leases_open'])} open, {_count(totals['leases_expired'])} expired"),
        ("memory", f"{_size(totals['finished_rows_bytes'])} unread, journal {_size(totals['journal_bytes'])}"),
        ("captured", f"{_count(totals['captured_sessions'])} open"),
        ("repeated", f"{_count(totals['retries'])}, deaths: {deaths}"),
        ("controller", f"loop lag {_ms(figures['controller_lag_p99_s'])} p99"),
    )
    for left, right in zip(cells[::2], (*cells[1::2], ("", "")), strict=True):
        view.add_row(Text(left[0], style="dim"), Text(left[1]), Text(right[0], style="dim"), Text(right[1]))
    return view


def _table(title: str, rows: list[Figures], columns: tuple[tuple[str, Any], ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", padding=(0, 1))
    for index, (name, _) in enumerate(columns):
        first = index == 0
        table.add_column(
            name,
            justify="left" if first else "right",
            no_wrap=not first,
            overflow="fold" if first else "ellipsis",
            min_width=8 if first else None,
        )
    for row in rows[:MAX_ROWS]:
        table.add_row(*(_cell(show(row)) for _, show in columns))
    if len(rows) > MAX_ROWS:
        table.add_row(Text(f"and {len(rows) - MAX_ROWS} more", style="dim"))
    return table


def _cell(shown: str | Text) -> Text:
    # Never markup: run names are bounded to harmless characters, what replicas say of their failures is not.
    return shown if isinstance(shown, Text) else Text(shown)


def _count(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def _ms(value: float | None) -> str:
    return UNKNOWN if value is None else f"{1000 * value:.0f} ms"


def _size(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.0f} %"


def _state(row: Figures) -> Text:
    held = row["held_by"]
    style = {"running": "green", "paused": "yellow", "cancelled": "dim"}.get(str(row["state"]), "")
    return Text(f"held: {held}" if held else str(row["state"]), style="yellow" if held else style)


def _health(row: Figures) -> Text:
    return Text(str(row["health"] or UNKNOWN), style="green" if row["health"] == "healthy" else "red")


def _lag(value: float | None) -> Text:
    return Text(_ms(value), style="red" if value is not None and value >= LAG_SECONDS else "")


_RUNS: tuple[tuple[str, Any], ...] = (
    ("run", lambda row: row["run"]),
    ("state", _state),
    ("playing", lambda row: _count(row["sessions_running"])),
    ("done", lambda row: _count(row["sessions_done"])),
    ("failed", lambda row: _count(row["failures"])),
    ("waiting", lambda row: _count(row["waiting"])),
    ("ready", lambda row: _count(row["ready"])),
    ("leased", lambda row: _count(row["leased"])),
    ("delivered", lambda row: _count(row["delivered"])),
    ("dropped", lambda row: _count(row["dropped"])),
    ("tok/s", lambda row: _count(row["tokens_per_s"])),
    ("reward", lambda row: _count(row["reward_mean"], 3)),
    ("stale", lambda row: _count(row["staleness_mean"], 2)),
    ("most", lambda row: _count(row["staleness_max"])),
)
_WIDE_ONLY = ("failed", "leased", "delivered", "dropped", "stale", "most")
_REPLICAS: tuple[tuple[str, Any], ...] = (
    ("replica", lambda row: row["replica"]),
    ("weights", lambda row: _count(row["version"])),
    ("health", _health),
    ("running", lambda row: _count(row["num_requests_running"])),
    ("waiting", lambda row: _count(row["num_requests_waiting"])),
    ("KV cache", lambda row: _share(row["kv_cache_usage_perc"])),
)
_WORKERS: tuple[tuple[str, Any], ...] = (
    ("worker", lambda row: row["worker"]),
    ("sessions", lambda row: _count(row["sessions"])),
    ("loop lag p50", lambda row: _lag(row["loop_lag_p50_s"])),
    ("p99", lambda row: _lag(row["loop_lag_p99_s"])),
    ("memory", lambda row: _size(row["memory_bytes"])),
)
