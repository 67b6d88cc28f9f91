"""ChatML with Qwen3's tool blocks, written by hand: no template engine, no renderer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

END = "<|im_end|>"
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class ChatMl:
    """Messages to ids. `encode` must make one id of END."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        (self.end,) = encode(END)

    @classmethod
    def of_file(cls, path: str) -> ChatMl:
        """With a tokenizer.json."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        return cls(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    @classmethod
    def of_words(cls) -> ChatMl:
        """One id for each word, blank and sign."""
        ids: dict[str, int] = {}
        pieces = re.compile(r"<\|\w+\|>|\w+|\W")
        return cls(lambda text: [ids.setdefault(piece, len(ids)) for piece in pieces.findall(text)])

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        """A conversation without tool results, ready for its first answer."""
        text = ""
        rest = list(messages)
        if tools:
            system = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
            listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            text += (
                "<|im_start|>system\n" + system + ("\n\n" if system else "") + "# Tools\n\n"
                "You may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" + listed + "\n"
                "</tools>\n\nFor each function call, return a json object with function name and arguments "
                "within <tool_call></tool_call> XML tags:\n"
                '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' + END + "\n"
            )
        for message in rest:
            assert message["role"] in ("system", "user"), "openings only"
            text += f"<|im_start|>{message['role']}\n{message['content']}{END}\n"
        return self.encode(text + "<|im_start|>assistant\n")

    def after(self, new: list[Message], ended: bool) -> list[int]:
        """What stands between an answer and the next. `ended`: the answer's own tokens end with END."""
        text = "\n" if ended else END + "\n"
        for index, message in enumerate(new):
            if message["role"] != "tool":
                text += f"<|im_start|>{message['role']}\n{message['content']}{END}\n"
                continue
            if index == 0 or new[index - 1]["role"] != "tool":
                text += "<|im_start|>user"
            text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
            if index + 1 == len(new) or new[index + 1]["role"] != "tool":
                text += END + "\n"
        return self.encode(text + "<|im_start|>assistant\n")


def read_answer(text: str, turn: int) -> Message:
    """An assistant message from what the model wrote."""
    text = text.removesuffix(END)
    calls = []
    for index, block in enumerate(CALL.findall(text)):
        call = json.loads(block)
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        calls.append({"id": f"c{turn}-{index}", "type": "function", "function": function})
    message: Message = {"role": "assistant", "content": CALL.sub("", text).strip()}
    return {**message, "tool_calls": calls} if calls else message


def write_call(name: str, **arguments: Any) -> str:
    """A tool call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
