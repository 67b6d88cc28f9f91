"""A verifiers harness that runs inside the benchmark's process instead of launching a program.

verifiers finds harnesses by module name (this one's) and by ``__all__``. Its bundled chat harness starts a Python
process for every turn, which would measure process creation; its documented contract also lets a harness run
in-process as long as every model call goes through the interception server, and that is what this one does.
"""

from __future__ import annotations

from typing import Any

import aiohttp
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.task import TaskData
from verifiers.v1.trace import Trace

__all__ = ["InProcessHarness"]


class InProcessHarnessConfig(HarnessConfig):
    """Nothing to configure."""


class InProcessHarness(Harness[InProcessHarnessConfig]):
    """One chat completion a segment, over one connection pool for all episodes."""

    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    session_for_calls: aiohttp.ClientSession | None = None

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        """Ask for the next assistant message of the conversation in ``data.prompt``."""
        prompt = data.prompt or []
        messages: list[Any] = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else [message_to_wire(message) for message in prompt]
        )
        session = type(self).session_for_calls
        assert session is not None, "set InProcessHarness.session_for_calls first"
        async with session.post(
            f"{endpoint}/chat/completions",
            json={"model": ctx.model, "messages": messages},
            headers={"Authorization": f"Bearer {secret}"},
        ) as response:
            text = await response.text()
            failed = response.status >= 400
        return ProgramResult(exit_code=1 if failed else 0, stdout="", stderr=text if failed else "")
