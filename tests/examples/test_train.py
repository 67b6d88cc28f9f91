"""The trainer's arithmetic: its log-probabilities are the engine's, and a broken mask shows."""

from __future__ import annotations

from array import array

import pytest
import torch

from examples.calculator import train
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.trajectory import SessionKey, Trajectory
from tests.conftest import ROOT

MODEL = ROOT / "examples" / "calculator" / "model"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> train.Trainer:
    torch.manual_seed(0)
    return train.Trainer(MODEL, train.Settings(updates=1), tmp_path_factory.mktemp("checkpoints"))


def sampled(trainer: train.Trainer, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens from the model, with the log-probabilities that it had for them."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            distribution = trainer.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(torch.multinomial(distribution.exp(), 1))
            ids.append(token)
            logprobs.append(float(distribution[token]))
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def trajectories(trainer: train.Trainer) -> list[Trajectory]:
    """Two groups of two; between two sampled turns stand tokens that nobody sampled."""
    torch.manual_seed(3)
    made = []
    for task in range(2):
        prompt = [10, 11, 12, 13 + task]
        for index in range(2):
            first, first_logprobs = sampled(trainer, prompt, 6)
            seen = [40, 41, 42]
            second, second_logprobs = sampled(trainer, prompt + first + seen, 5 + index)
            mask = [1] * 6 + [0] * 3 + [1] * (5 + index)
            segment = Segment(
                array("i", prompt),
                array("i", first + seen + second),
                array("b", mask),
                array("f", first_logprobs + [0.0] * 3 + second_logprobs),
                array("i", [0 if m else -1 for m in mask]),
                [TurnSpan("assistant", 0, len(mask), 0.1)],
            )
            key = SessionKey("r", f"t{task}", f"r/t{task}", index)
            made.append(Trajectory(key, [segment], "stop", [], reward=float(index)))
    return made


def difference(trainer: train.Trainer, trajectories: list[Trajectory]) -> float:
    rows = train.to_rows(to_table(trajectories))
    found = train.backward(trainer.model, rows, trainer.settings)
    trainer._optimizer.zero_grad()
    return found.mean(found.diff)


def test_log_probabilities_are_those_of_the_engine(trainer: train.Trainer, trajectories: list[Trajectory]):
    assert difference(trainer, trajectories) < 1e-4


def test_a_mask_that_is_off_by_one_blows_the_difference_up(trainer: train.Trainer, trajectories: list[Trajectory]):
    broken = []
    for trajectory in trajectories:
        (segment,) = trajectory.segments
        mask = segment.response_mask
        shifted = array("b", [mask[-1], *mask[:-1]])
        logprobs = array("f", [p if m else 0.0 for p, m in zip(segment.logprobs, shifted, strict=True)])
        versions = array("i", [0 if m else -1 for m in shifted])
        changed = Segment(segment.prompt_ids, segment.response_ids, shifted, logprobs, versions, segment.turns)
        broken.append(Trajectory(trajectory.key, [changed], "stop", [], reward=trajectory.reward))
    assert difference(trainer, broken) > 0.2


def test_a_shared_prefix_changes_nothing(trainer: train.Trainer):
    rows = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 3, 4, 7, 8])]
    with torch.no_grad():
        together, shared = train.token_logprobs(trainer.model, rows)
        assert shared == 3
        for number, row in enumerate(rows):
            logits = trainer.model(row[None]).logits[0, :-1].log_softmax(-1)
            alone = logits.gather(-1, row[1:, None])[:, 0]
            torch.testing.assert_close(together[number, : len(row) - 4], alone[3:], atol=1e-4, rtol=1e-4)


def test_advantages_are_within_the_group_and_rows_without_contrast_are_left_out(trajectories: list[Trajectory]):
    rows = train.to_rows(to_table(trajectories))
    assert rows.advantages == pytest.approx([-1.0, 1.0, -1.0, 1.0])
    same = [Trajectory(t.key, t.segments, "stop", [], reward=1.0) for t in trajectories[:2]]
    unscored = Trajectory(trajectories[3].key, trajectories[3].segments, "stop", [], reward=None)
    assert train.to_rows(to_table([*same, trajectories[2], unscored])).ids == []


def test_a_step_makes_good_trajectories_likelier_and_bad_ones_less(
    trainer: train.Trainer, trajectories: list[Trajectory]
):
    def likelihood() -> list[float]:
        rows = train.to_rows(to_table(trajectories))
        with torch.no_grad():
            pairs = zip(rows.ids, rows.mask, strict=True)
            return [float((token_by_token(trainer, ids) * mask[1:]).sum()) for ids, mask in pairs]

    before = likelihood()
    for _ in range(12):
        trainer.step(to_table(trajectories))
    gained = [after - b for after, b in zip(likelihood(), before, strict=True)]
    assert gained[1] > gained[0] and gained[3] > gained[2]


def token_by_token(trainer: train.Trainer, ids: torch.Tensor) -> torch.Tensor:
    logits = trainer.model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, ids[1:, None])[:, 0]


def test_a_checkpoint_is_what_the_engines_take(trainer: train.Trainer):
    from deployments.checkpoint import check_checkpoint

    for number in range(1, 6):
        path = trainer.save(number)
    check_checkpoint(path, MODEL)
    assert len(list(path.parent.iterdir())) == train.KEPT_CHECKPOINTS


def test_training_tasks_are_not_the_held_out_ones():
    from itertools import islice

    from rollout import read_tasks

    held_out = read_tasks(ROOT / "examples" / "calculator" / "tasks.jsonl")[-128:]
    drawn = list(islice(train.training_tasks(held_out), 500))
    assert len({task.task_id for task in drawn}) == 500
    asked = {task.messages[0]["content"] for task in held_out}
    assert not asked & {task.messages[0]["content"] for task in drawn}
