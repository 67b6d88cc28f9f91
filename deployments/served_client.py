"""What every request of the OpenAI side passes on its way to vLLM's AsyncLLM.

Invariant: keys and values computed under other weights are never found again (the version salts the prefix cache, as
it does for rollouts); where the policy is an adapter, who names no adapter gets the policy; requests of captured
sessions are followed. Nothing stands between an output and its reader otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from deployments.capture import RECORDING


def serve_policy(client: Any, version: Callable[[], int], adapter: Callable[[], Any]) -> None:
    """Replace `client.generate` by one that serves the current policy.

    `version`: of the weights, now. `adapter`: the policy's LoRARequest, now; None where it has none.
    """
    generate = client.generate

    def serve(
        prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> AsyncGenerator[Any]:
        recording = RECORDING.get()
        if recording is not None:
            sampling_params = recording.asked(sampling_params)
        if isinstance(prompt, dict):
            prompt = {**prompt, "cache_salt": salt(prompt.get("cache_salt"), version())}
        stream = generate(prompt, sampling_params, request_id, lora_request=lora_request or adapter(), **options)
        return stream if recording is None else recording.follow(stream)

    client.generate = serve


def salt(asked: str | None, version: int) -> str:
    """The cache salt of a request that may bring one of its own. Without, it is that of the rollouts."""
    return str(version) if asked is None or asked == str(version) else f"{version} {asked}"
