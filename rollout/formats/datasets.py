"""The record as a Hugging Face dataset, column by column. Its file format is Parquet anyway: see trajectory_file."""

from __future__ import annotations

import importlib
from typing import Any

import pyarrow as pa

from rollout.formats.rows import FormatError
from rollout.record import check


def to_hf_dataset(table: pa.Table) -> Any:
    """A `datasets.Dataset` over the same memory. Raises FormatError where `datasets` is not installed."""
    check(table)
    try:
        dataset = importlib.import_module("datasets").Dataset
    except ImportError:
        raise FormatError("the package `datasets` is not installed; pip install datasets") from None
    return dataset(table)
