"""A failed remote rollout as the protocol names it.

Invariant: every failure that can end a remote rollout has one of the protocol's categories and a text that may leave
the house: no stack, no foreign exception's words, no key.
"""

from __future__ import annotations

from rollout.errors import RolloutError
from rollout.remote.wire import ErrorCategory


class RemoteFailure(RolloutError):
    """The rollout cannot go on. The message is sent to the trainer."""

    category = "remote"

    def __init__(self, error_category: ErrorCategory, message: str) -> None:
        super().__init__(error_category, message)
        self.error_category = error_category
        self.message = message

    def __str__(self) -> str:
        return self.message


# Our own categories (rollout.errors) in the protocol's words, for errors that other rooms raise.
_BY_CATEGORY: dict[str, ErrorCategory] = {
    "tool": "tool_error",
    "config": "tool_error",
    "render": "tokenizer_error",
    "prefix": "tokenizer_error",
    "ledger": "trainer_error",
}
_TEXTS: dict[ErrorCategory, str] = {
    "tool_error": "a tool of the environment cannot be reached; the rollout server's log says which",
    "tokenizer_error": "the conversation and its tokens do not fit together; the rollout server's log says where",
    "trainer_error": "the trainer's token arrays do not fit together; the rollout server's log says how",
    "internal_error": "the rollout failed in the rollout server; its log has the reason",
}


def foreign_words(described: str | None) -> RemoteFailure:
    """What may be told of an error that another room described as `category: message`; its own words stay here."""
    category = _BY_CATEGORY.get((described or "").partition(":")[0], "internal_error")
    return RemoteFailure(category, _TEXTS[category])
