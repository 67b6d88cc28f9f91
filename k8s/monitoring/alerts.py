"""Alerts: when somebody should look, what it means, and what to do.

Invariant: every alert names its way out, on a machine with `rollout up` and on Kubernetes, and fires for each cluster
by itself. docs/alerts.md and the PrometheusRule are both written from here, the steps included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_BY = "sum by (ray_io_cluster) "
# What kept a share from being noise: less than this happened in the window.
_ENOUGH = 20
# Longer than a session, or "nothing has finished" means nothing. Made for sessions of minutes; see RolloutStalled.
_STALLED = "20m"
_SLOW_LOAD = "30m"
# What was seen within it is not new.
_SEEN = "1d"
# Errors of a session whose tokens could not be proved.
_UNPROVEN = 'rollout_session_errors_total{category=~"ledger|prefix|record"}'
# As k8s/monitoring/pod-monitor.yaml makes them: all our pods, and the heads' port that has our metrics.
_PODS, _FRONTS = 'up{job="rollout-cluster"}', 'up{job="rollout-cluster",endpoint="front"}'

# Words that several runbooks share. `rollout status` and `rollout down` know only what `rollout up` has started here.
_TOP = "`rollout top` (Kubernetes: with `--address http://HOST:8800`)"
_LOG = (
    "`rollout logs --component controller` (Kubernetes: `kubectl -n rollout logs -l ray.io/node-type=head -c "
    "ray-head --tail=1000`)"
)
_RESTART = (
    "`rollout down`, then `rollout up`. Kubernetes: change `args.revision` of the application `controller` and apply"
)


def _first_or_more(selector: str, window: str) -> str:
    """Counters that have grown within a window, or were born in it: these are at 1 at once, and never increase."""
    before = f"present_over_time({selector}[{_SEEN}] offset {window})"
    return f"increase({selector}[{window}]) > 0 or ({selector} > 0 unless {before})"


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
    def steps(self) -> str:
        """What to do, one numbered line each."""
        return "\n".join(f"{number}. {step}" for number, step in enumerate(self.do, 1))


ALERTS: tuple[Alert, ...] = (
    Alert(
        "RolloutMetricsMissing",
        "critical",
        # Nobody has any; or a head has none; or a cluster that had some within a day has pods, perhaps no head,
        # and none. A batch job has no gateway, and is not meant.
        f"absent(rollout_controller_ready) or group by (ray_io_cluster) ({_FRONTS} or {_PODS} and "
        f"on (ray_io_cluster) last_over_time(rollout_controller_ready[{_SEEN}])) unless on (ray_io_cluster) "
        "rollout_controller_ready",
        "5m",
        "Prometheus has no metrics of the cluster",
        "Nobody answers at the gateway's `/metrics`, or nobody asks. Nothing else can fire for it meanwhile. Without "
        "the label `ray_io_cluster` several clusters look like one, and only the loss of all is seen.",
        (
            "Ask for the address by hand: `curl http://HOST:8800/metrics`. 401 or 403: give Prometheus a key, or set "
            "`metrics.public: true`.",
            "No answer, on Kubernetes: is the head there, and what says `kubectl -n rollout get rayservice,pods`?",
            f"503: the controller is away. {_LOG}.",
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
            f"{_TOP}: are the workers there? Each needs a logical CPU: of `ray.num_cpus`, on Kubernetes of pods of "
            "the group `sessions`. Are these `Pending`?",
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
            f"What ended it? {_LOG}; `OutOfMemory` in Ray's own lines is the usual one.",
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
            "Make room on the disk of `journal.path`; on Kubernetes enlarge the claim `rollout-journal`.",
            f"{_RESTART}, or delete the head's pod. The controller reads the disk and goes on.",
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
            f"{_TOP}: which run has many groups `ready` or `leased`?",
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
            f"{_TOP}, `--once --json`: each replica has the reason of its last failure.",
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
            f"{_TOP}, `--once --json`: its name and the reason.",
            "Weights that came over the wire cannot be loaded by a replica that started later: publish a checkpoint.",
        ),
    ),
    Alert(
        "RolloutLoadingFailed",
        "critical",
        'max by (ray_io_cluster) (rollout_loading_phase{phase="failed"}) == 1',
        "2m",
        "An engine failed to load its model",
        "The error is on the loading board. Serve gives up after `engine.start_attempts` failures for each replica.",
        (
            "`curl http://HOST:8800/v1/loading/progress` ends with the message.",
            "Out of memory: lower `engine.vllm.gpu_memory_utilization` or raise `tensor_parallel_size`.",
            "Start it again: `rollout up`. Kubernetes: change `args.revision` of the application `engine` and apply.",
        ),
    ),
    Alert(
        "RolloutLoadingSlow",
        "warning",
        'max by (ray_io_cluster) (rollout_loading_phase{phase="loading"}) == 1',
        _SLOW_LOAD,
        "The engines have been loading for half an hour",
        "A slow disk or network, or a replica that cannot be scheduled. Models of 60 GB and more may take so long "
        "the first time; the deadline is `engine.start_seconds`.",
        (
            "Dashboard Overview, panel Loading: does the ratio move? Then wait; `_SLOW_LOAD` in "
            "k8s/monitoring/alerts.py may be as long as your model needs.",
            "On Kubernetes: `kubectl -n rollout get pods`. `Pending`: `kubectl describe` says what is missing.",
            "Keep the model on a volume (`HF_HOME`); on Kubernetes that is the component model-cache.",
        ),
    ),
    Alert(
        "RolloutEngineMetricsMissing",
        "warning",
        f'{_BY}(rollout_replicas{{health="healthy"}}) > 0 unless on (ray_io_cluster) ray_vllm_num_requests_running',
        "10m",
        "Engines serve, and Prometheus has no metrics of vLLM",
        "Ray's port is not scraped: on Kubernetes the port `metrics` of every pod, locally `metrics.ray_port`.",
        (
            "Add the target: docs/metrics.md has the scrape configuration, docs/kubernetes.md what Kubernetes needs.",
            "`ray_io_cluster` must be on both targets or on neither.",
        ),
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
        f"{_BY}(increase(rollout_sessions_finished_total[{_STALLED}])) == 0 unless on (ray_io_cluster) "
        f"{_BY}(rollout_runs_held) > 0",
        "10m",
        "There is work, nothing holds it, and nothing finishes",
        "Sessions hang in an engine, in a tool or in an environment, or no worker takes them. Where sessions "
        f"take more than {_STALLED} and ten minutes, it fires without trouble while the first ones are played: "
        "`limits.session_seconds` allows 5400 in configs/qwen2.5-72b.yaml and 7200 in configs/gpt-oss-120b.yaml.",
        (
            "Do sessions take so long by right? Then make `_STALLED` in k8s/monitoring/alerts.py longer than they "
            "are, run `python -m k8s.monitoring.generate` and apply.",
            "Dashboard Sessions and tools: does the engine or a tool take the time?",
            f"Dashboard Engines: do requests run? If none does, {_TOP} for the workers.",
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
        # The first such event counts, also where its series begins with it.
        f"{_BY}({_first_or_more(_UNPROVEN, '15m')}) > 0",
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
            f"The answer to the trainer's call names each replica and the reason. So does {_TOP}, `--once --json`.",
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
            # The steps themselves: whoever is woken has the message, and perhaps not this repository.
            "annotations": {"summary": alert.summary, "description": alert.means, "runbook": alert.steps},
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
        "are k8s/monitoring/prometheus-rule.yaml, and carry these steps as the annotation `runbook`.",
        "On Kubernetes HOST:8800 is the Service `rollout`; from your machine `kubectl -n rollout port-forward "
        "service/rollout 8800`, then 127.0.0.1:8800. `rollout top` wants a key with the scope `trainer` in "
        "`ROLLOUT_API_KEY`. Applications and their `args.revision` are in serveConfigV2: "
        "[kubernetes.md](kubernetes.md#change). There `rollout status`, `down` and `up` know nothing of the cluster.",
        "| alert | severity | after | |",
    ]
    rows = ["|---|---|---|---|"]
    rows += [
        f"| [{alert.name}](#{alert.name.lower()}) | {alert.severity} | {alert.lasts} | {alert.summary} |"
        for alert in ALERTS
    ]
    parts[-1] = "\n".join([parts[-1], *rows])
    for alert in ALERTS:
        parts += [f"## {alert.name}", f"{alert.summary}. {alert.means}", alert.steps, f"```promql\n{alert.expr}\n```"]
    return "\n\n".join(parts) + "\n"
