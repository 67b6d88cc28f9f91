"""The chat formats that a trainer may name in a request: a list in the config, each loaded once.

Invariant: a name in a request is looked up, never opened: no file or hub repository is touched that the config does
not name, and no code of a model is run. Loading happens in a thread, once for each name, however many ask for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.remote.failures import RemoteFailure
from rollout.rendering import ChatRenderer, load_renderer

logger = logging.getLogger(__name__)

LOAD_SECONDS = 120.0


@dataclass(frozen=True)
class TokenizerSpec:
    """A chat format that may be asked for by a name."""

    path: str
    """Model directory or hub name."""
    revision: str | None = None
    renderer: str = "auto"
    renderer_options: dict[str, Any] = field(default_factory=dict)


Load = Callable[[str, str, dict[str, Any], str | None], ChatRenderer]


class Tokenizers:
    """A worker's chat formats. Belongs to one event loop."""

    def __init__(
        self,
        own: ChatRenderer,
        own_names: Mapping[str, str | None],
        allowed: Mapping[str, TokenizerSpec],
        load: Load = load_renderer,
    ) -> None:
        """`own`: the cluster's, asked for by no name or by one of `own_names`, with the revision of each."""
        self._own = own
        self._own_names = dict(own_names)
        self._allowed = dict(allowed)
        self._load = load
        self._loading: dict[str, asyncio.Task[ChatRenderer]] = {}

    async def get(self, name: str | None, revision: str | None) -> ChatRenderer:
        """The chat format that a request names. Raises RemoteFailure (`tokenizer_error`)."""
        if name is None:
            return self._own
        if name in self._allowed:
            _check_revision(name, revision, self._allowed[name].revision)
            return await self._loaded(name)
        if name in self._own_names:
            _check_revision(name, revision, self._own_names[name])
            return self._own
        known = ", ".join(sorted({*self._allowed, *self._own_names}))
        raise RemoteFailure(
            "tokenizer_error",
            f"tokenizer_name: this rollout server has no tokenizer of that name; it has {known or 'none by name'}. "
            "Leave it out for the rollout server's own, or let its operator add it to remote_rollout.tokenizers",
        )

    async def _loaded(self, name: str) -> ChatRenderer:
        task = self._loading.get(name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            # One that failed is tried again with the next request: a hub may be back.
            spec = self._allowed[name]
            task = asyncio.create_task(
                asyncio.to_thread(self._load, spec.path, spec.renderer, spec.renderer_options, spec.revision)
            )
            self._loading[name] = task
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                # One rollout that is cancelled must not cancel it for the others.
                return await asyncio.shield(task)
        except TimeoutError:
            raise RemoteFailure(
                "tokenizer_error", f"tokenizer_name: the tokenizer did not load within {LOAD_SECONDS:g} s"
            ) from None
        except Exception as failure:
            logger.error("the tokenizer %r of remote_rollout.tokenizers cannot be loaded", name, exc_info=failure)
            raise RemoteFailure(
                "tokenizer_error", "tokenizer_name: the tokenizer cannot be loaded; the rollout server's log says why"
            ) from None


def _check_revision(name: str, wanted: str | None, has: str | None) -> None:
    if wanted is not None and wanted != has:
        raise RemoteFailure(
            "tokenizer_error",
            f"tokenizer_revision: this rollout server has {has or 'no named revision'} of that tokenizer; send the "
            "same, or none",
        )
