"""Messages to tokens and back, for any model.

Invariant: what the engine sampled is never re-tokenized. A conversation grows by `extend`, which appends the
template's tokens for the new messages to the exact ids so far; where that cannot be proven safe it returns None
and the caller re-renders and forks. The work is done by the `renderers` package; this module chooses the
renderer, proves the choice against the model's own chat template, and gives the session four plain methods.

Imports of `renderers` and `transformers` happen inside functions: a trainer installs without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rollout.errors import RenderError
from rollout.fast_tokenizer import FastTokenizer
from rollout.tasks import Message
from rollout.tool_calls import ToolCall

ToolSpecs = list[dict[str, Any]]

# config.json's model_type → renderers' name. Only a candidate: `load_renderer` tests it on the chat template.
_BY_MODEL_TYPE = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_5": "qwen3.5",
    "qwen3_5_moe": "qwen3.5",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm-4.5",
    "llama": "llama-3",
    "minimax_m2": "minimax-m2",
    "deepseek_v3": "deepseek-v3",
    "kimi_k2": "kimi-k2",
}

# The template of gpt-oss writes today's date into the prompt, so no probe can agree with it token by token. Its
# renderer is built on the reference encoder, which needs no proof.
_TRUSTED = {"gpt-oss"}


@dataclass(slots=True)
class ParsedTurn:
    """One generation as a message: what the person reads, and the calls that it makes."""

    content: str
    reasoning: str | None
    calls: list[ToolCall] = field(default_factory=list)

    def to_message(self) -> Message:
        """The assistant message in OpenAI's form, for histories and re-renders.

        A call that could not be parsed stays visible as the text that the model wrote.
        """
        broken = [call.raw for call in self.calls if call.malformed is not None]
        content = "\n".join(part for part in (self.content, *broken) if part)
        message: Message = {"role": "assistant", "content": content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.calls
            if call.malformed is None
        ]
        if calls:
            message["tool_calls"] = calls
        return message


# Work on more characters or tokens than this leaves the event loop. Encoding takes about 0.4 µs a character, so
# this is some 3 ms; below it a hop to a thread costs more than it saves.
OFFLOAD_SIZE = 8_192

# The n sessions of a group open with the same prompt, at about the same time.
REMEMBERED_OPENINGS = 256

T = TypeVar("T")


class ChatRenderer:
    """A model's chat format. One instance serves all sessions of a worker; it keeps no state of theirs."""

    def __init__(self, renderer: Any, tokenizer: Any, name: str) -> None:
        self._renderer = renderer
        self.tokenizer = tokenizer
        self.name = name
        self.stop_token_ids: list[int] = list(renderer.get_stop_token_ids())
        """Tokens that end a turn of this model."""
        self._openings: OrderedDict[str, array[int]] = OrderedDict()
        self._twin: ChatRenderer | None = None
        self._thread: ThreadPoolExecutor | None = None

    async def run(self, size: int, work: Callable[[ChatRenderer], T]) -> T:
        """`work(renderer)`: here if it is small, else in this renderer's own thread.

        `size` is the number of characters or tokens to go through. The thread has a tokenizer of its own:
        tokenizers are not safe to share between threads in every version ("Already borrowed").
        """
        if size < OFFLOAD_SIZE:
            return work(self)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._in_thread()))

    def _in_thread(self) -> ChatRenderer:
        if self._twin is None:
            tokenizer = copy.deepcopy(self.tokenizer)
            self._twin = ChatRenderer(type(self._renderer)(tokenizer, self._renderer.config), tokenizer, self.name)
        return self._twin

    def render(self, messages: Sequence[Message], tools: ToolSpecs) -> list[int]:
        """The whole conversation as a prompt for the next assistant turn. Raises RenderError."""
        try:
            return self._renderer.render_ids(list(messages), tools=tools or None, add_generation_prompt=True)
        except Exception as error:
            raise RenderError(f"{self.name} cannot render the conversation: {error}") from error

    def open(self, messages: Sequence[Message], tools: ToolSpecs) -> list[int]:
        """`render` for the opening of a session, remembered: a group renders its task once. Raises RenderError."""
        key = json.dumps([list(messages), tools], sort_keys=True, default=str)
        known = self._openings.pop(key, None)
        if known is None:
            known = array("i", self.render(messages, tools))
            if len(self._openings) >= REMEMBERED_OPENINGS:
                self._openings.popitem(last=False)
        self._openings[key] = known
        return known.tolist()

    def warm_up(self) -> None:
        """Go once through everything that loads or compiles at first use (about a second)."""
        for messages, tools in PROBES:
            with contextlib.suppress(RenderError):
                prompt = self.render(messages, tools)
                completion = self.tokenizer.encode("<tool_call>", add_special_tokens=False)
                self.parse(completion, prompt, tools, 0)
                self.extend(prompt, completion, [{"role": "tool", "content": "1", "name": "probe"}], tools)

    def extend(
        self,
        prompt_ids: list[int],
        completion_ids: list[int],
        new_messages: Sequence[Message],
        tools: ToolSpecs,
    ) -> list[int] | None:
        """The next prompt as prompt_ids + completion_ids + the template's tokens for `new_messages`.

        None where the renderer refuses (an unknown template, history that the template rewrites). The ledger
        still compares the prefix token by token: a renderer that trims what was sampled is caught there.
        """
        try:
            bridged = self._renderer.bridge_to_next_turn(
                prompt_ids, completion_ids, list(new_messages), tools=tools or None
            )
        except Exception as error:
            raise RenderError(f"{self.name} cannot extend the conversation: {error}") from error
        return None if bridged is None else bridged.token_ids

    def parse(self, completion_ids: list[int], prompt_ids: list[int], tools: ToolSpecs, turn: int) -> ParsedTurn:
        """Sampled tokens as content, reasoning and tool calls (ids `call_TURN_INDEX` unless the model gave its own).

        Text that is no conversation is content; only a bug in a parser raises RenderError.
        """
        try:
            parsed = self._renderer.parse_response(completion_ids, tools=tools or None, prompt_ids=prompt_ids)
        except Exception as error:
            raise RenderError(f"{self.name} cannot parse a generation: {error}") from error
        calls = []
        for index, call in enumerate(parsed.tool_calls):
            identifier = call.id or f"call_{turn}_{index}"
            status = str(call.status.value if hasattr(call.status, "value") else call.status)
            # `unknown_tool` is answered by the tool set, which can name the tools that there are.
            problem = None if status in ("ok", "unknown_tool") else _EXPLAIN.get(status, status)
            if problem is None and not (isinstance(call.name, str) and call.name):
                problem = _EXPLAIN["missing_name"]
            calls.append(ToolCall(identifier, call.name, call.arguments, problem, call.raw))
        return ParsedTurn(parsed.content, parsed.reasoning_content, calls)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens included; for people to read, never to encode again."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


_EXPLAIN = {
    "invalid_json": "the tool call is not valid JSON",
    "unclosed_block": "the tool call was not closed",
    "missing_name": "the tool call has no function name",
    "malformed_structure": "the tool call is not in the expected form",
}


def load_renderer(
    model: str, name: str = "auto", options: dict[str, Any] | None = None, revision: str | None = None
) -> ChatRenderer:
    """The renderer of a model directory or hub name.

    `name` is one of the `renderers` package's names, "default" (the chat template itself: every turn that the
    template rewrites becomes a fork), or "auto": the renderer of the model's family if it agrees with the
    model's own chat template token by token on probe conversations, else "default". Raises RenderError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise RenderError(f"the tokenizer of {model!r} cannot be loaded: {error}") from error
    if name != "auto":
        return build_renderer(tokenizer, name, options)
    candidate = _candidate(model, tokenizer, revision)
    if candidate is not None:
        chat = build_renderer(tokenizer, candidate, options)
        if candidate in _TRUSTED or agrees_with_template(chat, options):
            return chat
    # Without parsers the default renderer would call no tools; these two forms cover most open models.
    defaults: dict[str, Any] = {}
    vocabulary = tokenizer.get_vocab()
    if "<tool_call>" in vocabulary:
        defaults["tool_parser"] = "qwen3"
    if "</think>" in vocabulary:
        defaults["reasoning_parser"] = "think"
    return build_renderer(tokenizer, "default", {**defaults, **(options or {})})


def build_renderer(tokenizer: Any, name: str, options: dict[str, Any] | None = None) -> ChatRenderer:
    """The named renderer over a loaded tokenizer. Raises RenderError for a name or option it does not know."""
    from pydantic import TypeAdapter
    from renderers import RendererConfig, create_renderer

    try:
        config = TypeAdapter(RendererConfig).validate_python({"name": name, **(options or {})})
        # The default renderer is the chat template itself, which is transformers'.
        if name != "default" and FastTokenizer.has_backend(tokenizer):
            tokenizer = FastTokenizer(tokenizer)
        return ChatRenderer(create_renderer(tokenizer, config), tokenizer, name)
    except Exception as error:
        raise RenderError(f"renderer {name!r} cannot be used: {error}") from error


def _candidate(model: str, tokenizer: Any, revision: str | None) -> str | None:
    from renderers.base import MODEL_RENDERER_MAP
    from transformers import AutoConfig

    known = MODEL_RENDERER_MAP.get(getattr(tokenizer, "name_or_path", "") or model)
    if known is not None:
        return known
    local = Path(model) / "config.json"
    if local.is_file():
        return _BY_MODEL_TYPE.get(json.loads(local.read_text()).get("model_type", ""))
    try:
        return _BY_MODEL_TYPE.get(AutoConfig.from_pretrained(model, revision=revision).model_type)
    except Exception:
        # Not being able to guess is no error: the default renderer works with any chat template.
        return None


_PROBE_TOOLS: ToolSpecs = [
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "A tool.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "number", "description": "A number."}},
                "required": ["x"],
            },
        },
    }
]
_PROBE_CALL = {"id": "call_0", "type": "function", "function": {"name": "probe", "arguments": {"x": 1.5}}}
PROBES: list[tuple[list[Message], ToolSpecs]] = [
    ([{"role": "user", "content": "Hello, wörld!"}], []),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
        ],
        _PROBE_TOOLS,
    ),
    (
        [
            {"role": "user", "content": "Call it twice."},
            {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL, _PROBE_CALL]},
            {"role": "tool", "content": "first", "tool_call_id": "call_0", "name": "probe"},
            {"role": "tool", "content": "second", "tool_call_id": "call_0", "name": "probe"},
        ],
        _PROBE_TOOLS,
    ),
]
"""Conversations on which a renderer must equal the model's chat template before `auto` trusts it."""


def agrees_with_template(chat: ChatRenderer, options: dict[str, Any] | None = None) -> bool:
    """Whether the renderer gives exactly the chat template's tokens on PROBES.

    A template that cannot render a probe at all (no system role, no tools) does not count against it.
    """
    tokenizer = chat.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    template_options = {
        key: value for key, value in (options or {}).items() if key not in ("thinking_retention", "name")
    }
    compared = 0
    for messages, tools in PROBES:
        try:
            expected = tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **template_options,
            )
        except Exception:
            continue
        try:
            ours = chat.render(messages, tools)
        except RenderError:
            return False
        if list(expected) != ours:
            return False
        compared += 1
    return compared > 0
