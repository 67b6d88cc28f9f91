"""What requests of the OpenAI side are given on their way to the engine: the salt and the policy's adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.served_client import salt, serve_policy

POLICY = object()


class ScriptedClient:
    """A TEST DOUBLE of vLLM's AsyncLLM: remembers what it was asked, says what it was told to."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.asked: list[tuple[Any, Any, str, dict[str, Any]]] = []
        self.closed = 0

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((prompt, sampling_params, request_id, options))
        try:
            for output in self.outputs:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            self.closed += 1


class Policy:
    """The weights' version and adapter, now."""

    def __init__(self, version: int = 3, adapter: Any = None) -> None:
        self.version = version
        self.adapter = adapter


def served(*outputs: Any, **policy: Any) -> tuple[ScriptedClient, Policy]:
    client, now = ScriptedClient(*outputs), Policy(**policy)
    serve_policy(client, lambda: now.version, lambda: now.adapter)
    return client, now


async def ask(client: ScriptedClient, prompt: Any = None, **options: Any) -> list[Any]:
    given = {"prompt_token_ids": [1, 2]} if prompt is None else prompt
    return [output async for output in client.generate(given, "params", "id-1", **options)]


async def test_the_request_goes_on_as_it_came_with_the_version_as_its_salt():
    client, _ = served("a", "b")
    assert await ask(client, priority=1, trace_headers=None) == ["a", "b"]
    assert client.asked == [
        (
            {"prompt_token_ids": [1, 2], "cache_salt": "3"},
            "params",
            "id-1",
            {"lora_request": None, "priority": 1, "trace_headers": None},
        )
    ]


async def test_the_callers_prompt_is_not_changed():
    client, _ = served()
    prompt = {"prompt_token_ids": [1], "cache_salt": "mine"}
    await ask(client, prompt)
    assert prompt == {"prompt_token_ids": [1], "cache_salt": "mine"}
    assert client.asked[0][0]["cache_salt"] == "3 mine"


async def test_the_version_and_the_adapter_are_those_of_the_request_and_not_of_the_start():
    client, now = served()
    await ask(client)
    now.version, now.adapter = 4, POLICY
    await ask(client)
    assert [prompt["cache_salt"] for prompt, *_ in client.asked] == ["3", "4"]
    assert [options["lora_request"] for *_, options in client.asked] == [None, POLICY]


async def test_who_names_an_adapter_gets_that_one():
    other = object()
    client, _ = served(adapter=POLICY)
    await ask(client, lora_request=other)
    assert client.asked[0][3]["lora_request"] is other


async def test_a_prompt_that_is_no_dictionary_goes_on_as_it_is():
    client, _ = served("a")
    assert await ask(client, "text") == ["a"]
    assert client.asked[0][0] == "text"


async def test_what_the_engine_raises_comes_through():
    client, _ = served("a", RuntimeError("engine died"))
    with pytest.raises(RuntimeError, match="engine died"):
        await ask(client)


async def test_a_stream_that_is_left_is_closed_in_the_engine_at_once():
    client, _ = served("a", "b")
    stream: Any = client.generate({"prompt_token_ids": [1]}, "params", "id-1")
    assert await anext(stream) == "a"
    await stream.aclose()
    assert client.closed == 1


# The salt


def test_a_request_without_a_salt_shares_the_cache_of_the_rollouts():
    assert salt(None, 7) == salt("7", 7) == "7"


@given(st.text(min_size=1), st.text(min_size=1), st.integers(0, 99), st.integers(0, 99))
def test_no_other_salt_finds_what_was_computed_under_other_weights(one: str, other: str, first: int, second: int):
    if first != second:
        assert salt(one, first) != salt(other, second)
        assert salt(None, first) != salt(other, second)
    elif one != other:
        assert salt(one, first) != salt(other, second), "and salts of their own keep callers apart"
