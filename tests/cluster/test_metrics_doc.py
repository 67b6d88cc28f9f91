"""docs/metrics.md is what the catalogue says."""

from __future__ import annotations

from cluster.metrics_doc import PAGE, page
from rollout.metrics_catalogue import CATALOGUE


def test_the_page_has_not_drifted():
    assert PAGE.read_text() == page(), "run `python -m cluster.metrics_doc`"


def test_every_metric_is_on_it():
    text = page()
    assert [name for name in CATALOGUE if f"| `{name}` |" not in text] == []
