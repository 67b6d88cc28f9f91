"""Alerts: when somebody should look, what it means, and what to do.

Invariant: every alert names its way out. docs/alerts.md and the PrometheusRule are both written from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_BY = "sum by (ray_io_cluster) "
# What kept a share from being noise: less than this happened in the window.
_ENOUGH = 20


@dataclass(frozen=True)
class Alert:
    """One alert."""

    name: str
    severity: Literal["critical", "warning"]
    expr: str
    lasts: str
    """How long it must hold, as Prometheus writes durations."""
    summary: str
    means: str
    do: tuple[str, ...]
    """Steps, in order."""

    @property
    def anchor(self) -> str:
        """Of its section in docs/alerts.md."""
        return f"docs/alerts.md#{self.name.lower()}"


ALERTS: tuple[Alert, ...] = (
    Alert(
        "RolloutMetricsMissing",
        "critical",
        "absent(rollout_controller_ready)",
        "5m",
        "Prometheus has no metrics of the cluster",
        "Nobody answers at the gateway's `/metrics`, or nobody asks. Nothing else here can fire meanwhile.",
        (
            "Ask for the address by hand: `curl http://HOST:8800/metrics`. 401 or 403: give Prometheus a key, or set "
            "`metrics.public: true`.",
            "503: the controller is away. `rollout status`, then the controller's log in Ray's session directory.",
            "It answers: look at the scrape's own error at Prometheus under Status, Targets.",
        ),
    ),
    Alert(
        "RolloutControllerNotReady",
        "critical",
        "min by (ray_io_cluster) (rollout_controller_ready) == 0",
        "15m",
        "The controller runs and takes no work",
        "It waits for its session workers or for the engines, longer than a start should take.",
        (
            "Look at the dashboard Overview, row `Can the cluster take work?`: is something still loading?",
            "`rollout status`: workers need one logical CPU each (`ray.num_cpus`).",
        ),
    ),
    Alert(
        "RolloutControllerRestarts",
        "warning",
        "sum by (ray_io_cluster) (changes(rollout_controller_start_time_seconds[30m])) > 2",
        "0m",
        "The controller is started again and again",
        "Each time it comes back from its journal; sessions in flight are played again, trainers see pauses.",
        (
            "Read the end of the controller's log for what ended it; `OutOfMemory` in Ray's log is the usual one.",
            "Finished trajectories wait in its memory (`rollout_finished_rows_bytes`): do trainers acknowledge?",
        ),
    ),
    Alert(
        "RolloutJournalFailed",
        "critical",
        "max by (ray_io_cluster) (rollout_journal_failed) == 1",
        "0m",
        "The journal cannot be written, and nothing is accepted",
        "The disk is full or gone. Nothing that was acknowledged is lost, and nothing new is.",
        (
            "Make room on the disk of `journal.path`.",
            "`rollout down`, then `rollout up`: the controller reads the disk and goes on.",
        ),
    ),
    Alert(
        "RolloutJournalLarge",
        "warning",
        "max by (ray_io_cluster) (rollout_journal_bytes) > 20e9",
        "30m",
        "The journal holds more than 20 GB",
        "It grows with what is not acknowledged: tasks that wait and trajectories that nobody takes.",
        (
            "`rollout status`: which run has many groups `ready` or `leased`?",
            "Forget runs whose trainer is gone (`DELETE /v1/runs/NAME`).",
        ),
    ),
    Alert(
        "RolloutNoHealthyReplica",
        "critical",
        f'{_BY}(rollout_replicas{{health="healthy"}}) == 0 and on (ray_io_cluster) rollout_controller_ready == 1',
        "5m",
        "No engine carries the current weights",
        "Sessions wait for a replica until their deadline and end as errors.",
        (
            "Dashboard Engines, row `Does Serve see them as healthy?`: are they starting, or dying?",
            "`rollout status` has the reason of the last failure of each replica.",
            "After a failed weight update, send the last good checkpoint again under a new version.",
        ),
    ),
    Alert(
        "RolloutReplicaBehind",
        "warning",
        f'{_BY}(rollout_replicas{{health=~"stale|suspect"}}) > 0',
        "10m",
        "A replica does not carry the current weights",
        "It gets no sessions. It is asked again every two seconds and replaced after three failures in a row.",
        (
            "`rollout status` names it and the reason.",
            "Weights that came over the wire cannot be loaded by a replica that started later: publish a checkpoint.",
        ),
    ),
    Alert(
        "RolloutLoadingFailed",
        "critical",
        'max by (ray_io_cluster) (rollout_loading_phase{phase="failed"}) == 1',
        "2m",
        "An engine failed to load its model",
        "The error is on the loading board; Serve tries once more and then gives up.",
        (
            "`curl http://HOST:8800/v1/loading/progress` ends with the message.",
            "Out of memory: lower `engine.vllm.gpu_memory_utilization` or raise `tensor_parallel_size`.",
        ),
    ),
    Alert(
        "RolloutLoadingSlow",
        "warning",
        'max by (ray_io_cluster) (rollout_loading_phase{phase="loading"}) == 1',
        "30m",
        "The engines have been loading for half an hour",
        "A slow disk or network, or a replica that cannot be scheduled.",
        (
            "Dashboard Overview, panel Loading: does the ratio move?",
            "Keep the model on a volume (`HF_HOME`); see docs/operations.md.",
        ),
    ),
    Alert(
        "RolloutEngineMetricsMissing",
        "warning",
        'sum(rollout_replicas{health="healthy"}) > 0 unless on () count(ray_vllm_num_requests_running)',
        "10m",
        "Engines serve, and Prometheus has no metrics of vLLM",
        "Ray's port is not scraped: on Kubernetes the port `metrics` of every pod, locally `metrics.ray_port`.",
        ("Add the target; docs/metrics.md has the scrape configuration.",),
    ),
    Alert(
        "RolloutCacheFull",
        "warning",
        "max by (ray_io_cluster, ReplicaId) (ray_vllm_kv_cache_usage_perc) > 0.97",
        "15m",
        "An engine has no room for keys and values",
        "Requests are preempted and computed again: throughput falls while the GPU is busy.",
        (
            "Lower `workers.sessions` or `engine.vllm.max_num_seqs`, or add replicas.",
            "Long contexts: lower `engine.vllm.max_model_len` or raise `tensor_parallel_size`.",
        ),
    ),
    Alert(
        "RolloutWorkersDie",
        "warning",
        f'{_BY}(increase(rollout_deaths_total{{kind="worker"}}[15m])) > 3',
        "0m",
        "Session workers die",
        "Their sessions are played again elsewhere, up to `run.max_attempts` times.",
        (
            "Ray's log of the worker says why; memory is the usual reason (`rollout_worker_memory_bytes`).",
            "A session that kills each worker that plays it ends as an error after `run.max_attempts`: look for "
            "`worker_died` among the trajectories.",
        ),
    ),
    Alert(
        "RolloutStalled",
        "critical",
        f'{_BY}(rollout_groups{{state=~"waiting|running"}}) > 0 and on (ray_io_cluster) '
        f"{_BY}(increase(rollout_sessions_finished_total[20m])) == 0 unless on (ray_io_cluster) "
        f"{_BY}(rollout_runs_held) > 0",
        "10m",
        "There is work, nothing holds it, and nothing finishes",
        "Sessions hang in an engine, in a tool or in an environment, or no worker takes them.",
        (
            "Dashboard Sessions and tools: does the engine or a tool take the time?",
            "Dashboard Engines: do requests run? If none does, `rollout status` for the workers.",
            "Sessions end by themselves at `limits.session_seconds`.",
        ),
    ),
    Alert(
        "RolloutTrainerBehind",
        "warning",
        'max by (ray_io_cluster) (rollout_runs_held{reason="memory"}) > 0',
        "10m",
        "Finished trajectories fill the controller's memory",
        "Trainers lease and do not acknowledge, or have gone. Nothing new is started.",
        (
            "Acknowledge batches after training; release those that will not be used.",
            "Forget runs whose trainer is gone.",
        ),
    ),
    Alert(
        "RolloutLeasesExpire",
        "warning",
        f'{_BY}(increase(rollout_lease_events_total{{event="expired"}}[30m])) > 3',
        "0m",
        "Batches expire before they are acknowledged",
        "Their groups are delivered again; what was trained on them may be trained on twice.",
        ("Ask for a longer `ttl`, or extend leases while a step runs.", "Look for trainers that died with a batch."),
    ),
    Alert(
        "RolloutSessionErrors",
        "warning",
        f'{_BY}(increase(rollout_sessions_finished_total{{stop_reason="error"}}[15m])) / '
        f"{_BY}(increase(rollout_sessions_finished_total[15m])) > 0.05",
        "10m",
        "More than one session in twenty ends as an error",
        "The engine, a worker or the environment's own code fails.",
        (
            "Dashboard Overview, panel Trajectories with an error: which category?",
            "`environment`: your code raised; the trajectory's `error` has the message.",
        ),
    ),
    Alert(
        "RolloutLedgerRefuses",
        "critical",
        f'{_BY}(increase(rollout_session_errors_total{{category=~"ledger|prefix|record"}}[15m])) > 0',
        "0m",
        "Tokens of a session did not fit together",
        "The ledger refused to write what it could not prove. No wrong token reached a trainer; the session is lost.",
        (
            "Keep one of these trajectories: its `error` names the position.",
            "Was the engine, the renderer or the model's template changed? Go back, and report it.",
        ),
    ),
    Alert(
        "RolloutHistoriesFork",
        "warning",
        f"{_BY}(increase(rollout_forks_total[30m])) / {_BY}(increase(rollout_sessions_finished_total[30m])) > 0.2",
        "30m",
        "Histories are not extended token by token",
        "A renderer or an agent rewrites what was sampled; training sees prompts that were rendered anew.",
        (
            "Dashboard Training health, panel Forks: which reason?",
            "Renderers that drop reasoning from history have an option to keep it (`model.renderer_options`).",
        ),
    ),
    Alert(
        "RolloutToolFails",
        "warning",
        'sum by (ray_io_cluster, tool) (increase(rollout_tool_calls_total{outcome=~"exception|timeout"}[15m])) / '
        "sum by (ray_io_cluster, tool) (increase(rollout_tool_calls_total[15m])) > 0.5 and "
        f"sum by (ray_io_cluster, tool) (increase(rollout_tool_calls_total[15m])) > {_ENOUGH}",
        "10m",
        "A tool fails more often than it answers",
        "Exceptions and time-outs, which are the tool's; what the model got wrong is not counted here.",
        (
            "Look at the calls of a trajectory: `rollout show FILE`.",
            "Time-outs: raise `limits.tool_seconds`, or give the service behind the tool more room.",
        ),
    ),
    Alert(
        "RolloutNoSignal",
        "warning",
        f'{_BY}(increase(rollout_groups_dropped_total{{reason="zero_variance"}}[30m])) > 9 * '
        f"{_BY}(increase(rollout_groups_delivered_total[30m])) and on (ray_io_cluster) "
        f'{_BY}(increase(rollout_groups_dropped_total{{reason="zero_variance"}}[30m])) > {_ENOUGH}',
        "15m",
        "Nine of ten groups have equal rewards and are dropped",
        "The tasks are too easy or too hard for the policy, or the reward does not tell answers apart.",
        (
            "Dashboard Training health: is the distribution of rewards one band?",
            "Choose tasks by their pass rate, raise `group_size`, or grade in finer steps.",
        ),
    ),
    Alert(
        "RolloutWeightUpdateFails",
        "warning",
        f'{_BY}(increase(rollout_weight_updates_total{{outcome=~"failed|partial"}}[30m])) > 0',
        "0m",
        "A weight update did not reach every replica",
        "partial: the others went on with the new weights; failed: all still have the old ones.",
        (
            "The answer to the trainer's call names each replica and the reason; `rollout status` has it too.",
            "Do all engines see the checkpoint's disk?",
        ),
    ),
    Alert(
        "RolloutEventLoopLag",
        "warning",
        'max by (ray_io_cluster, process) (rollout_event_loop_lag_seconds{quantile="0.99"}) > 0.25',
        "10m",
        "An event loop is late",
        "A worker has too many sessions, or a tool or environment does CPU work on the loop.",
        (
            "Workers: raise `workers.count`, lower `workers.sessions`.",
            "Make slow tools synchronous functions: they run in threads.",
        ),
    ),
)


def prometheus_rule() -> dict[str, Any]:
    """The PrometheusRule of the Prometheus operator."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.means, "runbook": alert.anchor},
        }
        for alert in ALERTS
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "rollout",
            # The operator of the usual Helm chart takes up what has its release's label.
            "labels": {"app.kubernetes.io/part-of": "rollout-cluster", "release": "prometheus"},
        },
        "spec": {"groups": [{"name": "rollout", "rules": rules}]},
    }


def runbook() -> str:
    """docs/alerts.md."""
    parts = [
        "# Alerts",
        "Written by `python -m k8s.monitoring.generate` from k8s/monitoring/alerts.py; change it there. The rules "
        "are k8s/monitoring/prometheus-rule.yaml.",
        "| alert | severity | after | |",
    ]
    rows = ["|---|---|---|---|"]
    rows += [
        f"| [{alert.name}](#{alert.name.lower()}) | {alert.severity} | {alert.lasts} | {alert.summary} |"
        for alert in ALERTS
    ]
    parts[-1] = "\n".join([parts[-1], *rows])
    for alert in ALERTS:
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(alert.do, 1))
        parts += [f"## {alert.name}", f"{alert.summary}. {alert.means}", steps, f"```promql\n{alert.expr}\n```"]
    return "\n\n".join(parts) + "\n"
