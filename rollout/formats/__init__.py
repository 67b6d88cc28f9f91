"""The record as trainers take it: pure functions from a table of the record to verl, SkyRL, slime, TRL and datasets.

Importing this loads none of them. What each does with forks, failures and missing rewards is in docs/formats.md.
"""

from rollout.formats.datasets import to_hf_dataset
from rollout.formats.skyrl import to_skyrl
from rollout.formats.slime import to_slime
from rollout.formats.trl import to_trl
from rollout.formats.verl import VerlBatch, to_verl

__all__ = ["VerlBatch", "to_hf_dataset", "to_skyrl", "to_slime", "to_trl", "to_verl"]
