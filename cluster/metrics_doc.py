"""Writes docs/metrics.md from the catalogue: `python -m cluster.metrics_doc`.

Invariant: the page is what this writes; a test compares them, so that it cannot drift.
"""

from __future__ import annotations

from pathlib import Path

from rollout.metrics_catalogue import LABELS, OTHER, SECTIONS, Metric, label, label_names

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_HEAD = f"""# Metrics

Written by `python -m cluster.metrics_doc` from rollout/metrics_catalogue.py; change it there.

## Where they are

| address | what | on Kubernetes |
|---|---|---|
| the gateway's `/metrics` | everything on this page | the head pod, port 8800 |
| Ray's metrics port | `ray_vllm_*`, `ray_serve_*`, `ray_node_*` | every pod, port `metrics` (8080) |

Scrape the gateway at one address. Every gateway gives the same answer, the controller's; two of them as two targets
would count everything twice. The answer is made at most once a second.

Where there are keys, any of them may read `/metrics`, whichever its scope; `metrics.public: true` opens it. Ray's
port has no keys. `rollout up` puts it on loopback: at `metrics.ray_port`, else at a free port, which
`rollout status --json` names as `ray_metrics`.

```yaml
scrape_configs:
  - job_name: rollout
    static_configs: [{{targets: ["127.0.0.1:8800"]}}]
    # authorization: {{credentials_file: /path/to/key}}
  - job_name: ray
    static_configs: [{{targets: ["127.0.0.1:8080"]}}]  # metrics.ray_port: 8080
```

Dashboards and alerts are in k8s/monitoring; what the alerts mean is in [alerts.md](alerts.md).

## How they count

- Counters begin at 0 with the controller's process, and Prometheus takes care of that. What a controller that died
  had counted is not counted again: trajectories that are read back from the journal were in Prometheus before.
- A trajectory is counted when it is in the journal and belongs to its group, a batch when its acknowledgement is.
  What nobody wanted (attempts that were lost, samples beyond `target_groups`) is not among the sessions.
- A label with names from outside has a bound: further ones are counted as `{OTHER}`.
- The series of a run stay for a while when it is forgotten, until another run needs their place.
- Engines tell Ray vLLM's figures every two seconds, and Ray hands them on every ten. Histograms have their usual
  names (`_bucket` with `le`, `_sum`, `_count`) and exact sums; the type that Ray writes beside them is `gauge`.
- vLLM's own `vllm:rl_weight_update_*` are of an API that is not used here; `rollout_weight_*` are in their place.
"""


def page() -> str:
    """The page's text."""
    parts = [_HEAD.rstrip()]
    for section, metrics in SECTIONS.items():
        rows = ["| metric | kind | labels | |", "|---|---|---|---|", *map(_row, metrics)]
        parts += [f"## {section}", "\n".join(rows)]
    used = {
        written.rpartition("=")[2]: None for metrics in SECTIONS.values() for m in metrics for written in m.labels
    }
    rows = ["| label | values | |", "|---|---|---|", *map(_label_row, used)]
    parts += ["## Labels", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _row(metric: Metric) -> str:
    names = ", ".join(
        f"`{name}`" if label(metric, name) is LABELS.get(name) else f"`{name}` ({written.partition('=')[2]})"
        for name, written in zip(label_names(metric), metric.labels, strict=True)
    )
    buckets = f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}." if metric.buckets else ""
    return f"| `{metric.name}` | {metric.kind} | {names} | {metric.help}{buckets} |"


def _label_row(name: str) -> str:
    found = LABELS[name]
    values = ", ".join(f"`{value}`" for value in found.at_birth)
    if not found.values:
        bound = f"at most {found.limit}, " + (f"then `{OTHER}`" if found.summed else "the rest have no series")
        values = f"{values} and others: {bound}" if values else bound
    return f"| {name} | {values} | {found.help} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE.name)


if __name__ == "__main__":
    main()
