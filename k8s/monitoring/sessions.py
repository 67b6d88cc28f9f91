"""What sessions do with their time, how they end, and what their tools answer."""

from __future__ import annotations

from k8s.monitoring.queries import (
    CLUSTER,
    RUN,
    Dashboard,
    Panel,
    Query,
    Row,
    quantile,
    quantiles,
    rate,
    total,
)

_TOKENS = "rollout_tokens_total"
_FINISHED = "rollout_sessions_finished_total"
_TRUNCATED = f'{RUN},stop_reason=~"length|max_tokens|max_turns|deadline"'

SESSIONS = Dashboard(
    "sessions",
    "Rollout: sessions and tools",
    "What sessions do with their time, how they end, and what their tools answer.",
    (
        Row(
            "Why do sessions end?",
            (
                Panel(
                    "Endings",
                    "Share of each stop reason.",
                    (
                        Query(
                            f"{rate(_FINISHED, ['stop_reason'], RUN)} / ignoring(stop_reason) group_left() "
                            f"{rate(_FINISHED, [], RUN)}",
                            "{{stop_reason}}",
                        ),
                    ),
                    unit="percentunit",
                    stacked=True,
                ),
                Panel(
                    "Share that was cut",
                    "By length, tokens, turns or time. High: raise the limits, or the policy rambles.",
                    (Query(f"{rate(_FINISHED, ['run'], _TRUNCATED)} / {rate(_FINISHED, ['run'], RUN)}", "{{run}}"),),
                    unit="percentunit",
                ),
            ),
        ),
        Row(
            "Where does the time of a session go?",
            (
                Panel(
                    "Mean seconds by part",
                    "What is left of the total went to rendering and parsing.",
                    (
                        Query(
                            f"{rate('rollout_session_seconds_sum', ['part'])} / "
                            f"{rate('rollout_session_seconds_count', ['part'])}",
                            "{{part}}",
                        ),
                    ),
                    unit="s",
                ),
                Panel(
                    "95th percentile by part",
                    "queue: a full cluster, or the staleness bound; engine: vLLM; tool: your tools.",
                    (Query(quantile(0.95, "rollout_session_seconds", ["part"]), "{{part}}"),),
                    unit="s",
                ),
                Panel(
                    "Duration of sessions",
                    "From start to end.",
                    quantiles("rollout_session_seconds", (0.5, 0.9, 0.99), where=f'{CLUSTER},part="total"'),
                    unit="s",
                ),
            ),
        ),
        Row(
            "How long are they?",
            (
                Panel(
                    "Turns per session",
                    "Mean.",
                    (
                        Query(
                            f"{rate('rollout_turns_total', ['run'], RUN)} / {rate(_FINISHED, ['run'], RUN)}",
                            "{{run}}",
                        ),
                    ),
                ),
                Panel(
                    "Tokens per session",
                    "in: prompts and tool results; out: sampled.",
                    (
                        Query(
                            f"{rate(_TOKENS, ['direction'], RUN)} / ignoring(direction) group_left() "
                            f"{rate(_FINISHED, [], RUN)}",
                            "{{direction}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Which tools are slow, and which fail?",
            (
                Panel(
                    "Calls per second",
                    "`unknown`: the model called a tool that there is not, or wrote no readable call.",
                    (Query(rate("rollout_tool_calls_total", ["tool"]), "{{tool}}"),),
                    unit="ops",
                    stacked=True,
                ),
                Panel(
                    "Share of calls that fail",
                    "Of all outcomes but ok.",
                    (
                        Query(
                            f'1 - sum by (tool) (rate(rollout_tool_calls_total{{{CLUSTER},outcome="ok"}}'
                            f"[$__rate_interval])) / {rate('rollout_tool_calls_total', ['tool'])}",
                            "{{tool}}",
                        ),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    "What calls come to",
                    "timeout: limits.tool_seconds; invalid_arguments: they did not fit the tool's schema.",
                    (Query(rate("rollout_tool_calls_total", ["outcome"]), "{{outcome}}"),),
                    unit="ops",
                    stacked=True,
                ),
                Panel(
                    "95th percentile of a call",
                    "Seconds by tool.",
                    (Query(quantile(0.95, "rollout_tool_call_seconds", ["tool"]), "{{tool}}"),),
                    unit="s",
                ),
            ),
        ),
        Row(
            "Are the workers balanced?",
            (
                Panel(
                    "Sessions held",
                    "By worker.",
                    (Query(total("rollout_worker_sessions", ["worker"]), "{{worker}}"),),
                ),
                Panel(
                    "Memory",
                    "Resident, by worker.",
                    (Query(total("rollout_worker_memory_bytes", ["worker"]), "{{worker}}"),),
                    unit="bytes",
                ),
                Panel(
                    "Tools that never came back",
                    "Threads of synchronous tools past their deadline. A worker refuses calls at 256.",
                    (Query(total("rollout_worker_abandoned_threads", ["worker"]), "{{worker}}"),),
                ),
            ),
        ),
        Row(
            "What do agents and trainers of others do?",
            (
                Panel(
                    "Captured sessions",
                    "Black-box agents that play samples through an address of their own.",
                    (Query(total("rollout_capture_sessions", ["state"]), "{{state}}"),),
                ),
                Panel(
                    "Their requests",
                    "lost: the replica died before it could report the tokens.",
                    (Query(rate("rollout_capture_requests_total", ["outcome"]), "{{outcome}}"),),
                    unit="ops",
                ),
                Panel(
                    "Rollouts for foreign trainers",
                    "unreported: played, and their trainer does not know yet.",
                    (Query(total("rollout_remote_rollouts", ["state"]), "{{state}}"),),
                ),
                Panel(
                    "How they end",
                    "And those that were not accepted.",
                    (
                        Query(rate("rollout_remote_finished_total", ["outcome"]), "{{outcome}}"),
                        Query(rate("rollout_remote_refused_total", ["reason"]), "refused: {{reason}}"),
                    ),
                    unit="ops",
                ),
            ),
        ),
        Row(
            "What do remote rollout servers do with our sessions?",
            (
                Panel(
                    "Sessions that they play",
                    "Runs with environment.remote. At a server that stalls they pile up.",
                    (Query(total("rollout_foreign_rollouts"), "out"),),
                ),
                Panel(
                    "How their attempts end",
                    "remote: refused or reported as failed; remote_died: not reached, or gone. And calls refused.",
                    (
                        Query(rate("rollout_foreign_finished_total", ["outcome"]), "{{outcome}}"),
                        Query(rate("rollout_foreign_refused_total", ["reason"]), "call refused: {{reason}}"),
                    ),
                    unit="ops",
                ),
                Panel(
                    "Duration of an attempt",
                    "From start to end, whatever the end.",
                    quantiles("rollout_foreign_seconds"),
                    unit="s",
                ),
            ),
        ),
    ),
)
