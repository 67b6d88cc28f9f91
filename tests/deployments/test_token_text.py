"""Tokens as pieces of text, with the demo model's tokenizer and with what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments import token_text
from deployments.token_text import TokenizerText, split
from rollout.errors import RolloutError
from tests.deployments.viewing import MODEL, tokenizer

TEXT = "<|im_start|>user\nWie groß? ✓ 日本語 🎉<|im_end|>\n"


async def test_pieces_joined_are_the_text():
    tok = tokenizer()
    ids = tok.encode(TEXT, add_special_tokens=False).ids
    pieces = await TokenizerText(str(MODEL)).pieces([], ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT
    assert pieces[0] == "<|im_start|>"
    assert pieces[pieces.index("🎉") - 3 : pieces.index("🎉")] == ["", "", ""], "a character stands at its last token"


async def test_any_part_reads_as_in_the_whole():
    tok = tokenizer()
    ids = tok.encode("the numbers are small enough, and the calculator is there", add_special_tokens=False).ids
    text = TokenizerText(str(MODEL))
    whole = await text.pieces([], ids)
    for start in (1, 7, 20):
        assert await text.pieces(ids[:start], ids[start:]) == whole[start:]
    assert await text.pieces(ids, []) == []


def test_ids_and_bytes_that_are_no_text_cost_themselves_alone():
    tok = tokenizer()
    hello = tok.encode("Hello", add_special_tokens=False).ids
    assert "".join(split(tok, [10**6, *hello, 10**6, *hello])) == "HelloHello"
    half = tok.encode("日", add_special_tokens=False).ids[:1]
    pieces = split(tok, half * 50 + hello)
    assert len(pieces) == 50 + len(hello) and "".join(pieces).endswith("Hello")
    assert split(tok, half) == ["�"]


async def test_a_tokenizer_that_is_not_there_is_asked_for_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tried: list[str] = []

    def load(model: str, revision: str | None) -> object:
        tried.append(model)
        if len(tried) == 1:
            raise OSError("no such file")
        return tokenizer()

    monkeypatch.setattr(token_text, "load", load)
    text = TokenizerText("somewhere")
    for _ in range(2):
        with pytest.raises(RolloutError, match="tokenizer of somewhere cannot be loaded here: no such file"):
            await text.pieces([], [1])
    assert len(tried) == 1
    monkeypatch.setattr(token_text, "RETRY_S", 0.0)
    text._retry_at = 0.0
    assert len(await text.pieces([], [1])) == 1
