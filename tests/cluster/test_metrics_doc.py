"""docs/metrics.md is what the catalogue says."""

from __future__ import annotations

from cluster.metrics_doc import PAGE, page
from rollout.metrics_catalogue import CATALOGUE


def test_the_page_has_not_drifted():
    assert PAGE.read_text() == page(), "run `python -m cluster.metrics_doc`"


def test_every_metric_is_on_it():
    text = page()
    assert [name for name in CATALOGUE if f"| `{name}` |" not in text] == []


def test_a_label_says_its_bound_and_what_is_beyond_it():
    text = page()
    assert "| replica | at most 1024, the rest have no series |" in text
    assert "| run | at most 64, then `other` |" in text
    assert "| replace_reason | `failed`, `stale` and others: at most 32, then `other` |" in text
