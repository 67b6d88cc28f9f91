"""Token ids as pieces of text, for people: the model's own tokenizer, loaded when somebody first looks.

Invariant: the pieces of ids, joined, are what the ids say; a character that is spread over several tokens stands at
the last of them, the others are empty. Nothing here runs on the event loop, and a tokenizer that cannot be had costs
the text and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from rollout.errors import RolloutError

logger = logging.getLogger(__name__)

# Tokens before the first one asked for that are decoded with it: a piece may depend on the one before.
CONTEXT = 8
# Tokens that may wait for the rest of a character; more of them are no text.
MAX_WAITING = 16
# After a failure the next attempt is not before so many seconds.
RETRY_S = 30.0


class TokenText(Protocol):
    """Who turns ids into text. Raises RolloutError where it cannot."""

    async def pieces(self, context: Sequence[int], ids: Sequence[int]) -> list[str]:
        """One piece for each of `ids`, which follow on `context`."""
        ...


class TokenizerText:
    """A model's tokenizer in a thread of its own."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        """`model`: a directory or a hub name. Nothing is read yet."""
        self._model, self._revision = model, revision
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token-text")
        self._tokenizer: Any = None
        self._failure: RolloutError | None = None
        self._retry_at = 0.0

    async def pieces(self, context: Sequence[int], ids: Sequence[int]) -> list[str]:
        """See TokenText."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._pieces, context, ids)

    def _pieces(self, context: Sequence[int], ids: Sequence[int]) -> list[str]:
        if self._tokenizer is None:
            self._load()
        return split(self._tokenizer, [*context[-CONTEXT:], *ids])[-len(ids) :] if ids else []

    def _load(self) -> None:
        if self._failure is not None and time.monotonic() < self._retry_at:
            raise self._failure
        try:
            self._tokenizer = load(self._model, self._revision)
        except Exception as failure:
            self._retry_at = time.monotonic() + RETRY_S
            self._failure = RolloutError(f"the tokenizer of {self._model} cannot be loaded here: {failure}")
            logger.warning("trajectories are shown without text: %s", self._failure)
            raise self._failure from None


def load(model: str, revision: str | None) -> Any:
    """The tokenizer as the Rust library has it, without transformers (2 s of imports) where its file is there."""
    from tokenizers import Tokenizer

    file = os.path.join(model, "tokenizer.json")
    if os.path.isfile(file):
        return Tokenizer.from_file(file)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    # A tokenizer without a Rust backend decodes by itself.
    return getattr(tokenizer, "backend_tokenizer", None) or tokenizer


def split(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One piece of text for each id."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    if not isinstance(tokenizer, Tokenizer):
        return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[str] = []
    waiting: list[int] = []
    for token in ids:
        try:
            piece = stream.step(tokenizer, token)
            hopeless = piece is None and len(waiting) >= MAX_WAITING
        except Exception:
            # An id outside of the vocabulary.
            piece, hopeless = None, True
        if hopeless:
            # Bytes that are no text: what follows begins anew.
            piece, stream = _alone(tokenizer, [*waiting, token]), DecodeStream(skip_special_tokens=False)
        pieces.append(piece or "")
        waiting = [*waiting, token] if piece is None else []
    if waiting:
        pieces[-1] = _alone(tokenizer, waiting)
    return pieces


def _alone(tokenizer: Any, ids: Sequence[int]) -> str:
    try:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))
    except Exception:
        return ""
