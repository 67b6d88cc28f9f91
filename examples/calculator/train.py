"""A model that learns: GRPO on the calculator, with nothing but the public client between trainer and cluster.

    make learn        # starts the cluster of configs/learn.yaml, trains, evaluates, plots, stops the cluster

The loop is the whole of asynchronous reinforcement learning: lease a batch of groups, train on it,
push the weights into the running engines, acknowledge, go on. While this trains, the cluster already plays the next
groups; `max_staleness` bounds how old their tokens may be, and the importance ratio against the recorded
log-probabilities corrects for the rest.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from examples.calculator.conversations import draw_tasks
from rollout import Filters, NoBatch, RolloutClient, Task, read_tasks

HERE = Path(__file__).resolve().parent
HOME = HERE.parent.parent
# Training tasks are drawn from this stream; those of tasks.jsonl, on which the result is measured, are left out.
TRAINING_SEED = 20_260_703
# Tasks handed to the cluster ahead of what is trained on; the staleness bound decides which of them start.
BACKLOG_GROUPS = 512
KEPT_CHECKPOINTS = 3
console = Console()


@dataclass
class Settings:
    """What the learning depends on."""

    groups: int = 24
    """Groups of one batch."""
    group_size: int = 8
    max_staleness: int = 1
    """Versions that a trained token may be behind."""
    updates: int = 4
    """Optimizer steps on each batch."""
    learning_rate: float = 1.5e-4
    """At its peak; it falls to a tenth over the time that there is."""
    warmup_steps: int = 12
    """Adam's first steps have the full length whatever the gradient; at once they undid what the model knew."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The importance ratio counts within 1 − clip_low and 1 + clip_high (DAPO, arXiv 2503.14476)."""
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 16_384
    max_steps: int = 400
    minutes: float = 11.5
    """Training ends after so long, evaluations not included."""
    enough: float = 0.95
    """Training ends when the mean reward of the last steps is at least this."""
    evaluation_tasks: int = 128
    evaluation_samples: int = 4


@dataclass
class Step:
    """What one batch came to."""

    step: int
    seconds: float
    reward: float
    """Mean over all trajectories that finished since the step before, those of dropped groups included."""
    loss: float
    clipped: float
    """Share of trained tokens whose ratio was clipped."""
    logprob_diff: float
    """Mean |trainer − rollout| over trained tokens, before the step (nats)."""
    staleness: float
    """Mean over trained tokens, in policy versions."""
    staleness_max: int
    pause_ms: float
    """How long the engines stood still for the new weights."""
    rollouts_per_s: float


@dataclass
class Rows:
    """A batch as lists of tensors, one entry a segment. T: tokens of prompt and response together."""

    ids: list[torch.Tensor] = field(default_factory=list)
    """int64[T]"""
    mask: list[torch.Tensor] = field(default_factory=list)
    """bool[T], true where the policy sampled the token."""
    logprobs: list[torch.Tensor] = field(default_factory=list)
    """float32[T], as recorded at the time of sampling."""
    versions: list[torch.Tensor] = field(default_factory=list)
    """int64[T]"""
    advantages: list[float] = field(default_factory=list)

    def pick(self, indexes: list[int]) -> Rows:
        """Some of the rows."""
        columns = (self.ids, self.mask, self.logprobs, self.versions, self.advantages)
        return Rows(*([column[i] for i in indexes] for column in columns))


def to_rows(table: pa.Table) -> Rows:
    """The record's rows with their advantages: reward minus the mean of the group, over its standard deviation."""
    rewards: dict[str, dict[str, float]] = {}
    for group, trajectory, reward in zip(*(table[n].to_pylist() for n in _KEYS), strict=True):
        if reward is not None:
            rewards.setdefault(group, {})[trajectory] = reward
    rows = Rows()
    for record in table.select([*_KEYS, *_ARRAYS]).to_pylist():
        of_group = rewards.get(record["group_id"], {})
        mine = of_group.get(record["trajectory_id"])
        spread = statistics.pstdev(of_group.values()) if len(of_group) > 1 else 0.0
        if mine is None or spread == 0.0 or not any(record["response_mask"]):
            continue  # nothing to learn from: not scored, no contrast, or no sampled token
        prompt = len(record["prompt_ids"])
        rows.ids.append(torch.tensor(record["prompt_ids"] + record["response_ids"]))
        rows.mask.append(torch.tensor([0] * prompt + record["response_mask"], dtype=torch.bool))
        rows.logprobs.append(torch.tensor([0.0] * prompt + record["logprobs"]))
        rows.versions.append(torch.tensor([-1] * prompt + record["policy_versions"]))
        rows.advantages.append((mine - statistics.fmean(of_group.values())) / spread)
    return rows


_KEYS = ["group_id", "trajectory_id", "reward"]
_ARRAYS = ["prompt_ids", "response_ids", "response_mask", "logprobs", "policy_versions"]


def micro_batches(rows: Rows, max_tokens: int) -> Iterator[list[int]]:
    """Indexes of rows of like length, as many as fit into `max_tokens` padded."""
    chosen: list[int] = []
    for index in sorted(range(len(rows.ids)), key=lambda i: len(rows.ids[i])):
        if chosen and (len(chosen) + 1) * len(rows.ids[index]) > max_tokens:
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


def shared_prefix(ids: list[torch.Tensor]) -> int:
    """Tokens that all rows begin with; at least one of each row is left over."""
    shortest = min(len(row) for row in ids) - 1
    same = torch.stack([row[:shortest] for row in ids]).eq(ids[0][:shortest]).all(dim=0)
    return int(same.long().cumprod(dim=0).sum())


def token_logprobs(model: torch.nn.Module, ids: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Log-probability of each token given those before it, from the first in which rows differ on.

    Returns float32[N, T − P − 1], right-padded with whatever, and P: entry t is of token P + 1 + t. What all rows
    share (system prompt and tools, 430 of 530 tokens here) goes through the model once, gradients included.
    """
    shared = shared_prefix(ids)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    attention = (torch.arange(padded.shape[1])[None, :] < lengths[:, None]).long()
    cache = None
    if shared:
        cache = model(input_ids=ids[0][None, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
    logits = model(input_ids=padded[:, shared:], attention_mask=attention, past_key_values=cache).logits[:, :-1]
    found = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), padded[:, shared + 1 :], reduction="none"
    )
    return -found, shared


@dataclass
class Measured:
    """Sums over trained tokens."""

    tokens: int = 0
    loss: float = 0.0
    diff: float = 0.0
    clipped: float = 0.0

    def mean(self, total: float) -> float:
        """A sum as a mean."""
        return total / max(1, self.tokens)


def backward(model: torch.nn.Module, rows: Rows, settings: Settings) -> Measured:
    """Accumulate the gradient of the clipped policy loss over a batch, each trained token weighing the same."""
    found = Measured(tokens=sum(int(mask[1:].sum()) for mask in rows.mask))
    for chosen in micro_batches(rows, settings.micro_batch_tokens):
        pad = torch.nn.utils.rnn.pad_sequence
        new, shared = token_logprobs(model, [rows.ids[i] for i in chosen])
        mask = pad([rows.mask[i] for i in chosen], batch_first=True)[:, shared + 1 :]
        old = pad([rows.logprobs[i] for i in chosen], batch_first=True)[:, shared + 1 :]
        advantage = torch.tensor([rows.advantages[i] for i in chosen])[:, None].expand_as(new)[mask]
        new, old = new[mask], old[mask]
        ratio = (new - old).exp()
        bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        loss = -torch.minimum(ratio * advantage, bounded * advantage).sum()
        (loss / found.tokens).backward()
        found.loss += loss.item()
        found.diff += (new.detach() - old).abs().sum().item()
        found.clipped += (ratio.detach() != bounded.detach()).sum().item()
    return found


class Trainer:
    """The policy and its optimizer. Weights are float32 here and bfloat16 in the engines."""

    def __init__(self, model_path: Path, settings: Settings, checkpoints: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        self.settings = settings
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
        self._steps = 0
        self._checkpoints = checkpoints
        shutil.rmtree(checkpoints, ignore_errors=True)

    def step(self, table: pa.Table, progress: float = 0.0) -> tuple[Measured, Rows]:
        """Several optimizer steps on a batch, each on a part of it. What is measured is of the first.

        `progress`: share of the training that is over, for the learning rate.
        """
        rows = to_rows(table)
        order = torch.randperm(len(rows.ids)).tolist()
        parts = [order[n :: self.settings.updates] for n in range(self.settings.updates)]
        found = [self._update(rows.pick(part), progress) for part in parts if part]
        return found[0], rows

    def _update(self, rows: Rows, progress: float) -> Measured:
        found = backward(self.model, rows, self.settings)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self._steps += 1
        for group in self._optimizer.param_groups:
            warm = min(1.0, self._steps / self.settings.warmup_steps)
            group["lr"] = self.settings.learning_rate * warm * max(0.1, 1.0 - progress)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return found

    def save(self, step: int) -> Path:
        """A checkpoint that the engines can load; the oldest ones go."""
        path = self._checkpoints / f"step-{step:04d}"
        # Written beside and moved: an engine that starts now must not read half a checkpoint.
        partial = path.with_suffix(".partial")
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in self.model.state_dict().items()}
        self.model.save_pretrained(partial, state_dict=rounded)
        self._tokenizer.save_pretrained(partial)
        partial.rename(path)
        for old in sorted(self._checkpoints.glob("step-????"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        return path


def training_tasks(held_out: list[Task]) -> Iterator[Task]:
    """Endless tasks, none of which asks what a held-out task asks."""
    asked = {task.messages[0]["content"] for task in held_out}
    numbers = itertools.count()
    for drawn in draw_tasks(TRAINING_SEED):
        task = Task.model_validate(drawn.to_record(f"train-{next(numbers):06d}"))
        if task.messages[0]["content"] not in asked:
            yield task


def evaluate(client: RolloutClient, tasks: list[Task], samples: int) -> float:
    """Mean reward over held-out tasks, with the weights that the cluster serves now."""
    table = client.rollout(tasks, group_size=samples, progress=False)
    return float(pc.mean(table["reward"]).as_py())


def learn(
    client: RolloutClient, trainer: Trainer, held_out: list[Task], show: Callable[[list[Step]], None]
) -> list[Step]:
    """Train until the time is up or the reward is high enough."""
    settings = trainer.settings
    tasks = training_tasks(held_out)
    info = client.create_run(
        group_size=settings.group_size,
        max_staleness=settings.max_staleness,
        batch_groups=settings.groups,
        filters=Filters(drop_zero_variance=True),
    )
    run, steps, started = info.run, [], time.monotonic()
    before, since = info, started
    while len(steps) < settings.max_steps and time.monotonic() - started < 60 * settings.minutes:
        if info.waiting < BACKLOG_GROUPS:
            client.submit(run, itertools.islice(tasks, BACKLOG_GROUPS))
        batch = client.lease(run, settings.groups, timeout=120)
        if isinstance(batch, NoBatch):
            raise RuntimeError(f"no batch within two minutes: {batch.reason}")
        with client.using(batch):
            over = (time.monotonic() - started) / (60 * settings.minutes)
            found, rows = trainer.step(batch.table, over)
            report = client.update_weights(trainer.save(len(steps) + 1))
        info, now = client.run_info(run), time.monotonic()
        behind = torch.cat([batch.policy_version - v[m] for v, m in zip(rows.versions, rows.mask, strict=True)])
        scored = info.scored - before.scored
        steps.append(
            Step(
                step=len(steps) + 1,
                seconds=now - started,
                reward=(info.reward_sum - before.reward_sum) / scored if scored else float("nan"),
                loss=found.mean(found.loss),
                clipped=found.mean(found.clipped),
                logprob_diff=found.mean(found.diff),
                staleness=behind.float().mean().item(),
                staleness_max=int(behind.max()),
                pause_ms=report.pause_ms,
                rollouts_per_s=(info.sessions_done - before.sessions_done) / (now - since),
            )
        )
        before, since = info, now
        show(steps)
        recent = [step.reward for step in steps[-5:]]
        if len(recent) == 5 and statistics.fmean(recent) >= settings.enough:
            break
    client.forget(run)
    return steps


@contextmanager
def live() -> Iterator[Callable[[list[Step]], None]]:
    """A table that moves, or a line for each step where the output is no terminal."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as view:
            yield lambda steps: view.update(live_table(steps))
    else:
        yield lambda steps: console.print(
            f"step {steps[-1].step} at {steps[-1].seconds:.0f} s: reward {steps[-1].reward:.3f}, "
            f"|d logprob| {steps[-1].logprob_diff:.4f}, staleness {steps[-1].staleness:.2f}, "
            f"pause {steps[-1].pause_ms:.0f} ms, {steps[-1].rollouts_per_s:.1f} rollouts/s",
            highlight=False,
        )


def live_table(steps: list[Step]) -> Table:
    """The last steps, as they happen."""
    view = Table(title="learning", title_justify="left", box=None, header_style="dim", padding=(0, 2))
    names = ["step", "time", "reward", "loss", "clipped", "|Δ logprob|", "staleness", "pause", "rollouts/s"]
    for name in names:
        view.add_column(name, justify="right")
    for step in steps[-12:]:
        view.add_row(
            str(step.step), f"{step.seconds:.0f} s", f"[bold]{step.reward:.3f}[/bold]", f"{step.loss:+.4f}",
            f"{step.clipped:.1%}", f"{step.logprob_diff:.4f}", f"{step.staleness:.2f} (max {step.staleness_max})",
            f"{step.pause_ms:.0f} ms", f"{step.rollouts_per_s:.1f}",
        )  # fmt: skip
    return view


def _mean_of_known(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else float("nan")


def plot(steps: list[Step], start: float, end: float, path: Path) -> None:
    """Reward over time, with what the held-out tasks gave before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    minutes = [step.seconds / 60 for step in steps]
    rewards = [step.reward for step in steps]  # nan where nothing finished between two steps
    smooth = [_mean_of_known(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    axes.plot(minutes, rewards, color="#9db8d9", linewidth=1, label="each step")
    axes.plot(minutes, smooth, color="#1f5fa8", linewidth=2, label="mean of five")
    axes.scatter([0, minutes[-1]], [start, end], color="#c2410c", zorder=3, label="held-out tasks")
    for x, y in ((0, start), (minutes[-1], end)):
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(6, -12), color="#c2410c")
    axes.set(xlabel="minutes", ylabel="mean reward", ylim=(0, 1.02), title="Calculator, GRPO on two CPU cores")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


@contextmanager
def cluster(config: Path) -> Iterator[None]:
    """The cluster of a config, for the length of the block."""
    rollout = [sys.executable, "-m", "cluster"]
    subprocess.run([*rollout, "up", str(config)], check=True, cwd=HOME)
    try:
        yield
    finally:
        name = next(
            line.split(":")[1].strip() for line in config.read_text().splitlines() if line.startswith("name:")
        )
        subprocess.run([*rollout, "down", name, "--forget"], check=False, cwd=HOME)


def main(
    address: Annotated[str, typer.Option(help="Of a running cluster's gateway; none: start one.")] = "",
    config: Annotated[Path, typer.Option(help="The cluster to start.")] = HOME / "configs" / "learn.yaml",
    model: Annotated[Path, typer.Option(help="The model that the cluster serves.")] = HERE / "model",
    out: Annotated[Path, typer.Option(help="Where checkpoints, plot and summary go.")] = Path("out/learn"),
    minutes: Annotated[float, typer.Option(help="Longest training time.")] = Settings.minutes,
    learning_rate: Annotated[float, typer.Option()] = Settings.learning_rate,
    groups: Annotated[int, typer.Option(help="Groups of one step.")] = Settings.groups,
) -> None:
    """Train the demo model until it calculates."""
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    settings = Settings(minutes=minutes, learning_rate=learning_rate, groups=groups)
    held_out = read_tasks(HERE / "tasks.jsonl")[-settings.evaluation_tasks :]
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    if address:
        summary = _train(address, settings, model, held_out, out)
    else:
        port = next(line.split(":")[1].strip() for line in config.read_text().splitlines() if "  port:" in line)
        with cluster(config):
            summary = _train(f"http://127.0.0.1:{port}", settings, model, held_out, out)
    summary["seconds_total"] = time.monotonic() - begun
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print_json(data={key: value for key, value in summary.items() if key != "history"})
    console.print(f"[dim]written to {out}/summary.json and {out}/reward.png[/dim]")


def _train(address: str, settings: Settings, model: Path, held_out: list[Task], out: Path) -> dict[str, object]:
    trainer = Trainer(model, settings, out.resolve() / "checkpoints")
    with RolloutClient(address) as client, live() as show:
        started = time.monotonic()
        before = evaluate(client, held_out, settings.evaluation_samples)
        console.print(f"held-out reward before: {before:.3f} ({len(held_out)} tasks)")
        steps = learn(client, trainer, held_out, show)
        after = evaluate(client, held_out, settings.evaluation_samples)
        console.print(f"held-out reward after:  {after:.3f}")
        seconds = time.monotonic() - started
    plot(steps, before, after, out / "reward.png")
    return {
        "reward_start": before,
        "reward_end": after,
        "steps": len(steps),
        "seconds": seconds,
        "rollouts_per_s": statistics.fmean(step.rollouts_per_s for step in steps),
        "logprob_diff_mean": statistics.fmean(step.logprob_diff for step in steps),
        "staleness_mean": statistics.fmean(step.staleness for step in steps),
        "staleness_max": max(step.staleness_max for step in steps),
        "update_pause_ms_p50": statistics.median(step.pause_ms for step in steps),
        "settings": asdict(settings),
        "history": [asdict(step) for step in steps],
    }


if __name__ == "__main__":
    typer.run(main)
