"""The cluster's metrics: one registry, which the controller owns and everything that passes through it feeds.

A Prometheus client's metric that is made inside a replica or worker would be scraped by nobody: Ray exports its own
metrics alone. So what workers know travels with what they hand in anyway, and is counted here.

Invariant: an event is counted once, when it has taken effect: a trajectory when it is in the journal, a batch when
its acknowledgement is. Counters begin at 0 with this process, as Prometheus expects; what is read back from the
journal was counted before and is not counted again. Every open label has a bound (rollout.metrics_catalogue).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from actors.leases import LeaseState
from actors.messages import Figures, ForeignNews, Summary, WorkerStats
from rollout.metrics_catalogue import (
    CATALOGUE,
    LABELS,
    MAX_REASONS,
    MAX_RUNS,
    MAX_TOOLS,
    OTHER,
    REWARD_WINDOW,
    UNKNOWN_TOOL,
    Metric,
    label,
    label_names,
    staleness_class,
)
from rollout.weights import WeightReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A text is given to everybody who asks within this time: however often it is asked for, it is made once a second.
FRESH_S = 1.0
# Longer values are cut: they come from models and users.
MAX_LABEL_CHARS = 64
# Outcomes of calls whose name is the model's invention. One that was refused may have either.
_NAMELESS = frozenset({"unknown_tool", "malformed"})
_CLASSES: dict[str, type[MetricWrapperBase]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Values:
    """The values of one open label: the first `limit` have their own series, the rest share `other`."""

    def __init__(
        self, limit: int, on_evicted: Callable[[str], None] = lambda _: None, known: Iterable[str] = ()
    ) -> None:
        """`on_evicted`: told of a value that has made room for a new one. `known`: values with a place already."""
        self._limit = limit
        self._on_evicted = on_evicted
        self._known: dict[str, None] = dict.fromkeys(known)
        self._free: dict[str, None] = {}
        """Values that may go when a new one comes, oldest first."""

    def __call__(self, text: str) -> str:
        """The label's value for this text."""
        value = text[:MAX_LABEL_CHARS] or UNKNOWN_TOOL
        if value in self._known:
            self._free.pop(value, None)
            return value
        if len(self._known) >= self._limit:
            if not self._free:
                return OTHER
            evicted = next(iter(self._free))
            del self._free[evicted], self._known[evicted]
            self._on_evicted(evicted)
        self._known[value] = None
        return value

    def __contains__(self, text: str) -> bool:
        return text[:MAX_LABEL_CHARS] in self._known

    def release(self, text: str) -> None:
        """This value may make room for another. Until then it stays, so that its last change is scraped."""
        value = text[:MAX_LABEL_CHARS]
        if value in self._known:
            self._free[value] = None


class Metrics:
    """All families of the catalogue. Lives on the controller's event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # A `_created` beside each counter is a third of all series, and Prometheus does not read it.
        disable_created_metrics()
        # Never the library's global registry, which whatever this process imports may write to.
        self.registry = CollectorRegistry()
        self._families = {name: self._make(metric) for name, metric in CATALOGUE.items()}
        self._runs = Values(MAX_RUNS, self._drop_run)
        self._tools, self._forks = Values(MAX_TOOLS), Values(MAX_REASONS)
        self._drops, self._replacements, self._categories = (
            Values(MAX_REASONS, known=LABELS[name].known) for name in ("drop_reason", "replace_reason", "category")
        )
        self._rewards: dict[str, deque[float]] = {}
        self._resends: dict[str, int] = {}
        self._replicas: frozenset[str] = frozenset()
        self._text = b""
        self._made_at = -math.inf
        self._making = asyncio.Lock()

    # Runs

    def run_opened(self, run: str) -> None:
        """Its series begin at 0, so that the first increment is seen as one."""
        name = self._runs(run)
        for family, metric in CATALOGUE.items():
            rest = [label(metric, other).at_birth for other in label_names(metric) if other != "run"]
            if metric.kind != "gauge" and "run" in metric.labels and all(rest):
                for values in itertools.product(*rest):
                    others = dict(zip((n for n in label_names(metric) if n != "run"), values, strict=True))
                    self._families[family].labels(run=name, **others)

    def run_forgotten(self, run: str) -> None:
        """Its series stay until another run needs their place."""
        self._runs.release(run)

    def run_label(self, run: str) -> str:
        """The value of the label `run`."""
        return self._runs(run)

    # Sessions

    def finished(self, summary: Summary, figures: Figures | None) -> None:
        """A trajectory is in the journal and belongs to its group."""
        run = self._runs(summary.run)
        self.add("rollout_sessions_finished_total", run=run, stop_reason=summary.stop_reason)
        self.add("rollout_turns_total", summary.num_turns, run=run)
        self.add("rollout_tokens_total", summary.num_sampled, run=run, direction="out")
        self.add("rollout_retries_total", max(0, summary.attempt - 1), kind="session")
        if summary.reward is not None:
            self._rewarded(run, summary.reward)
        if figures is not None:
            self._figures(run, figures)

    def _rewarded(self, run: str, reward: float) -> None:
        if not math.isfinite(reward):
            return
        self.observe("rollout_reward", reward, run=run)
        window = self._rewards.setdefault(run, deque(maxlen=REWARD_WINDOW))
        window.append(reward)
        self.set("rollout_reward_mean", math.fsum(window) / len(window), run=run)

    def _figures(self, run: str, figures: Figures) -> None:
        self.add("rollout_tokens_total", figures.num_context, run=run, direction="in")
        parts = {
            "queue": figures.queue_s,
            "engine": figures.engine_s,
            "tool": figures.tool_s,
            "environment": figures.env_s,
            "total": figures.total_s,
        }
        for part, seconds in parts.items():
            self.observe("rollout_session_seconds", seconds, part=part)
        for name, outcome, seconds in figures.tools:
            # The name is the model's until a tool of that name has answered.
            ours = outcome not in _NAMELESS and (outcome != "refused" or name in self._tools)
            tool = self._tools(name) if ours else UNKNOWN_TOOL
            self.add("rollout_tool_calls_total", tool=tool, outcome=outcome)
            self.observe("rollout_tool_call_seconds", seconds, tool=tool)
        for reason in figures.forks:
            self.add("rollout_forks_total", run=run, reason=self._forks(reason))
        if figures.error is not None:
            self.add("rollout_session_errors_total", category=self._categories(figures.error))

    # Groups and batches

    def dropped(self, run: str, reason: str) -> None:
        """A group will never be delivered."""
        self.add("rollout_groups_dropped_total", run=self._runs(run), reason=self._drops(reason))

    def replaced(self, run: str, reason: str) -> None:
        """A group is played again."""
        self.add("rollout_groups_replaced_total", run=self._runs(run), reason=self._replacements(reason))

    def leased(self) -> None:
        """A batch was handed out."""
        self.add("rollout_lease_events_total", event="granted")

    def lease_ended(self, state: LeaseState) -> None:
        """A batch is acknowledged, expired or released."""
        self.add("rollout_lease_events_total", event=state)

    def delivered(self, run: str, groups: int, summaries: Iterable[Summary], version: int) -> None:
        """Groups were acknowledged that had been leased at `version`."""
        name = self._runs(run)
        self.add("rollout_groups_delivered_total", groups, run=name)
        for summary in summaries:
            for sampled_at, tokens in summary.version_tokens:
                behind = max(0, version - sampled_at)
                self.add("rollout_delivered_tokens_total", tokens, run=name, staleness=staleness_class(behind))
                self.add("rollout_delivered_staleness_versions_total", behind * tokens, run=name)

    # Failures

    def died(self, kind: str) -> None:
        """A part of the cluster is gone: `worker`, `replica` or `controller`."""
        self.add("rollout_deaths_total", kind=kind)

    def heard(self, stats: WorkerStats) -> None:
        """What a worker says of itself; its figures only grow while it lives."""
        before = self._resends.get(stats.worker_id, 0)
        self.add("rollout_retries_total", max(0, stats.resends - before), kind="turn")
        self._resends[stats.worker_id] = stats.resends

    def worker_lost(self, worker: str) -> None:
        """A session worker died."""
        self._resends.pop(worker, None)
        self.died("worker")

    def replicas_listed(self, names: Iterable[str]) -> None:
        """Serve lists these replicas now."""
        now = frozenset(names)
        for _ in self._replicas - now:
            self.died("replica")
        self._replicas = now

    # Weights

    def weights_updated(self, report: WeightReport) -> None:
        """New weights are current."""
        self.add("rollout_weight_updates_total", outcome="partial" if report.failed else "done")
        self.add("rollout_weight_replica_failures_total", len(report.failed))
        self.observe("rollout_weight_update_seconds", report.seconds)
        for replica in report.replicas:
            for step in ("pause", "load", "verify"):
                self.observe("rollout_weight_replica_seconds", getattr(replica, f"{step}_ms") / 1000, step=step)

    def weights_failed(self, *, refused: bool, replicas: int = 0) -> None:
        """An update changed nothing. `replicas`: how many did not take it."""
        self.add("rollout_weight_updates_total", outcome="refused" if refused else "failed")
        self.add("rollout_weight_replica_failures_total", replicas)

    # Captured sessions, and remote rollouts in both directions

    def captured(self, calls: int, lost: bool) -> None:
        """An engine has reported a request of a captured session."""
        outcome = "lost" if lost else "recorded" if calls else "empty"
        self.add("rollout_capture_requests_total", outcome=outcome)

    def remote_refused(self, busy: bool) -> None:
        """A foreign trainer's rollout was not accepted."""
        self.add("rollout_remote_refused_total", reason="busy" if busy else "invalid")

    def foreign(self, news: ForeignNews) -> None:
        """What a worker's sessions at remote rollout servers came to since it was last asked."""
        for outcome, seconds in news.ended:
            self.add("rollout_foreign_finished_total", outcome=outcome)
            # One that ended before it began has no duration.
            if seconds:
                self.observe("rollout_foreign_seconds", seconds)
        for reason, calls in news.refused.items():
            self.add("rollout_foreign_refused_total", calls, reason=reason)

    # Any metric, by its name in the catalogue

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count. Raises KeyError for a name that is not in the catalogue."""
        if amount:
            self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Into a histogram."""
        self._child(name, labels).observe(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge, or a counter that somebody else keeps."""
        child = self._child(name, labels)
        if isinstance(child, Counter):
            child.reset()
            child.inc(value)
        else:
            child.set(value)

    def clear(self, name: str) -> None:
        """Drop the series of a gauge whose labels come and go."""
        self._families[name].clear()

    async def text(self, collect: Callable[[], None]) -> bytes:
        """The registry in Prometheus's text format. `collect` sets the gauges first, on this loop.

        It is written in a thread: thousands of series take tens of milliseconds, which sessions would wait for.
        """
        async with self._making:
            if self._clock() - self._made_at >= FRESH_S:
                collect()
                self._text = await asyncio.to_thread(generate_latest, self.registry)
                self._made_at = self._clock()
            return self._text

    # Inside

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        family = self._families[name]
        return family.labels(**labels) if labels else family

    def _make(self, metric: Metric) -> Any:
        names = label_names(metric)
        options: dict[str, Any] = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
        family = _CLASSES[metric.kind](metric.name, metric.help, names, registry=self.registry, **options)
        known = [label(metric, name).at_birth for name in names]
        if names and metric.kind != "gauge" and all(known):
            # A counter that is born at 1 has not increased for Prometheus: no alert would see the first event.
            for values in itertools.product(*known):
                family.labels(*values)
        return family

    def _drop_run(self, run: str) -> None:
        self._rewards.pop(run, None)
        for name, metric in CATALOGUE.items():
            if "run" in metric.labels:
                self._families[name].remove_by_labels({"run": run})
