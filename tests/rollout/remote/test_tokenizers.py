"""Tokenizers by name: a list, each loaded once, nothing else ever opened."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from rollout.errors import RenderError
from rollout.remote.failures import RemoteFailure
from rollout.remote.tokenizers import Tokenizers, TokenizerSpec

OWN: Any = object()


class Loads:
    """Counts what is loaded, in whichever thread."""

    def __init__(self, failures: int = 0) -> None:
        self.paths: list[str] = []
        self.failures = failures

    def __call__(self, path: str, renderer: str, options: dict[str, Any], revision: str | None) -> Any:
        self.paths.append(path)
        time.sleep(0.01)
        if len(self.paths) <= self.failures:
            raise RenderError("/secret/path cannot be loaded")
        return (path, renderer, options, revision)


def shelf(loads: Loads) -> Tokenizers:
    allowed = {"q": TokenizerSpec("/models/q", "v1", "qwen3", {"a": 1}), "free": TokenizerSpec("/models/free")}
    return Tokenizers(OWN, {"demo": None, "org/demo": "main"}, allowed, load=loads)


async def test_no_name_and_own_names_are_the_clusters():
    tokenizers = shelf(Loads())
    assert await tokenizers.get(None, None) is OWN
    assert await tokenizers.get(None, "any") is OWN
    assert await tokenizers.get("demo", None) is OWN
    assert await tokenizers.get("org/demo", "main") is OWN


async def test_many_who_ask_at_once_load_once():
    loads = Loads()
    tokenizers = shelf(loads)
    found = await asyncio.gather(*(tokenizers.get("q", "v1") for _ in range(10)))
    assert loads.paths == ["/models/q"]
    assert found[0] == ("/models/q", "qwen3", {"a": 1}, "v1") and all(one is found[0] for one in found)


@pytest.mark.parametrize(
    ("name", "revision", "told"),
    [
        ("other/repo", None, "has demo, free, org/demo, q"),
        ("../../etc", None, "no tokenizer of that name"),
        ("q", "v2", "v1"),
        ("org/demo", "dev", "main"),
        ("demo", "dev", "no named revision"),
    ],
)
async def test_what_is_not_listed_is_refused_and_not_opened(name: str, revision: str | None, told: str):
    loads = Loads()
    with pytest.raises(RemoteFailure, match=told) as caught:
        await shelf(loads).get(name, revision)
    assert caught.value.error_category == "tokenizer_error" and loads.paths == []


async def test_a_load_that_failed_is_tried_again_and_its_words_stay_here():
    loads = Loads(failures=1)
    tokenizers = shelf(loads)
    with pytest.raises(RemoteFailure) as caught:
        await tokenizers.get("free", None)
    assert "secret" not in str(caught.value)
    assert (await tokenizers.get("free", None))[0] == "/models/free"


async def test_one_who_gives_up_does_not_stop_it_for_the_others():
    tokenizers = shelf(Loads())
    first = asyncio.create_task(tokenizers.get("free", None))
    second = asyncio.create_task(tokenizers.get("free", None))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)[0] == "/models/free"
