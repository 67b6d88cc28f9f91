"""The engines, by the metrics of vLLM, Ray Serve and Ray."""

from __future__ import annotations

from k8s.monitoring.queries import (
    CLUSTER,
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

_HIT_RATE = (
    f"{rate('ray_vllm_prefix_cache_hits_total', ['ReplicaId'])} / "
    f"{rate('ray_vllm_prefix_cache_queries_total', ['ReplicaId'])}"
)

ENGINES = Dashboard(
    "engines",
    "Rollout: engines",
    "vLLM's, Ray Serve's and Ray's own metrics.",
    (
        Row(
            "Are the engines busy, or does work wait for them?",
            (
                Panel(
                    "Requests that run",
                    "By replica.",
                    (Query(total("ray_vllm_num_requests_running", ["ReplicaId"]), "{{ReplicaId}}"),),
                ),
                Panel(
                    "Requests that wait",
                    "In the engine's own queue: engine.vllm.max_num_seqs, or no keys and values left.",
                    (Query(total("ray_vllm_num_requests_waiting", ["ReplicaId"]), "{{ReplicaId}}"),),
                ),
                Panel(
                    "Use of the key-value cache",
                    "Near 1, requests are preempted.",
                    (Query(f"max by (ReplicaId) (ray_vllm_kv_cache_usage_perc{{{CLUSTER}}})", "{{ReplicaId}}"),),
                    unit="percentunit",
                ),
                Panel(
                    "Asleep",
                    "1 for the state that an engine is in.",
                    (
                        Query(
                            f"max by (ReplicaId, sleep_state) (ray_vllm_engine_sleep_state{{{CLUSTER}}})",
                            "{{ReplicaId}} {{sleep_state}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "How fast do they generate?",
            (
                Panel(
                    "Tokens per second",
                    "Of all replicas.",
                    (
                        Query(rate("ray_vllm_generation_tokens_total"), "generated"),
                        Query(rate("ray_vllm_prompt_tokens_total"), "prompt"),
                    ),
                ),
                Panel(
                    "Generated tokens per second and replica",
                    "One that falls behind the others is the slow one.",
                    (Query(rate("ray_vllm_generation_tokens_total", ["ReplicaId"]), "{{ReplicaId}}"),),
                ),
                Panel(
                    "Time to the first token",
                    "From the request's arrival.",
                    quantiles("ray_vllm_time_to_first_token_seconds"),
                    unit="s",
                ),
                Panel(
                    "Time between tokens",
                    "Of one request.",
                    quantiles("ray_vllm_inter_token_latency_seconds"),
                    unit="s",
                ),
                Panel(
                    "Time in the engine's queue",
                    "Before the first step.",
                    quantiles("ray_vllm_request_queue_time_seconds"),
                    unit="s",
                ),
            ),
        ),
        Row(
            "Do turns find their prefix again?",
            (
                Panel(
                    "Hits of the prefix cache",
                    "Share of prompt tokens. Sessions stay with the replica that has their prefix; it starts anew "
                    "with each version of the weights.",
                    (Query(_HIT_RATE, "{{ReplicaId}}"),),
                    unit="percentunit",
                ),
                Panel(
                    "Preemptions",
                    "Requests that lost their keys and values and are computed again.",
                    (Query(or_zero(increase("ray_vllm_num_preemptions_total", ["ReplicaId"])), "{{ReplicaId}}"),),
                ),
            ),
        ),
        Row(
            "Does Serve see them as healthy?",
            (
                Panel(
                    "Healthy replicas",
                    "By deployment.",
                    (Query(total("ray_serve_deployment_replica_healthy", ["deployment"]), "{{deployment}}"),),
                ),
                Panel(
                    "State of deployments",
                    "6 is healthy; 1 failed to deploy, 2 unhealthy, 3 updating, 4 and 5 scaling.",
                    (Query(f"min by (deployment) (ray_serve_deployment_status{{{CLUSTER}}})", "{{deployment}}"),),
                ),
                Panel(
                    "Calls per second",
                    "By deployment. The engines' lanes are few long calls; `engine` counts them, not turns.",
                    (Query(rate("ray_serve_deployment_request_counter_total", ["deployment"]), "{{deployment}}"),),
                    unit="ops",
                ),
                Panel(
                    "Failed calls per second",
                    "Exceptions that replicas raised.",
                    (
                        Query(
                            or_zero(rate("ray_serve_deployment_error_counter_total", ["deployment"])),
                            "{{deployment}}",
                        ),
                    ),
                    unit="ops",
                ),
                Panel(
                    "Calls that replicas hold, and that wait for one",
                    "By deployment.",
                    (
                        Query(total("ray_serve_replica_processing_queries", ["deployment"]), "held: {{deployment}}"),
                        Query(total("ray_serve_deployment_queued_queries", ["deployment"]), "queued: {{deployment}}"),
                    ),
                ),
                Panel(
                    "95th percentile of a call",
                    "By deployment.",
                    (
                        Query(
                            quantile(0.95, "ray_serve_deployment_processing_latency_ms", ["deployment"]),
                            "{{deployment}}",
                        ),
                    ),
                    unit="ms",
                ),
            ),
        ),
        Row(
            "How does the gateway answer?",
            (
                Panel(
                    "HTTP requests per second",
                    "Through Serve's proxy: the gateway's. OpenAI's paths go to the engines without it.",
                    (
                        Query(rate("ray_serve_num_http_requests_total"), "all"),
                        Query(or_zero(rate("ray_serve_num_http_error_requests_total")), "errors"),
                    ),
                    unit="reqps",
                ),
                Panel(
                    "Latency",
                    "Long polls for batches are among them.",
                    quantiles("ray_serve_http_request_latency_ms"),
                    unit="ms",
                ),
            ),
        ),
        Row(
            "Is the machine the limit?",
            (
                Panel(
                    "CPU",
                    "Percent, by node.",
                    (Query(f"avg by (instance) (ray_node_cpu_utilization{{{CLUSTER}}})", "{{instance}}"),),
                    unit="percent",
                ),
                Panel(
                    "Memory",
                    "Share in use, by node.",
                    (
                        Query(
                            f"{total('ray_node_mem_used_host', ['instance'])} / "
                            f"{total('ray_node_mem_total_host', ['instance'])}",
                            "{{instance}}",
                        ),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    "GPU",
                    "Percent, by node and GPU.",
                    (
                        Query(
                            f"avg by (instance, GpuIndex) (ray_node_gpus_utilization{{{CLUSTER}}})",
                            "{{instance}} {{GpuIndex}}",
                        ),
                    ),
                    unit="percent",
                ),
                Panel(
                    "GPU memory",
                    "MB in use, by node and GPU.",
                    (Query(total("ray_node_gram_used", ["instance", "GpuIndex"]), "{{instance}} {{GpuIndex}}"),),
                    unit="decmbytes",
                ),
                Panel(
                    "Ray's object store",
                    "By where objects lie. Batches pass through it.",
                    (Query(total("ray_object_store_memory", ["Location"]), "{{Location}}"),),
                    unit="bytes",
                ),
                Panel(
                    "Actors",
                    "By state.",
                    (Query(total("ray_actors", ["State"]), "{{State}}"),),
                ),
            ),
        ),
    ),
)
