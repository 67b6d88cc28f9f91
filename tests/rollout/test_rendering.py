"""Choosing a renderer, and proving the choice against the model's own chat template."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from rollout.errors import RenderError
from rollout.rendering import OFFLOAD_SIZE, PROBES, agrees_with_template, build_renderer, load_renderer
from tests.conftest import MODEL


def test_auto_takes_the_family_renderer_that_agrees_with_the_template(chat):
    assert chat.name == "qwen3"
    assert agrees_with_template(chat)
    assert [chat.decode([token]) for token in chat.stop_token_ids] == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("index", range(len(PROBES)))
def test_the_demo_models_template_and_renderer_agree_token_by_token(chat, index):
    messages, tools = PROBES[index]
    expected = chat.tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat.render(messages, tools) == list(expected)


def test_auto_does_not_trust_a_family_whose_template_was_changed(tmp_path):
    """A fine-tune with its own chat template is no Qwen3 any more, whatever its config.json says."""
    changed = tmp_path / "model"
    shutil.copytree(MODEL, changed)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    renderer = load_renderer(str(changed))
    assert renderer.name == "default"
    # It still parses calls, with the parser of the vocabulary's form.
    ids = renderer.tokenizer.encode('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>')
    parsed = renderer.parse(ids, [1], [], 0)
    assert [(c.name, c.arguments, c.malformed) for c in parsed.calls] == [("add", {"a": 1}, None)]


def test_options_change_what_is_compared():
    chat = load_renderer(str(MODEL), "auto", {"enable_thinking": False})
    assert chat.name == "qwen3"
    assert chat.decode(chat.render([{"role": "user", "content": "Hi"}], [])).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("quen3", {}, "'quen3' cannot be used"), ("qwen3", {"enable_thinkin": False}, "enable_thinkin")],
)
def test_a_wrong_name_or_option_is_named(chat, name, options, message):
    with pytest.raises(RenderError, match=message):
        build_renderer(chat.tokenizer, name, options)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(RenderError, match="cannot be loaded"):
        load_renderer(str(tmp_path / "nothing"))


def test_call_ids_name_turn_and_position(chat):
    ids = chat.tokenizer.encode('<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>' * 2)
    assert [call.id for call in chat.parse(ids, [1], [], 3).calls] == ["call_3_0", "call_3_1"]


def test_a_name_that_is_no_text_is_malformed(chat):
    ids = chat.tokenizer.encode('<tool_call>\n{"name": ["a"], "arguments": {}}\n</tool_call>')
    assert chat.parse(ids, [1], [], 0).calls[0].malformed == "the tool call has no function name"


async def test_large_work_leaves_the_event_loop_and_gives_the_same_ids(chat):
    import threading

    messages = [{"role": "user", "content": "What is 1 + 2? " * OFFLOAD_SIZE}]
    seen = []

    def work(renderer):
        seen.append(threading.current_thread() is threading.main_thread())
        return renderer.render(messages, [])

    here = await chat.run(0, work)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    there = await chat.run(OFFLOAD_SIZE, work)
    ticker.cancel()
    assert here == there
    assert seen == [True, False]
    assert ticks > 0, "the loop went on meanwhile"
