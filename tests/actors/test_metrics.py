"""What the controller counts: once, when it has taken effect, under bounded labels."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.loading_board import BoardReader
from actors.loop_lag import LoopLag
from actors.messages import Figures, ForeignNews, Summary, WorkerStats
from actors.metrics import Metrics, Values
from actors.metrics_gauges import Sources, collect, scrape
from actors.replica_health import ReplicaTable
from actors.rows import to_rows
from actors.scheduler import Assignment
from rollout.api import Batch, LeaseRequest, RunRequest
from rollout.errors import LedgerError, NotFoundError, PrefixError, RecordError
from rollout.ledger import Segment
from rollout.loading import LoadingState
from rollout.metrics_catalogue import (
    CATALOGUE,
    LABELS,
    MAX_REASONS,
    MAX_REPLICAS,
    MAX_RUNS,
    MAX_TOOLS,
    MAX_WORKERS,
    OTHER,
    UNKNOWN_TOOL,
)
from rollout.remote.order import RolloutCounts
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import SessionKey, Timing, Trajectory
from rollout.weights import RankWeights, ReplicaWeights, WeightReport
from tests.actors.service import Service, play, tasks


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """Over all series that have these labels."""
    return sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def summary(run: str = "r", **fields: Any) -> Summary:
    known: dict[str, Any] = {
        "run": run,
        "group_id": f"{run}/t",
        "sample_index": 0,
        "attempt": 1,
        "retryable": False,
        "stop_reason": "stop",
        "reward": 1.0,
        "num_sampled": 5,
        "num_turns": 2,
        "num_segments": 1,
        "tool_calls": 0,
        "tool_errors": 0,
        "oldest_version": 0,
        "first_row": 0,
        "num_rows": 1,
    }
    return Summary(**(known | fields))


def figures(**fields: Any) -> Figures:
    known: dict[str, Any] = {
        "queue_s": 0.1, "engine_s": 1.0, "tool_s": 0.2, "env_s": 0.0, "total_s": 2.0,
        "num_context": 7, "tools": [], "forks": [], "error": None,
    }  # fmt: skip
    return Figures(**(known | fields))


async def no_remote() -> RolloutCounts:
    raise NotFoundError("this cluster is no rollout server")


def no_board(name: str, namespace: str | None) -> Any:
    raise ValueError("there is no actor of this name")


def sources(service: Service, **parts: Any) -> Sources:
    known: dict[str, Any] = {
        "store": service.store,
        "service": service.runs,
        "workers": [],
        "lag": LoopLag(),
        "started_at": 5.0,
        "ready": True,
        "replicas": None,
        "capture": {},
        "remote": no_remote,
        "board": BoardReader(None, find=no_board),
    }
    return Sources(**(known | parts))


@pytest.fixture
async def service(tmp_path: Path):
    made = Service(tmp_path / "journal.sqlite")
    yield made
    await made.close()


# The registry


def test_every_family_of_the_catalogue_is_there_and_no_other():
    names = {family.name for family in Metrics().registry.collect()}
    assert names == {metric.name.removesuffix("_total") for metric in CATALOGUE.values()}


def test_two_registries_do_not_share_anything():
    one, other = Metrics(), Metrics()
    one.died("worker")
    assert value(one, "rollout_deaths_total", kind="worker") == 1
    assert value(other, "rollout_deaths_total", kind="worker") == 0


def test_counters_with_known_labels_begin_at_zero():
    metrics = Metrics()
    assert {value(metrics, "rollout_retries_total", kind=kind) for kind in LABELS["retry"].values} == {0}
    metrics.run_opened("r")
    for reason in LABELS["stop_reason"].values:
        assert value(metrics, "rollout_sessions_finished_total", run="r", stop_reason=reason) == 0


def test_the_first_refusal_of_the_ledger_is_an_increase():
    metrics = Metrics()
    for error in (LedgerError, PrefixError, RecordError):
        assert value(metrics, "rollout_session_errors_total", category=error.category) == 0
    metrics.finished(summary(stop_reason="error"), figures(error=LedgerError.category))
    assert value(metrics, "rollout_session_errors_total", category="ledger") == 1


def test_a_runs_own_reasons_begin_at_zero_when_it_opens_and_no_others():
    metrics = Metrics()
    metrics.run_opened("r")
    for kind in ("drop", "replace"):
        family = {"drop": "rollout_groups_dropped_total", "replace": "rollout_groups_replaced_total"}[kind]
        for reason in LABELS[f"{kind}_reason"].known:
            assert value(metrics, family, run="r", reason=reason) == 0, (family, reason)
        assert value(metrics, family, run="r", reason="too short") is None
    assert total(metrics, "rollout_forks_total") == 0
    metrics.dropped("r", "too short")
    assert value(metrics, "rollout_groups_dropped_total", run="r", reason="too short") == 1


def test_invented_words_never_crowd_out_the_programs_own():
    metrics = Metrics()
    for number in range(100):
        metrics.finished(summary(), figures(error=f"kind {number}"))
        metrics.dropped("r", f"reason {number}")
    metrics.finished(summary(), figures(error="prefix"))
    metrics.dropped("r", "zero_variance")
    assert value(metrics, "rollout_session_errors_total", category="prefix") == 1
    assert value(metrics, "rollout_groups_dropped_total", run="r", reason="zero_variance") == 1
    categories = {
        sample.labels["category"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rollout_session_errors_total"
    }
    assert len(categories) == MAX_REASONS + 1


# Bounds


def test_an_open_label_has_a_bound():
    values = Values(2)
    assert [values("a"), values("b"), values("c"), values("a")] == ["a", "b", OTHER, "a"]
    assert values("x" * 1000) == OTHER


def test_what_was_released_makes_room_the_oldest_first_and_is_kept_until_then():
    evicted: list[str] = []
    values = Values(2, evicted.append)
    values("a"), values("b")
    values.release("b"), values.release("a")
    assert evicted == [] and values("a") == "a"
    assert values("c") == "c" and evicted == ["b"]
    assert values("d") == OTHER


def test_a_models_invented_tools_have_one_series():
    metrics = Metrics()
    invented = [(f"tool-{n}", "unknown_tool", 0.0) for n in range(1000)] + [("", "malformed", 0.0)]
    metrics.finished(summary(), figures(tools=[*invented, ("never", "refused", 0.0), ("add", "ok", 0.5)]))
    metrics.finished(summary(), figures(tools=[("add", "refused", 0.0)]))
    assert value(metrics, "rollout_tool_calls_total", tool=UNKNOWN_TOOL, outcome="unknown_tool") == 1000
    assert value(metrics, "rollout_tool_calls_total", tool=UNKNOWN_TOOL, outcome="refused") == 1
    assert value(metrics, "rollout_tool_calls_total", tool="add", outcome="refused") == 1
    assert value(metrics, "rollout_tool_call_seconds_sum", tool="add") == 0.5


def test_many_tools_runs_and_reasons_stay_within_their_bounds():
    metrics = Metrics()
    for number in range(500):
        metrics.run_opened(f"run-{number}")
        told = figures(tools=[(f"tool-{number}", "ok", 0.1)], forks=[f"why {number}"], error=f"kind {number}")
        metrics.finished(summary(f"run-{number}"), told)
        metrics.dropped(f"run-{number}", f"reason {number}")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert len({sample.labels["run"] for sample in samples if "run" in sample.labels}) == MAX_RUNS + 1
    assert len({sample.labels["tool"] for sample in samples if "tool" in sample.labels}) == MAX_TOOLS + 1
    assert total(metrics, "rollout_sessions_finished_total") == 500
    assert total(metrics, "rollout_sessions_finished_total", run=OTHER) == 500 - MAX_RUNS
    assert len(samples) < 20_000


def test_a_forgotten_run_makes_room_and_takes_its_series_with_it():
    metrics = Metrics()
    for number in range(MAX_RUNS):
        metrics.finished(summary(f"run-{number}"), None)
    metrics.run_forgotten("run-7")
    assert total(metrics, "rollout_turns_total", run="run-7") == 2
    metrics.finished(summary("new"), None)
    assert value(metrics, "rollout_turns_total", run="run-7") is None
    assert total(metrics, "rollout_turns_total", run="new") == 2


# Sessions


def test_a_finished_session_is_counted_with_all_that_it_did():
    metrics = Metrics()
    told = figures(tools=[("add", "ok", 0.02), ("add", "timeout", 5.0)], forks=["rewritten"], error="engine")
    metrics.finished(summary(attempt=3, stop_reason="error", reward=None), told)
    assert value(metrics, "rollout_sessions_finished_total", run="r", stop_reason="error") == 1
    assert value(metrics, "rollout_tokens_total", run="r", direction="out") == 5
    assert value(metrics, "rollout_tokens_total", run="r", direction="in") == 7
    assert value(metrics, "rollout_retries_total", kind="session") == 2
    assert value(metrics, "rollout_tool_calls_total", tool="add", outcome="timeout") == 1
    assert value(metrics, "rollout_forks_total", run="r", reason="rewritten") == 1
    assert value(metrics, "rollout_session_errors_total", category="engine") == 1
    assert value(metrics, "rollout_session_seconds_sum", part="total") == 2.0
    assert value(metrics, "rollout_session_seconds_bucket", part="queue", le="0.1") == 1
    assert value(metrics, "rollout_reward_count", run="r") is None, "it was not scored"


def test_rewards_have_a_distribution_and_a_mean_over_the_newest():
    metrics = Metrics()
    for reward in [-2.0] * 10 + [1.0] * 256 + [float("nan"), float("inf")]:
        metrics.finished(summary(reward=reward), None)
    assert value(metrics, "rollout_reward_mean", run="r") == 1.0
    assert value(metrics, "rollout_reward_bucket", run="r", le="-1.0") == 10
    assert value(metrics, "rollout_reward_count", run="r") == 266


def test_a_summary_brings_what_the_metrics_want():
    segments = [
        Segment(
            array("i", [1, 2, 3]),
            array("i", [4, 5, 6, 7]),
            array("b", [1, 0, 1, 1]),
            array("f", [-0.1, 0, -0.1, -0.1]),
            array("i", [3, -1, 3, 4]),
            fork_reason=reason,
        )
        for reason in (None, "it was rewritten")
    ]
    trajectory = Trajectory(
        SessionKey("r", "t", "r/t", 0),
        segments,
        "stop",
        [],
        tool_calls=[ToolCallRecord("add", True, 0.5), ToolCallRecord("sub", False, 5.0, "timeout: too slow: 5 s")],
        timing=Timing(queue_s=1.0, engine_s=2.0, tool_s=3.0, env_s=4.0, total_s=5.0),
        error="engine_died: all of them: at once",
    )
    _, (made,) = to_rows([trajectory])
    assert made.version_tokens == [[3, 4], [4, 2]]
    assert made.figures == Figures(
        1.0, 2.0, 3.0, 4.0, 5.0, 8, [("add", "ok", 0.5), ("sub", "timeout", 5.0)], ["it was rewritten"], "engine_died"
    )


# Groups and batches, over a real store


async def test_what_flows_through_the_store_is_counted_once(service: Service):
    metrics = service.store.metrics
    await service.runs.create(RunRequest(name="r"))
    await service.runs.submit("r", tasks(3))
    service.store.version = 2
    await service.work(lambda assignment: play(assignment, version=1))
    assert value(metrics, "rollout_sessions_finished_total", run="r", stop_reason="stop") == 6
    assert value(metrics, "rollout_session_seconds_count", part="total") == 6
    first = await service.delivery.lease("r", LeaseRequest(groups=2, timeout=0))
    assert isinstance(first, Batch)
    assert total(metrics, "rollout_delivered_tokens_total") == 0, "not before it is acknowledged"
    for _ in range(2):
        await service.delivery.acknowledge(first.lease_id)
    last = await service.delivery.lease("r", LeaseRequest(groups=1, timeout=0, ttl=1))
    assert isinstance(last, Batch)
    service.delivery.expire(time.time() + 10)
    assert value(metrics, "rollout_groups_delivered_total", run="r") == 2
    assert value(metrics, "rollout_delivered_tokens_total", run="r", staleness="1") == 12
    assert value(metrics, "rollout_delivered_staleness_versions_total", run="r") == 12
    events = {
        event: value(metrics, "rollout_lease_events_total", event=event) for event in LABELS["lease_event"].values
    }
    assert events == {"granted": 2, "acknowledged": 1, "expired": 1, "released": 0}


async def test_filters_and_replacements_have_their_reasons(service: Service):
    metrics = service.store.metrics
    filters = {"drop_zero_variance": True}
    await service.runs.create(RunRequest(name="r", filters=filters, failed="drop", max_replacements=1))
    await service.runs.submit("r", tasks(1))
    await service.work()
    assert value(metrics, "rollout_groups_dropped_total", run="r", reason="zero_variance") == 1
    await service.runs.submit("r", tasks(1, start=5))
    await service.work(lambda assignment: play(assignment, stop="error"))
    assert value(metrics, "rollout_groups_replaced_total", run="r", reason="failed") == 1
    assert value(metrics, "rollout_groups_dropped_total", run="r", reason="failed") == 1


async def test_a_restart_counts_nothing_again(tmp_path: Path):
    def slow(assignment: Assignment) -> Trajectory:
        made = play(assignment)
        made.tool_calls.append(ToolCallRecord("add", True, 0.5))
        return made

    before = Service(tmp_path / "j.sqlite")
    await before.runs.create(RunRequest(name="r"))
    await before.runs.submit("r", tasks(4))
    await before.work(slow)
    assert total(before.store.metrics, "rollout_tool_calls_total") == 8
    await before.close()

    after = Service(tmp_path / "j.sqlite")
    metrics = after.store.metrics
    counted = ("rollout_sessions_finished_total", "rollout_tool_calls_total", "rollout_turns_total")
    assert {name: total(metrics, name) for name in counted} == dict.fromkeys(counted, 0)
    batch = await after.delivery.lease("r", LeaseRequest(groups=4, timeout=0))
    assert isinstance(batch, Batch)
    await after.delivery.acknowledge(batch.lease_id)
    assert value(metrics, "rollout_delivered_tokens_total", run="r", staleness="0") == 24, "what versions is kept"
    await after.close()


async def test_what_the_metrics_want_is_neither_in_the_journal_nor_in_memory(service: Service):
    await service.runs.create(RunRequest(name="r"))
    await service.runs.submit("r", tasks(1))
    await service.work()
    (text,) = service.journal.read("SELECT summaries FROM blocks")[0]
    assert '"figures": null' in text
    members = [m for g in service.store.run("r").book.groups() for m in g.members.values()]
    assert members and all(member.summary.figures is None for member in members)


# Failures and weights


def test_a_workers_resends_are_counted_as_they_grow():
    metrics = Metrics()
    for resends in (0, 2, 2, 5):
        metrics.heard(WorkerStats("w", resends=resends))
    metrics.worker_lost("w")
    metrics.heard(WorkerStats("w", resends=1))
    assert value(metrics, "rollout_retries_total", kind="turn") == 6
    assert value(metrics, "rollout_deaths_total", kind="worker") == 1


def test_replicas_that_serve_lists_no_longer_are_counted():
    metrics = Metrics()
    for names in (["a", "b"], ["a", "b"], ["b", "c"], []):
        metrics.replicas_listed(names)
    assert value(metrics, "rollout_deaths_total", kind="replica") == 3


def test_a_weight_update_is_counted_by_what_became_of_it():
    metrics = Metrics()
    replica = ReplicaWeights("a", 1, [RankWeights(0, "x")], pause_ms=300.0, load_ms=200.0, verify_ms=50.0)
    metrics.weights_updated(WeightReport(1, 2.0, 300.0, [replica]))
    metrics.weights_updated(WeightReport(2, 2.0, 300.0, [replica], {"b": "slow"}))
    metrics.weights_failed(refused=True)
    metrics.weights_failed(refused=False, replicas=2)
    outcomes = [value(metrics, "rollout_weight_updates_total", outcome=o) for o in LABELS["update"].values]
    assert outcomes == [1, 1, 1, 1]
    assert value(metrics, "rollout_weight_replica_failures_total") == 3
    assert value(metrics, "rollout_weight_replica_seconds_sum", step="pause") == pytest.approx(0.6)
    assert value(metrics, "rollout_weight_update_seconds_count") == 2


def test_captured_and_remote_figures():
    metrics = Metrics()
    metrics.captured(2, lost=False), metrics.captured(0, lost=False), metrics.captured(0, lost=True)
    assert [value(metrics, "rollout_capture_requests_total", outcome=o) for o in ("recorded", "empty", "lost")] == [
        1
    ] * 3
    metrics.remote_refused(busy=True), metrics.remote_refused(busy=False)
    for reason in LABELS["remote_refusal"].values:
        assert value(metrics, "rollout_remote_refused_total", reason=reason) == 1


def test_sessions_at_remote_rollout_servers():
    metrics = Metrics()
    for outcome in LABELS["foreign_outcome"].values:
        assert value(metrics, "rollout_foreign_finished_total", outcome=outcome) == 0
    assert value(metrics, "rollout_foreign_seconds_count") == 0
    metrics.foreign(ForeignNews([("completed", 2.0), ("remote_died", 40.0)], {"conflict": 3}))
    metrics.foreign(ForeignNews([("completed", 1.0), ("cancelled", 0.0)]))
    assert value(metrics, "rollout_foreign_finished_total", outcome="cancelled") == 1
    assert value(metrics, "rollout_foreign_finished_total", outcome="completed") == 2
    assert value(metrics, "rollout_foreign_finished_total", outcome="remote_died") == 1
    assert value(metrics, "rollout_foreign_seconds_count") == 3
    assert value(metrics, "rollout_foreign_seconds_sum") == 43.0
    refused = [value(metrics, "rollout_foreign_refused_total", reason=r) for r in LABELS["foreign_refusal"].values]
    assert refused == [3, 0, 0, 0]


async def test_sessions_out_at_servers_are_the_sum_over_workers(service: Service):
    metrics = service.store.metrics
    workers = [WorkerStats("worker-0", foreign=3), WorkerStats("worker-1"), WorkerStats("worker-2", foreign=2)]
    collect(metrics, sources(service, workers=workers), None, None)
    assert value(metrics, "rollout_foreign_rollouts") == 5
    collect(metrics, sources(service), None, None)
    assert value(metrics, "rollout_foreign_rollouts") == 0


# A scrape


async def test_a_scrape_is_text_that_prometheus_reads(service: Service):
    metrics = service.store.metrics
    await service.runs.create(RunRequest(name="r"))
    await service.runs.submit("r", tasks(3))
    service.start()
    table = ReplicaTable()
    table.listed(["a", "b"])
    table.answered("a", 0)
    workers = [WorkerStats("worker-0", 5, 0.01, 0.05, rss_mb=100.0)]

    async def counts() -> RolloutCounts:
        return RolloutCounts(queued=1, running=4, unreported=0, completed=7, failed=2)

    where = sources(service, replicas=table, workers=workers, capture={"open": 2}, remote=counts)
    text = await scrape(metrics, where)
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert found["rollout_groups", (("run", "r"), ("state", "running"))] == 3
    assert found["rollout_sessions", (("run", "r"), ("state", "running"))] == 6
    assert found["rollout_replicas", (("health", "healthy"),)] == 1
    assert found["rollout_replica_weight_version", (("replica", "a"),)] == 0
    assert ("rollout_replica_weight_version", (("replica", "b"),)) not in found, "it has said nothing yet"
    assert found["rollout_worker_memory_bytes", (("worker", "worker-0"),)] == 100 * 2**20
    assert found["rollout_event_loop_lag_seconds", (("process", "worker-0"), ("quantile", "0.99"))] == 0.05
    assert found["rollout_capture_sessions", (("state", "open"),)] == 2
    assert found["rollout_remote_rollouts", (("state", "running"),)] == 4
    assert found["rollout_remote_finished_total", (("outcome", "completed"),)] == 5
    assert found["rollout_remote_finished_total", (("outcome", "error"),)] == 2
    assert found["rollout_journal_bytes", ()] > 0 and found["rollout_journal_writes_total", ()] >= 2
    assert found["rollout_controller_ready", ()] == 1
    assert not any(name.endswith("_created") for name, _ in found)


async def test_what_is_gone_is_gone_with_the_next_scrape(service: Service):
    metrics, table = service.store.metrics, ReplicaTable()
    table.listed(["a"])
    table.answered("a", 0)
    workers = [WorkerStats("worker-0")]
    where = sources(service, replicas=table, workers=workers)
    await service.runs.create(RunRequest(name="r"))
    collect(metrics, where, None, None)
    assert value(metrics, "rollout_replica_weight_version", replica="a") == 0
    table.listed([])
    workers.clear()
    await service.runs.forget("r")
    collect(metrics, where, None, None)
    assert value(metrics, "rollout_replica_weight_version", replica="a") is None
    assert value(metrics, "rollout_worker_sessions", worker="worker-0") is None
    assert value(metrics, "rollout_groups", run="r", state="waiting") is None


async def test_a_text_is_made_once_a_second_however_many_ask(service: Service):
    now = [0.0]
    metrics = Metrics(clock=lambda: now[0])
    collected: list[int] = []
    for _ in range(10):
        await metrics.text(lambda: collected.append(1))
    assert len(collected) == 1
    now[0] = 2.0
    metrics.died("worker")
    assert b'rollout_deaths_total{kind="worker"} 1.0' in await metrics.text(lambda: collected.append(1))
    assert len(collected) == 2


async def test_loading_is_told_as_far_as_it_is_known(service: Service):
    metrics, state = service.store.metrics, LoadingState(2)
    rank = {"stage": "loading_to_vram", "rank": 0, "device": "cpu", "layers_loaded": 1, "layers_total": 4}
    state.report("a", [{**rank, "vram_mb": 1.0, "bytes_read": 25, "bytes_total": 100}])
    collect(metrics, sources(service), state.snapshot(), None)
    assert value(metrics, "rollout_loading_phase", phase="loading") == 1
    assert value(metrics, "rollout_loading_phase", phase="ready") == 0
    assert value(metrics, "rollout_loading_ratio", replica="a") == 0.25
    assert value(metrics, "rollout_loading_replicas_expected") == 2
    for name in "ab":
        state.report(name, [{"stage": "ready"}])
    collect(metrics, sources(service), state.snapshot(), None)
    assert value(metrics, "rollout_loading_phase", phase="ready") == 1
    assert value(metrics, "rollout_loading_ratio", replica="a") is None
    collect(metrics, sources(service), None, None)
    assert value(metrics, "rollout_loading_phase", phase="nothing") == 1


async def test_hundreds_of_workers_are_some_and_the_rest(service: Service):
    metrics = service.store.metrics
    workers = [WorkerStats(f"worker-{n:03}", sessions=2, loop_lag_p99_s=n / 1000) for n in range(100)]
    collect(metrics, sources(service, workers=workers), None, None)
    assert value(metrics, "rollout_workers") == 100
    assert total(metrics, "rollout_worker_sessions") == 200
    assert value(metrics, "rollout_worker_sessions", worker=OTHER) == 2 * (100 - MAX_WORKERS)
    assert value(metrics, "rollout_event_loop_lag_seconds", process=OTHER, quantile="0.99") == 0.099


async def test_replicas_beyond_the_bound_have_no_series_as_the_page_says(service: Service):
    metrics, table = service.store.metrics, ReplicaTable()
    names = [f"replica-{n:04}" for n in range(MAX_REPLICAS + 3)]
    table.listed(names)
    for name in names:
        table.answered(name, 0)
    collect(metrics, sources(service, replicas=table), None, None)
    found = [
        sample.labels["replica"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rollout_replica_weight_version"
    ]
    assert len(found) == MAX_REPLICAS and OTHER not in found
    assert not LABELS["replica"].summed and LABELS["worker"].summed
    assert value(metrics, "rollout_replicas", health="healthy") == len(names), "they are counted all the same"


def test_a_name_that_is_not_in_the_catalogue_is_a_key_error():
    with pytest.raises(KeyError):
        Metrics().add("rollout_made_up_total")
