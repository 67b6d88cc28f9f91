"""Make the calculator demo model: a tiny Qwen3 that calls the calculator and is right about half the time.

The script needs nothing but this repository, a CPU and a few minutes. It

1. writes ``tasks.jsonl`` (256 fixed tasks; none of them is trained on),
2. trains a byte-level BPE tokenizer with Qwen3's special tokens on rendered conversations,
3. trains a small ``Qwen3ForCausalLM`` on conversations, tokenized exactly as a rollout session sees
   them (renderer prompt, sampled completion, bridge to the next turn), with the loss on completions only,
4. lets every second conversation be a hasty one, which leaves out the last operation: the model can solve nearly
   all tasks and does so half of the time, as a model does that read much from many hands, and reinforcement
   learning can bring out what it is capable of, and
5. saves a Hugging Face model directory in ``model/`` and plays the shipped tasks with real tools as a check.

Run it from the repository's root::

    python -m examples.calculator.make_model            # overwrites tasks.jsonl and model/
    python -m examples.calculator.make_model --check    # only plays the shipped tasks with the model on disk
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, so never wait for a network

import torch
from renderers import Qwen3RendererConfig, create_renderer
from renderers.base import Renderer, ToolCallParseStatus
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.calculator.conversations import (
    KIND_SHARES,
    TOOLS,
    Operation,
    Task,
    draw_tasks,
    dump_tasks,
    first_messages,
    is_right,
    run_tool,
    solution_turns,
)

HERE = Path(__file__).resolve().parent
MODEL_DIR = HERE / "model"
TASKS_FILE = HERE / "tasks.jsonl"

# Every random choice starts here; the offsets keep the streams of tasks apart.
SEED = 20
SHIPPED_STREAM, HELD_OUT_STREAM, TRAINING_STREAM, TOKENIZER_STREAM = range(SEED * 100, SEED * 100 + 4)
SHIPPED_TASKS = 256
DEMO_TASKS = 64  # the demo uses the first ones
HELD_OUT_TASKS = 128
TOKENIZER_CONVERSATIONS = 2000

# --- Tokenizer ---------------------------------------------------------------------------------------------

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# Visible text in Qwen3, so not "special": decoding keeps them.
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MAX_MERGED_VOCAB = 1280
VOCAB_MULTIPLE = 64
# Qwen2's way to cut text into words: every digit stands alone, no word holds a newline.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Writes what the renderers library's Qwen3Renderer writes, token by token.
CHAT_TEMPLATE = r"""
{#- Qwen3 turns. Reasoning is written only after the last user query; tool results share one user turn. -#}
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is iterable -%}
    {%- for part in content -%}{{- part if part is string else (part.text | default('')) -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- set thinking_off = enable_thinking is defined and enable_thinking is false -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- if has_system or tools -%}
  {{- '<|im_start|>system\n' + (text(messages[0].content) if has_system else '') -}}
  {%- if tools -%}
    {{- '\n\n' if has_system else '' -}}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' -}}
    {{- 'within <tool_call></tool_call> XML tags:\n' -}}
    {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' -}}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}

{%- set query = namespace(index=messages | length - 1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set body = text(message.content).strip() -%}
    {%- if not (body.startswith('<tool_response>') and body.endswith('</tool_response>')) -%}
      {%- set query.index = loop.index0 -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}

{%- for message in messages -%}
  {%- set content = text(message.content) -%}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
  {%- elif message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if message.reasoning_content is string -%}
      {%- set reasoning = message.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set content = content.split('</think>', 1)[1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- set open_turn = loop.index0 > query.index and (loop.last or reasoning) -%}
    {%- if open_turn or (thinking_off and not reasoning) -%}
      {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
    {%- else -%}
      {{- content -}}
    {%- endif -%}
    {%- for tool_call in message.tool_calls or [] -%}
      {%- set function = tool_call.function or tool_call -%}
      {{- '\n' if content or not loop.first else '' -}}
      {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' -}}
      {{- function.arguments if function.arguments is string else (function.arguments | tojson) -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' -}}
    {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
    {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
  {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if thinking_off else '') -}}
{%- endif -%}
""".strip()


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers sees it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on whole rendered conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    renders_text = wrap_tokenizer(tokenizer)
    added = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS + MARKUP_TOKENS))

    def corpus() -> Iterator[str]:
        for task in itertools.islice(draw_tasks(TOKENIZER_STREAM), TOKENIZER_CONVERSATIONS):
            messages = first_messages(task)
            for turn in solution_turns(task):
                messages += [{"role": "assistant", "content": turn.text}, *turn.tool_messages]
            text = renders_text.apply_chat_template(messages, tools=TOOLS, tokenize=False)
            yield from added.split(text)

    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=MAX_MERGED_VOCAB,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for tokens, special in ((CONTROL_TOKENS, True), (MARKUP_TOKENS, False)):
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in tokens])
    return wrap_tokenizer(tokenizer)


# --- Model -------------------------------------------------------------------------------------------------

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 192, 4, 6, 2, 512
HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes
MAX_POSITIONS = 4096


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model that fits the tokenizer."""
    vocab_size = math.ceil(len(tokenizer) / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    end_ids = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_ids[0],
        pad_token_id=end_ids[1],
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = end_ids
    model.generation_config.pad_token_id = end_ids[1]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 1.0
    return model


# --- Training data -----------------------------------------------------------------------------------------


@dataclass
class Example:
    """A conversation as token ids; ``sampled`` marks the tokens that the model wrote."""

    ids: list[int]
    sampled: list[bool]


def encode_task(task: Task, hasty: bool, tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> Example:
    """The tokens a rollout session would hold at the end of a solution of the task."""
    ids = renderer.render_ids(first_messages(task), tools=TOOLS, add_generation_prompt=True)
    sampled = [False] * len(ids)
    end_id = tokenizer.convert_tokens_to_ids(TURN_END)
    for turn in solution_turns(task, hasty):
        completion = [*tokenizer.encode(turn.text, add_special_tokens=False), end_id]
        prompt, ids = ids, ids + completion
        sampled += [True] * len(completion)
        if turn.tool_messages:
            bridge = renderer.bridge_to_next_turn(prompt, completion, list(turn.tool_messages), tools=TOOLS)
            if bridge is None:
                raise RuntimeError(f"The renderer cannot extend this turn: {turn.text!r}")
            ids = bridge.token_ids
            sampled += [False] * (len(ids) - len(sampled))
    return Example(ids, sampled)


POOL_BATCHES = 8
HASTY_SHARE = 1 / 3  # short conversations weigh more: it comes to about half of what the model does
# More of the long tasks than are shipped: single operations are learnt on the way.
TRAINING_SHARES = {"single": 0.2, "nested": 0.45, "parallel": 0.35}


def draw_batches(
    exclude: set[tuple[Operation, ...]], tokenizer: PreTrainedTokenizerFast, renderer: Renderer
) -> Iterator[list[Example]]:
    """Fresh training batches without end; conversations of like length share a batch, to pad little."""
    tasks = draw_tasks(TRAINING_STREAM, TRAINING_SHARES, exclude)
    rng = random.Random(TRAINING_STREAM)
    while True:
        drawn = itertools.islice(tasks, BATCH * POOL_BATCHES)
        pool = [encode_task(task, rng.random() < HASTY_SHARE, tokenizer, renderer) for task in drawn]
        pool.sort(key=lambda example: len(example.ids))
        batches = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(batches)
        yield from batches


# --- Training ----------------------------------------------------------------------------------------------

BATCH = 16
ADAMW_RATE = 3e-3  # embeddings and norms
MUON_RATE = 3e-3  # matrices: Muon learns to copy digits in a third of the steps AdamW takes
WARMUP_STEPS = 50
STEPS = 1000
FINAL_FACTOR = 0.02  # of the rates, which fall linearly
CLIP_NORM = 1.0
PLAY_EVERY = 100


def shared_prefix_length(examples: Sequence[Example]) -> int:
    """How many first tokens (system prompt and tools) all the conversations share."""
    columns = zip(*(example.ids for example in examples), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def sampled_losses(model: Qwen3ForCausalLM, batch: Sequence[Example]) -> torch.Tensor:
    """The loss of every sampled token."""
    # The long shared beginning is computed once, then repeated in the key-value cache: this saves most of the
    # work, and gradients flow through the cache all the same.
    shared = shared_prefix_length(batch)
    length = max(len(example.ids) for example in batch) - shared
    ids = torch.zeros((len(batch), length), dtype=torch.long)
    sampled = torch.zeros((len(batch), length), dtype=torch.bool)
    for row, example in enumerate(batch):
        size = len(example.ids) - shared
        ids[row, :size] = torch.tensor(example.ids[shared:])
        sampled[row, :size] = torch.tensor(example.sampled[shared:])
    cache = model.model(torch.tensor([batch[0].ids[:shared]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    # Padding is on the right, where causal attention hides it.
    hidden = model.model(ids[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
    targets = sampled[:, 1:]
    return cross_entropy(model.lm_head(hidden[targets]), ids[:, 1:][targets], reduction="none")


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def as_saved(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A copy with the rounded weights that get saved."""
    return copy.deepcopy(model).to(torch.bfloat16).eval()


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, renderer: Renderer, shipped: Sequence[Task]
) -> Qwen3ForCausalLM:
    """Train for STEPS steps; returns the rounded model."""
    held_out = list(itertools.islice(draw_tasks(HELD_OUT_STREAM), HELD_OUT_TASKS))
    exclude = {task.operations for task in (*shipped, *held_out)}
    optimizers = build_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}, loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=CONSOLE) as progress:
        bar = progress.add_task("training", total=STEPS, loss=math.nan)
        batches = itertools.islice(draw_batches(exclude, tokenizer, renderer), STEPS)
        for step, batch in enumerate(batches, 1):
            factor = min(1.0, step / WARMUP_STEPS) * max(FINAL_FACTOR, 1.0 - step / STEPS)
            for optimizer, rate in zip(optimizers, base_rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            token_losses = sampled_losses(model, batch)
            token_losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.update(bar, advance=1, loss=token_losses.mean().item())
            if step % PLAY_EVERY == 0:
                rate = success_rate(play(as_saved(model), tokenizer, renderer, held_out))
                progress.console.print(f"step {step}: {rate:.1%} of {len(held_out)} held-out episodes are right")
    return as_saved(model)


# --- Episodes ----------------------------------------------------------------------------------------------

MAX_TURNS = 4
MAX_TURN_TOKENS = 128
PLAY_BATCH = 64


@dataclass
class Episode:
    """One task played by the model, and what came of it."""

    task: Task
    ids: list[int]  # the prompt of the next turn
    turns: int = 0
    ended_turns: int = 0
    sampled_tokens: int = 0
    calls: int = 0
    malformed_calls: int = 0
    answer: str | None = None  # the text of the turn without tool calls

    @property
    def right(self) -> bool:
        return self.answer is not None and is_right(self.answer, self.task.answers)


def sample_turns(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """One completion for each prompt at temperature 1, up to and with the end of the turn."""
    pad_id, end_ids = tokenizer.pad_token_id, model.generation_config.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_TURN_TOKENS,
    )
    completions = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in end_ids), len(row) - 1)
        completions.append(row[: end + 1])
    return completions


def play(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, renderer: Renderer, tasks: Sequence[Task]
) -> list[Episode]:
    """Play each task once with real tools in the loop."""
    episodes = [
        Episode(task, renderer.render_ids(first_messages(task), tools=TOOLS, add_generation_prompt=True))
        for task in tasks
    ]
    end_ids = set(model.generation_config.eos_token_id)
    active = episodes
    for _ in range(MAX_TURNS):
        completions: list[list[int]] = []
        for start in range(0, len(active), PLAY_BATCH):
            prompts = [episode.ids for episode in active[start : start + PLAY_BATCH]]
            completions += sample_turns(model, tokenizer, prompts)
        going_on = []
        for episode, completion in zip(active, completions, strict=True):
            episode.turns += 1
            episode.sampled_tokens += len(completion)
            if completion[-1] not in end_ids:
                continue
            episode.ended_turns += 1
            parsed = renderer.parse_response(completion, tools=TOOLS, prompt_ids=episode.ids)
            if not parsed.tool_calls:
                episode.answer = parsed.content
                continue
            messages = []
            for call in parsed.tool_calls:
                episode.calls += 1
                if call.status == ToolCallParseStatus.OK and isinstance(call.arguments, dict):
                    result = run_tool(call.name, call.arguments)
                else:
                    episode.malformed_calls += 1
                    result = "Error: the tool call is not valid JSON"
                messages.append({"role": "tool", "name": call.name or "unknown", "content": result})
            bridge = renderer.bridge_to_next_turn(episode.ids, completion, messages, tools=TOOLS)
            if bridge is not None:
                episode.ids = bridge.token_ids
                going_on.append(episode)
        active = going_on
        if not active:
            break
    return episodes


def success_rate(episodes: Sequence[Episode]) -> float:
    return sum(episode.right for episode in episodes) / len(episodes)


def report(episodes: Sequence[Episode], title: str) -> None:
    """Print what a set of episodes looks like."""
    turns = sum(episode.turns for episode in episodes)
    calls = sum(episode.calls for episode in episodes)
    table = Table(title=title, show_header=False)
    table.add_row("right", f"{success_rate(episodes):.1%} of {len(episodes)}")
    table.add_row(f"right, first {DEMO_TASKS}", f"{success_rate(episodes[:DEMO_TASKS]):.1%}")
    for kind in KIND_SHARES:
        group = [episode for episode in episodes if episode.task.kind == kind]
        table.add_row(f"right, {kind}", f"{success_rate(group):.1%} of {len(group)}")
    table.add_row("turns per episode", f"{turns / len(episodes):.2f}")
    sampled_tokens = sum(episode.sampled_tokens for episode in episodes)
    table.add_row("sampled tokens per episode", f"{sampled_tokens / len(episodes):.1f}")
    table.add_row("turns properly ended", f"{sum(e.ended_turns for e in episodes) / turns:.1%}")
    table.add_row("malformed tool calls", f"{sum(e.malformed_calls for e in episodes)} of {calls}")
    CONSOLE.print(table)


# --- Main --------------------------------------------------------------------------------------------------

CONSOLE = Console()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model directory anew."""
    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    model.save_pretrained(MODEL_DIR)
    tokenizer.save_pretrained(MODEL_DIR)


def check(shipped: Sequence[Task]) -> None:
    """Play the shipped tasks with the model on disk."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).eval()
    renderer = create_renderer(tokenizer, Qwen3RendererConfig())
    size = sum(file.stat().st_size for file in MODEL_DIR.iterdir())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prompt = renderer.render_ids(first_messages(shipped[0]), tools=TOOLS, add_generation_prompt=True)
    CONSOLE.print(
        f"{parameters:,} parameters, vocabulary {model.config.vocab_size}, {size / 1e6:.1f} MB on disk, "
        f"{len(prompt)} tokens in the first prompt"
    )
    report(play(model, tokenizer, renderer, shipped), "Shipped tasks at temperature 1")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or check the calculator demo model.")
    parser.add_argument("--check", action="store_true", help="only play the shipped tasks")
    # More threads change the order of sums, and so the weights; this small model hardly gains from them.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, as for the shipped one)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    shipped = list(itertools.islice(draw_tasks(SHIPPED_STREAM), SHIPPED_TASKS))
    if not arguments.check:
        began = time.monotonic()
        TASKS_FILE.write_text(dump_tasks(shipped))
        tokenizer = train_tokenizer()
        renderer = create_renderer(tokenizer, Qwen3RendererConfig())
        model = train(build_model(tokenizer), tokenizer, renderer, shipped)
        save(model, tokenizer)
        CONSOLE.print(f"{MODEL_DIR.name}/ and {TASKS_FILE.name} made in {time.monotonic() - began:.0f} s")
    check(shipped)


if __name__ == "__main__":
    main()
