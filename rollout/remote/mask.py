"""What a response mask means: one value for every token that was added to the context since the trainer's answer.

Invariant: sampled tokens are the trainer's and get 1 from the trainer itself; the mask of a call covers the added
tokens alone, all 0, and has exactly as many values as the chat template put between two generations. Nothing is cut
or padded to fit: what does not fit is an error that says where it probably comes from.

With P_n the length of the n-th prompt and G_n the tokens of the n-th answer: mask_1 is null, and
mask_n = [0] * (P_n - (P_{n-1} + len(G_{n-1}))), null where nothing was added.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.errors import PrefixError
from rollout.ledger import IDS, MASK, first_difference


class MaskBook:
    """Masks as a rollout server sends them, and what they add up to."""

    def __init__(self) -> None:
        self._prompt: array[int] = array(IDS)
        self.response_ids: array[int] = array(IDS)
        """Everything after the first prompt, sampled and added."""
        self.response_mask: array[int] = array(MASK)
        """1 where response_ids was sampled, 0 where it was added; of the same length."""
        self._calls = 0
        self._waiting = False

    @property
    def last(self) -> int:
        """Tokens of the context after the last answer."""
        return len(self._prompt) + len(self.response_ids)

    def prompt(self, prompt_ids: Sequence[int]) -> list[int] | None:
        """Take the prompt of the next call. Returns the mask to send with it.

        Raises PrefixError where the prompt does not begin, token by token, with the context so far.
        """
        if self._waiting:
            raise PrefixError("two prompts in a row without an answer between them")
        ids = array(IDS, prompt_ids)
        if self._calls == 0:
            self._prompt, self._calls, self._waiting = ids, 1, True
            return None
        position = first_difference(ids, self._prompt, self.response_ids)
        if position is not None:
            raise PrefixError(
                f"prompt {self._calls + 1} has {len(ids)} tokens and leaves the context of {self.last} tokens at "
                f"position {position}: the past must not change, not even at the same length"
            )
        self._calls, self._waiting = self._calls + 1, True
        added = ids[self.last :]
        self.response_ids.extend(added)
        self.response_mask.frombytes(bytes(len(added)))
        return expect_mask(len(added), first=False)

    def answer(self, token_ids: Sequence[int]) -> None:
        """Take the tokens that the trainer sampled."""
        if not self._waiting:
            raise PrefixError("an answer without a prompt before it")
        self.response_ids.extend(array(IDS, token_ids))
        self.response_mask.extend(array(MASK, [1]) * len(token_ids))
        self._waiting = False


def expect_mask(added: int, *, first: bool) -> list[int] | None:
    """The one right mask of a call before which `added` tokens came to the context.

    Raises PrefixError for a negative number: the history became shorter.
    """
    if added < 0:
        raise PrefixError(f"the prompt has {-added} tokens less than the context before it; history only grows")
    return None if first or added == 0 else [0] * added


@dataclass(slots=True, frozen=True)
class MaskHints:
    """What the trainer knows beside the number of added tokens. It only makes an error say more; all optional."""

    prompt: int | None = None
    """Tokens of the whole prompt of this call."""
    answer: int | None = None
    """Tokens of the answer before it."""
    text: int | None = None
    """Tokens of the new messages' bare text, without the template around it."""
    end_of_turn_sampled: bool | None = None
    """Whether the answer before it ended with the model's end-of-turn token."""


def check_mask(given: Sequence[int] | None, added: int, *, first: bool, hints: MaskHints | None = None) -> str | None:
    """Whether a mask is the right one for a call; None, or what is wrong with it and what to do.

    `added`: tokens between the answer before and this call's generation, by the trainer's own template and
    tokenizer; on the first call nothing counts as added. An empty mask is as good as none.
    """
    length = 0 if given is None else len(given)
    if first:
        if length == 0:
            return None
        return (
            f"response_mask has {length} values on the first call of the rollout, where it must be null: it is for "
            "tokens added since the answer before, and there is none. A mask belongs to the call after the tools, "
            "not to the one before them"
        )
    if added < 0:
        return (
            f"the history became shorter by {-added} tokens: it may only grow. Do not cut it, not even with a mask; "
            "end the rollout as max_tokens instead"
        )
    if length == 0:
        if added == 0:
            return None
        return (
            f"response_mask is missing: {added} tokens were added since the answer before (tool results and the "
            f"template around them), so it must be {added} zeros"
        )
    assert given is not None
    odd = next((index for index, value in enumerate(given) if value not in (0, 1)), None)
    if odd is not None:
        return f"response_mask[{odd}] is {given[odd]}; only 0 and 1 mean something, and added tokens are 0"
    if length != added:
        return (
            f"response_mask has {length} values, but {added} tokens were added since the answer before: "
            f"{_likely(length, added, hints or MaskHints())}"
        )
    ones = sum(given)
    if ones:
        return (
            f"response_mask[{list(given).index(1)}] is 1 ({ones} of {length} values are): every added token is 0; "
            "the trainer itself gives 1 to what it sampled"
        )
    return None


def _likely(given: int, added: int, hints: MaskHints) -> str:
    """The most likely reason of a wrong length."""
    if hints.text is not None and given == hints.text:
        return (
            "that is the number of tokens of the new messages' text alone. Count the template's tokens too: the "
            "length of the whole rendered prompt, less the one before, less its answer"
        )
    if hints.prompt is not None and given == hints.prompt:
        return "that is the whole prompt. The mask covers only what was added since the answer before"
    if hints.answer and given == added + hints.answer:
        return (
            f"that is {hints.answer} more, as many as the answer before has. Its tokens are the trainer's; after an "
            "answer add the number of its token_ids to what you have counted"
        )
    if given == added + 1:
        sampled = " (here it did)" if hints.end_of_turn_sampled else ""
        return (
            "one more. Was the end-of-turn token counted as added? It is sampled wherever token_ids ends with it"
            + sampled
        )
    if given == added - 1:
        missing = " (here it does not)" if hints.end_of_turn_sampled is False else ""
        return (
            "one less. Was the end-of-turn token counted as sampled? It is added, as a 0, wherever token_ids does "
            "not end with it" + missing
        )
    return (
        "is the tokenizer or the chat template another than the trainer's, was the history rendered anew (a template "
        "may change what came before), or was a tool's text cut after it was counted?"
    )
