"""A tokenizer for GPT-OSS made of oss-harmony's own vocabulary, which lies inside that package: no download.

Real deployments use the tokenizer of the model's directory; this adapter gives tests the same ids offline.
"""

from __future__ import annotations

from typing import Any

from openai_harmony import HarmonyEncodingName, load_harmony_encoding


class HarmonyTokenizer:
    """What `renderers` asks of a tokenizer (its structural `Tokenizer` protocol)."""

    name_or_path = "openai/gpt-oss-20b"
    unk_token_id = None
    eos_token_id = 200002  # <|return|>
    chat_template = None

    def __init__(self) -> None:
        self._encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)

    def encode(self, text: str, add_special_tokens: bool = False, **_: Any) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._encoding.decode(ids)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str):
            return self.encode(tokens)[0]
        return [self.encode(token)[0] for token in tokens]

    def __deepcopy__(self, _memo: dict[int, Any]) -> HarmonyTokenizer:
        return HarmonyTokenizer()
