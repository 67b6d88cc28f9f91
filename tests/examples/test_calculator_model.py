"""The calculator demo's files: the template agrees with the renderer, the tasks' answers are right."""

from __future__ import annotations

import ast
import json
import operator
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from renderers import Qwen3RendererConfig, create_renderer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rollout.calculator import calculator_tools

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "calculator"
MODEL = FOLDER / "model"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TOOLS = [tool.spec for tool in calculator_tools()]
MAX_BYTES = 8_000_000
TENSOR_PARALLEL = 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


# --- Chat template -----------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "You are a careful calculator."}
USER = {"role": "user", "content": "What is 47 + 182?"}
THANKS = {"role": "user", "content": "Thanks. And 9 * 3?"}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(content: str = "", reasoning: str | None = None, *calls: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def tool(content: str, name: str = "add") -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": "call_0", "content": content}


ADD = call("add", {"a": 47, "b": 182})
MULTIPLY = call("multiply", {"a": 9, "b": 3.5})
SUBTRACT_TEXT = call("subtract", '{"a": -1,  "b": 2}')  # arguments as text are written as they are

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system and user": [SYSTEM, USER],
    "empty system": [{"role": "system", "content": ""}, USER],
    "later system": [SYSTEM, USER, assistant("229"), {"role": "system", "content": "Be brief."}, THANKS],
    "answer": [SYSTEM, USER, assistant("The answer is 229.")],
    "answer with reasoning": [SYSTEM, USER, assistant("The answer is 229.", "\nadd 47\nand 182\n")],
    "empty reasoning": [SYSTEM, USER, assistant("The answer is 229.", "")],
    "reasoning in the content": [USER, assistant("<think>\nadd them\n</think>\n\nThe answer is 229.")],
    "reasoning without its beginning": [USER, assistant("add them\n</think>\n\nThe answer is 229.")],
    "call": [SYSTEM, USER, assistant("", "add 47 and 182", ADD)],
    "call without reasoning": [SYSTEM, USER, assistant("", None, ADD)],
    "call after text": [SYSTEM, USER, assistant("Let me see.", None, ADD)],
    "calls": [SYSTEM, USER, assistant("", "add, multiply", ADD, MULTIPLY)],
    "calls after text": [USER, assistant("Both:", "add, multiply", ADD, MULTIPLY, SUBTRACT_TEXT)],
    "result": [SYSTEM, USER, assistant("", "add", ADD), tool("229")],
    "results": [SYSTEM, USER, assistant("", "both", ADD, MULTIPLY), tool("229"), tool("31.5", "multiply")],
    "failed result": [USER, assistant("", None, call("divide", {"a": 1, "b": 0})), tool("Error: no")],
    "whole episode": [SYSTEM, USER, assistant("", "add", ADD), tool("229"), assistant("The answer is 229.")],
    "two rounds": [
        *(SYSTEM, USER, assistant("", "add", ADD), tool("229"), assistant("", None, MULTIPLY)),
        *(tool("31.5", "multiply"), assistant("The answer is 31.5.", "done")),
    ],
    "later query": [
        *(SYSTEM, USER, assistant("", "add", ADD), tool("229"), assistant("The answer is 229.", "done")),
        *(THANKS, assistant("", "multiply", MULTIPLY), tool("27"), assistant("The answer is 27.")),
    ],
    "later query to be answered": [SYSTEM, USER, assistant("The answer is 229.", "add"), THANKS],
    "no query": [SYSTEM, assistant("Hello.", "greet")],
    "result in a user turn": [
        *(USER, assistant("", "add", ADD)),
        *({"role": "user", "content": "<tool_response>\n229\n</tool_response>"}, assistant("229.", "done")),
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("What is ", "1 + 1?")]}],
    "other scripts": [USER, assistant("Ответ: ２２９ 🙂", "e\u0301té", call("add", {"a": "é", "b": "日本"}))],
}


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "no thinking"])
@pytest.mark.parametrize("generation_prompt", [False, True], ids=["closed", "prompt"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_template_writes_the_renderers_tokens(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, generation_prompt: bool, thinking: bool
) -> None:
    renderer = create_renderer(tokenizer, Qwen3RendererConfig(enable_thinking=thinking))
    expected = renderer.render_ids(messages, tools=tools, add_generation_prompt=generation_prompt)
    actual = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        add_generation_prompt=generation_prompt,
        return_dict=False,
        **({} if thinking else {"enable_thinking": False}),
    )
    assert tokenizer.decode(actual) == tokenizer.decode(expected)
    assert actual == expected


# --- Tokenizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *MARKUP_TOKENS])
def test_special_tokens_are_one_id(tokenizer: Any, token: str) -> None:
    ids = tokenizer.encode(f"a{token}b", add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
    # As in Qwen3, decoding without special tokens keeps thoughts and tool calls.
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert kept == ("ab" if token in CONTROL_TOKENS else f"a{token}b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 47 + 182?",
        "  two  spaces, tabs\t\tand\r\nlines\n\n\n ",
        "naïve café, e\u0301 (two code points), ﬁ, ²",
        "日本語 العربية हिन्दी ру́сский",
        "👩‍🚀🏽 \U0001f3f4\u200d\u2620\ufe0f",
        "zero \x00 bell \x07 \u200b \ufeff \ufffd",
        "<think>\n</think>\n\n<tool_call>\n{}\n</tool_call><|im_end|>",
        "don't WE'LL 1234567890 ١٢٣",
        "".join(map(chr, range(0x20, 0x250))),
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    assert tokenizer.encode("0123456789", add_special_tokens=False) == digits


# --- Model directory ---------------------------------------------------------------------------------------


def test_model_directory(tokenizer: Any) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert str(config.dtype) == "torch.bfloat16"
    assert config.head_dim == 32
    assert config.tie_word_embeddings
    for size in (config.num_attention_heads, config.num_key_value_heads, config.vocab_size):
        assert size % TENSOR_PARALLEL == 0
    assert config.vocab_size % 64 == 0
    assert config.vocab_size >= len(tokenizer)
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < MAX_BYTES


def test_turns_end_where_the_renderer_ends_them(tokenizer: Any) -> None:
    renderer = create_renderer(tokenizer, Qwen3RendererConfig())
    assert GenerationConfig.from_pretrained(MODEL).eos_token_id == renderer.get_stop_token_ids()
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


# --- Tasks -------------------------------------------------------------------------------------------------

TASKS = [json.loads(line) for line in (FOLDER / "tasks.jsonl").read_text().splitlines()]
KINDS = {"single": 0.5, "nested": 0.3, "parallel": 0.2}
BY_NAME = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
}
BY_SYMBOL = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(expression: str) -> Fraction:
    """The exact value of an expression as Python reads it."""

    def value(node: Any) -> Fraction:
        if isinstance(node, ast.BinOp):
            return BY_SYMBOL[type(node.op)](value(node.left), value(node.right))
        return Fraction(node.value)

    return value(ast.parse(expression, mode="eval").body)


def results_of(operations: list[dict[str, Any]]) -> list[Fraction]:
    results: list[Fraction] = []
    for operation in operations:
        operands = [operation["a"], operation["b"]]
        values = [results[x["result_of"]] if isinstance(x, dict) else Fraction(x) for x in operands]
        results.append(BY_NAME[operation["tool"]](*values))
    return results


@pytest.mark.parametrize("task", TASKS, ids=[task["task_id"] for task in TASKS])
def test_task(task: dict[str, Any]) -> None:
    assert set(task) == {"task_id", "messages", "data"}
    data, (message,) = task["data"], task["messages"]
    assert message["role"] == "user"
    results = results_of(data["operations"])
    expected = results[-1:] if data["kind"] == "nested" else results
    assert len(data["answers"]) == len(expected) == (2 if data["kind"] == "parallel" else 1)
    for text, value in zip(data["answers"], expected, strict=True):
        if value.denominator == 1:
            assert text == str(value.numerator)
        elif 10**60 % value.denominator == 0:
            assert Fraction(text) == value
        else:  # a quotient without end is rounded to 12 significant digits
            assert abs(Fraction(text) - value) <= abs(value) / 10**11
    asked = re.findall(r"\(?\d[\d ()+*/-]*[\d)]", message["content"])
    assert [value_of(expression) for expression in asked] == expected


def test_tasks_are_distinct_and_mixed() -> None:
    assert len(TASKS) == 256
    assert len({task["task_id"] for task in TASKS}) == len(TASKS)
    assert len({task["messages"][0]["content"] for task in TASKS}) == len(TASKS)
    for tasks in (TASKS, TASKS[:64]):
        shares = {kind: sum(task["data"]["kind"] == kind for task in tasks) / len(tasks) for kind in KINDS}
        assert all(abs(shares[kind] - share) < 0.15 for kind, share in KINDS.items())
