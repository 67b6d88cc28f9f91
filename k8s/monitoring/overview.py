"""Whether the cluster works, how much it produces, and what stands in the way."""

from __future__ import annotations

from k8s.monitoring.queries import (
    CLUSTER,
    RUN,
    Dashboard,
    Panel,
    Query,
    Row,
    increase,
    or_zero,
    rate,
    total,
)

_TOKENS = "rollout_tokens_total"
_OUT = f'{RUN},direction="out"'
_FINISHED = "rollout_sessions_finished_total"

OVERVIEW = Dashboard(
    "overview",
    "Rollout: overview",
    "Whether the cluster works, how much it produces, and what stands in the way.",
    (
        Row(
            "Can the cluster take work?",
            (
                Panel(
                    "Controller",
                    "1 when it takes work. It is started again from its journal when it dies.",
                    (Query(f"min(rollout_controller_ready{{{CLUSTER}}})"),),
                    kind="stat",
                    red_below=1,
                ),
                Panel(
                    "Healthy replicas",
                    "Engine replicas that carry the current weights.",
                    (Query(total("rollout_replicas", where=f'{CLUSTER},health="healthy"')),),
                    kind="stat",
                    red_below=1,
                ),
                Panel(
                    "Session workers",
                    "Workers that answer.",
                    (Query(total("rollout_workers")),),
                    kind="stat",
                    red_below=1,
                ),
                Panel(
                    "Journal failures",
                    "1: nothing is accepted until a restart reads the disk.",
                    (Query(f"max(rollout_journal_failed{{{CLUSTER}}})"),),
                    kind="stat",
                    red_from=1,
                ),
                Panel(
                    "Replicas by health of their weights",
                    "stale: lives with other weights and gets no sessions; suspect: did not answer.",
                    (Query(total("rollout_replicas", ["health"]), "{{health}}"),),
                    stacked=True,
                ),
                Panel(
                    "Loading",
                    "Replicas that are ready, of those that must be; and how far those are that load.",
                    (
                        Query(total("rollout_loading_replicas_ready"), "ready"),
                        Query(total("rollout_loading_replicas_expected"), "expected"),
                        Query(f"max by (replica) (rollout_loading_ratio{{{CLUSTER}}})", "{{replica}}"),
                    ),
                ),
            ),
        ),
        Row(
            "How much does it produce?",
            (
                Panel(
                    "Sampled tokens per second",
                    "Of finished trajectories: it comes in steps where sessions are long.",
                    (Query(rate(_TOKENS, ["run"], _OUT), "{{run}}"),),
                    stacked=True,
                ),
                Panel(
                    "Finished sessions per second",
                    "By what ended them.",
                    (Query(rate(_FINISHED, ["stop_reason"], RUN), "{{stop_reason}}"),),
                    unit="ops",
                    stacked=True,
                ),
                Panel(
                    "Groups delivered per second",
                    "Acknowledged by trainers.",
                    (Query(rate("rollout_groups_delivered_total", ["run"], RUN), "{{run}}"),),
                    unit="ops",
                ),
                Panel(
                    "Mean reward",
                    "Of the newest scored sessions of each run.",
                    (Query(f"avg by (run) (rollout_reward_mean{{{RUN}}})", "{{run}}"),),
                    from_zero=False,
                ),
            ),
        ),
        Row(
            "What waits, and for what?",
            (
                Panel(
                    "Groups",
                    "waiting: for a worker or the staleness bound; ready: for a trainer; leased: held by one.",
                    (Query(total("rollout_groups", ["state"], RUN), "{{state}}"),),
                    stacked=True,
                ),
                Panel(
                    "Sessions",
                    "queued: samples that wait for a worker; running: held by one.",
                    (Query(total("rollout_sessions", ["state"], RUN), "{{state}}"),),
                    stacked=True,
                ),
                Panel(
                    "Runs that are held",
                    "staleness: a weight update frees them; memory: batches must be acknowledged first.",
                    (Query(total("rollout_runs_held", ["reason"]), "{{reason}}"),),
                ),
                Panel(
                    "Finished trajectories in memory",
                    "What trainers have not acknowledged. New sessions are held back at 4 GiB.",
                    (Query(total("rollout_finished_rows_bytes")),),
                    unit="bytes",
                ),
            ),
        ),
        Row(
            "What went wrong?",
            (
                Panel(
                    "Deaths",
                    "replica: Serve lists it no longer, scale-downs included.",
                    (Query(increase("rollout_deaths_total", ["kind"]), "{{kind}}"),),
                ),
                Panel(
                    "Work that was done again",
                    "session: an attempt was lost; turn: sent again, as its replica died.",
                    (Query(increase("rollout_retries_total", ["kind"]), "{{kind}}"),),
                ),
                Panel(
                    "Trajectories with an error",
                    "By the first word of the error; see docs/record.md.",
                    (Query(or_zero(increase("rollout_session_errors_total", ["category"])), "{{category}}"),),
                ),
                Panel(
                    "Batches",
                    "expired: a trainer did not acknowledge in time, and its groups go to the next one.",
                    (Query(increase("rollout_lease_events_total", ["event"]), "{{event}}"),),
                ),
            ),
        ),
        Row(
            "Does the controller keep up?",
            (
                Panel(
                    "Event-loop lag",
                    "99th percentile of the last minute. Above 50 ms, add workers.",
                    (
                        Query(
                            f'max by (process) (rollout_event_loop_lag_seconds{{{CLUSTER},quantile="0.99"}})',
                            "{{process}}",
                        ),
                    ),
                    unit="s",
                ),
                Panel(
                    "Journal on disk",
                    "Grows with what waits, not with what was done.",
                    (Query(total("rollout_journal_bytes")),),
                    unit="bytes",
                ),
                Panel(
                    "Journal",
                    "Many writes for each commit are many that waited for one sync to disk.",
                    (
                        Query(rate("rollout_journal_writes_total"), "writes"),
                        Query(rate("rollout_journal_commits_total"), "commits"),
                    ),
                    unit="ops",
                ),
                Panel(
                    "Restarts of the controller",
                    "Within the time shown.",
                    (Query(f"sum(changes(rollout_controller_start_time_seconds{{{CLUSTER}}}[1h]))"),),
                    kind="stat",
                    red_from=1,
                ),
            ),
        ),
    ),
)
