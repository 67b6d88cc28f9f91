"""What a trainer should look at before its loss."""

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
    quantile,
    quantiles,
    rate,
    total,
)

_FINISHED = "rollout_sessions_finished_total"
_SESSIONS = rate(_FINISHED, ["run"], RUN)
_FORKS = rate("rollout_forks_total", ["run"], RUN)
_STALENESS = (
    f"{rate('rollout_delivered_staleness_versions_total', ['run'], RUN)} / "
    f"{rate('rollout_delivered_tokens_total', ['run'], RUN)}"
)

TRAINING = Dashboard(
    "training",
    "Rollout: training health",
    "What a trainer should look at before its loss: rewards, staleness, weights, drift.",
    (
        Row(
            "Does the policy get better?",
            (
                Panel(
                    "Mean reward",
                    "Of the newest 256 scored sessions of each run.",
                    (Query(f"avg by (run) (rollout_reward_mean{{{RUN}}})", "{{run}}"),),
                    from_zero=False,
                ),
                Panel(
                    "Distribution of rewards",
                    "Two bands are a policy that either solves a task or does not.",
                    (Query(increase("rollout_reward_bucket", ["le"], RUN), "{{le}}"),),
                    kind="heatmap",
                ),
                Panel(
                    "Sessions without a reward",
                    "Share: errors, cancellations, environments that do not score.",
                    (
                        Query(
                            f"1 - {rate('rollout_reward_count', ['run'], RUN)} / {rate(_FINISHED, ['run'], RUN)}",
                            "{{run}}",
                        ),
                    ),
                    unit="percentunit",
                ),
            ),
        ),
        Row(
            "Are the groups worth training on?",
            (
                Panel(
                    "Groups that are dropped",
                    "zero_variance: all rewards equal; truncated; surplus; or your own filter's reason.",
                    (Query(or_zero(increase("rollout_groups_dropped_total", ["reason"], RUN)), "{{reason}}"),),
                    stacked=True,
                ),
                Panel(
                    "Groups that are played again",
                    "stale: too old for the bound; failed: a member died.",
                    (Query(or_zero(increase("rollout_groups_replaced_total", ["reason"], RUN)), "{{reason}}"),),
                    stacked=True,
                ),
                Panel(
                    "Groups that are delivered",
                    "Per second.",
                    (Query(rate("rollout_groups_delivered_total", ["run"], RUN), "{{run}}"),),
                    unit="ops",
                ),
            ),
        ),
        Row(
            "How old are the tokens that are trained on?",
            (
                Panel(
                    "Mean staleness",
                    "Versions between a token and the batch that carried it, over delivered tokens.",
                    (Query(_STALENESS, "{{run}}"),),
                ),
                Panel(
                    "Delivered tokens by staleness",
                    "Per second.",
                    (Query(rate("rollout_delivered_tokens_total", ["staleness"], RUN), "{{staleness}}"),),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Do all engines carry the same weights?",
            (
                Panel(
                    "Version by replica",
                    "Lines that part are replicas that did not take an update; they get no sessions.",
                    (
                        Query(f"max by (replica) (rollout_replica_weight_version{{{CLUSTER}}})", "{{replica}}"),
                        Query(f"max(rollout_weight_version{{{CLUSTER}}})", "current"),
                    ),
                ),
                Panel(
                    "Updates",
                    "partial: some replicas did not take it; refused: it did not fit; failed: none took it.",
                    (
                        Query(increase("rollout_weight_updates_total", ["outcome"]), "{{outcome}}"),
                        Query(increase("rollout_weight_replica_failures_total"), "replicas that failed"),
                    ),
                ),
                Panel(
                    "Duration of an update",
                    "From the trainer's request to the last replica.",
                    quantiles("rollout_weight_update_seconds"),
                    unit="s",
                ),
                Panel(
                    "What it costs a replica",
                    "95th percentile: how long generation stood still; of that, loading and reading back.",
                    (Query(quantile(0.95, "rollout_weight_replica_seconds", ["step"]), "{{step}}"),),
                    unit="s",
                ),
            ),
        ),
        Row(
            "Do tokens drift?",
            (
                Panel(
                    "Forks",
                    "Segments begun because a history could not be extended token by token, by the reason given.",
                    (Query(or_zero(increase("rollout_forks_total", ["reason"], RUN)), "{{reason}}"),),
                    stacked=True,
                ),
                Panel(
                    "Forks per session",
                    "Above 0, training sees prompts that were rendered anew; see docs/concepts.md.",
                    (
                        # A run without forks has no series of them: its sessions times 0 stand in.
                        Query(f"({_FORKS} or {_SESSIONS} * 0) / {_SESSIONS}", "{{run}}"),
                    ),
                ),
                Panel(
                    "Sessions that the ledger refused",
                    "Tokens, log-probabilities or versions that did not fit together. Must be 0.",
                    (
                        Query(
                            or_zero(
                                "sum(increase(rollout_session_errors_total"
                                f'{{{CLUSTER},category=~"ledger|prefix|record"}}[$__rate_interval]))'
                            )
                        ),
                    ),
                    kind="stat",
                    red_from=1,
                ),
            ),
        ),
        Row(
            "Does the trainer keep up?",
            (
                Panel(
                    "Groups that wait for the trainer",
                    "ready: nobody has leased them; leased: not acknowledged yet.",
                    (
                        Query(
                            total("rollout_groups", ["run", "state"], f'{RUN},state=~"ready|leased"'),
                            "{{run}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    "Batches held",
                    "By trainers.",
                    (Query(total("rollout_leases_open")),),
                ),
                Panel(
                    "What happens to batches",
                    "expired: longer than its ttl. Train faster, extend leases, or ask for a longer ttl.",
                    (Query(increase("rollout_lease_events_total", ["event"]), "{{event}}"),),
                ),
            ),
        ),
    ),
)
