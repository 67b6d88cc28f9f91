"""The tokenizer that sessions use: the same ids as transformers', without its per-call bookkeeping.

transformers spends about 50 µs of Python on every `encode`, and a turn makes a dozen of them over the same few
pieces of template. This calls the Rust tokenizer underneath, and remembers short pieces. It offers no character
offsets, which `renderers` then does without: they only serve attributions that sessions do not need.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

# Pieces of a template ("\n", "assistant\n" …) are short and come again at every turn; texts of people do not.
REMEMBERED_CHARS = 24
REMEMBERED_PIECES = 4_096


class FastTokenizer:
    """What `renderers` asks of a tokenizer (its structural `Tokenizer` protocol), over a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer with a Rust backend (see `has_backend`)."""
        self.transformers = tokenizer
        self.name_or_path: str = tokenizer.name_or_path
        self.unk_token_id: int | None = tokenizer.unk_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        self._short = lru_cache(REMEMBERED_PIECES)(self._encode)

    @staticmethod
    def has_backend(tokenizer: Any) -> bool:
        """Whether a transformers tokenizer can be used so."""
        return getattr(tokenizer, "backend_tokenizer", None) is not None

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str, add_special_tokens: bool = False, **kwargs: Any) -> list[int]:
        """Ids of a text. Anything beyond the plain case is transformers' own."""
        if add_special_tokens or kwargs:
            return self.transformers.encode(text, add_special_tokens=add_special_tokens, **kwargs)
        return list(self._short(text) if len(text) <= REMEMBERED_CHARS else self._encode(text))

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        """Text of ids, as transformers decodes them."""
        return self.transformers.decode(token_ids, *args, **kwargs)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of tokens by name."""
        return self.transformers.convert_tokens_to_ids(tokens)

    def __getattr__(self, name: str) -> Any:
        # Whatever else a renderer may want (added tokens, vocabulary size) is transformers' business, except the
        # call itself: its absence is what says that there are no offsets.
        if name in ("transformers", "__call__"):
            raise AttributeError(name)
        return getattr(self.transformers, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> FastTokenizer:
        import copy

        return FastTokenizer(copy.deepcopy(self.transformers, memo))
