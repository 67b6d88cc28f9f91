"""The record is right, not merely consistent: log-probabilities recomputed by another implementation.

transformers runs the model over prompt_ids + response_ids of multi-turn trajectories; where the mask is 1 its
log-probabilities must be the recorded ones, up to bf16. One token of drift, or a mask off by one, would not pass.
"""

from __future__ import annotations

import pytest
import torch

from rollout.sampling import Sampling
from tests.conftest import MODEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]

# bf16 has 8 bits of mantissa: logits of about 10 carry errors of about 0.04, and single tokens more. Most tokens of
# this model are nearly certain, so the mean is far smaller (0.001 was seen); a mask off by one gave 0.17.
MEAN_TOLERANCE = 0.01
MAX_TOLERANCE = 0.75
MISPLACED_FACTOR = 20


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()


def differences(model, rows, *, temperature: float, top_k: int = 0, shift: int = 0) -> torch.Tensor:
    """|recorded - recomputed| of every sampled token; `shift` misplaces the mask, to show that it would be seen."""
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float() / temperature
        if top_k:
            kept = logits.topk(top_k, dim=-1)
            logits = torch.full_like(logits, -float("inf")).scatter(-1, kept.indices, kept.values)
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        start = len(row["prompt_ids"]) - 1
        for position, (mask, recorded) in enumerate(zip(row["response_mask"], row["logprobs"], strict=True)):
            if mask and 0 <= position + shift < len(row["response_ids"]):
                found.append(abs(logprobs[start + position + shift].item() - recorded))
    return torch.tensor(found)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_model(player, tasks, reference, temperature, capsys):
    played = player.play(tasks[:24], group_size=2, sampling=Sampling(max_tokens=128, temperature=temperature))
    rows = [row for row in played.rows if sum(t["role"] == "assistant" for t in row["turns"]) >= 2]
    assert len(rows) >= 16, "multi-turn trajectories"
    found = differences(reference, rows, temperature=temperature)
    misplaced = differences(reference, rows, temperature=temperature, shift=1)
    with capsys.disabled():
        print(
            f"\n|recorded - recomputed| log-probability at temperature {temperature}: "
            f"mean {found.mean():.4f}, max {found.max():.4f} over {len(found)} sampled tokens of {len(rows)} "
            f"trajectories (mask off by one: mean {misplaced[misplaced.isfinite()].mean():.2f})"
        )
    assert len(found) == sum(sum(row["response_mask"]) for row in rows)
    assert found.mean() < MEAN_TOLERANCE
    assert found.max() < MAX_TOLERANCE
    assert misplaced.mean() > MISPLACED_FACTOR * found.mean(), "the test can tell a wrong mask"


def test_logprobs_are_after_top_k(player, tasks, reference):
    """Of the distribution that was sampled from: with top_k 1 the sampled token is certain, and log 1 is 0."""
    played = player.play(tasks[:4], group_size=2, sampling=Sampling(max_tokens=64, top_k=1))
    sampled = [p for row in played.rows for p, m in zip(row["logprobs"], row["response_mask"], strict=True) if m]
    assert len(sampled) > 50
    assert max(abs(p) for p in sampled) < 1e-4
