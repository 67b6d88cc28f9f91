"""Writes Grafana's dashboards, the PrometheusRule and docs/alerts.md: `python -m k8s.monitoring.generate`.

Invariant: the files in the repository are what this writes; a test compares them byte for byte. Needs the extra
[dev]: grafana-foundation-sdk has a release for each release of Grafana, and each writes other files (SDK_RELEASE).
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from k8s.monitoring import alerts
from k8s.monitoring.boards import DASHBOARDS
from k8s.monitoring.queries import Dashboard, Panel

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path("k8s/monitoring")
# Grafana's grid is 24 wide.
WIDTH, HEIGHT = 8, 8
STAT_WIDTH, STAT_HEIGHT = 6, 4
SOURCE = "${datasource}"
# Of Grafana: its dashboards load into this release and later ones.
SDK_RELEASE = "11.6.0"
_HEAD = "# Written by `python -m k8s.monitoring.generate`; change k8s/monitoring/alerts.py instead.\n"


def files() -> dict[Path, str]:
    """What there is to write, by path from the repository's root."""
    found = {
        FOLDER / "prometheus-rule.yaml": _HEAD + yaml.safe_dump(alerts.prometheus_rule(), sort_keys=False, width=100),
        Path("docs/alerts.md"): alerts.runbook(),
    }
    for dashboard in DASHBOARDS:
        found[FOLDER / "dashboards" / f"{dashboard.name}.json"] = to_json(dashboard)
    return found


def to_json(dashboard: Dashboard) -> str:
    """A dashboard as Grafana imports it."""
    return json.dumps(build(dashboard).build(), cls=JSONEncoder, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def build(dashboard: Dashboard) -> grafana.Dashboard:
    """A dashboard in Grafana's terms."""
    builder = (
        grafana.Dashboard(dashboard.title)
        .uid(f"rollout-{dashboard.name}")
        .description(dashboard.help)
        .tags(["rollout-cluster"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(grafana.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_choice("cluster", "Cluster", "label_values(rollout_controller_ready, ray_io_cluster)"))
        .with_variable(_choice("run", "Run", "label_values(rollout_groups, run)"))
    )
    number = 0
    for row in dashboard.rows:
        builder.with_row(grafana.Row(row.question))
        for panel in row.panels:
            number += 1
            builder.with_panel(_panel(panel, number))
    return builder


def _choice(name: str, label: str, query: str) -> grafana.QueryVariable:
    return (
        grafana.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(_source())
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        # Also where the label is missing, as on a cluster without an operator.
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, number: int) -> Any:
    builder: Any
    if panel.kind == "stat":
        builder = stat.Panel().span(STAT_WIDTH).height(STAT_HEIGHT).thresholds(_thresholds(panel))
    elif panel.kind == "heatmap":
        builder = heatmap.Panel().span(WIDTH).height(HEIGHT)
    else:
        builder = (
            timeseries.Panel()
            .span(WIDTH)
            .height(HEIGHT)
            .fill_opacity(20 if panel.stacked else 0)
            .show_points(common.VisibilityMode.NEVER)
            .legend(
                common_builder.VizLegendOptions()
                .display_mode(common.LegendDisplayMode.LIST)
                .placement(common.LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(
                common_builder.VizTooltipOptions()
                .mode(common.TooltipDisplayMode.MULTI)
                .sort(common.SortOrder.DESCENDING)
            )
        )
        if panel.from_zero:
            builder.min(0)
        if panel.stacked:
            builder.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    builder.id(number).title(panel.title).description(panel.help).unit(panel.unit).datasource(_source())
    for letter, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend or panel.title)
        if panel.kind == "heatmap":
            target.format(PromQueryFormat.HEATMAP)
        builder.with_target(target)
    return builder


def _thresholds(panel: Panel) -> grafana.ThresholdsConfig:
    steps = [model.Threshold(value=None, color="green")]
    if panel.red_below is not None:
        steps = [model.Threshold(value=None, color="red"), model.Threshold(value=panel.red_below, color="green")]
    if panel.red_from is not None:
        steps.append(model.Threshold(value=panel.red_from, color="red"))
    return grafana.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _source() -> model.DataSourceRef:
    return model.DataSourceRef(type_val="prometheus", uid=SOURCE)


def main() -> None:
    """Write all files."""
    for path, text in files().items():
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
