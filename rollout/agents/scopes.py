"""Scopes: who may use what. admin may do all that an owner may, an owner all that everybody may.

`owner` is between a caller and one agent: the agent lists its owners by the names that the gate gives to callers (a
key's name, `jwt:SUBJECT`). `all` and `admin` are the caller's own, whatever it speaks to.

Invariant: one comparison decides both what a caller is offered and what is run for them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from rollout.errors import ApiError

Scope = Literal["all", "owner", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""From the weakest to the strongest."""


class ForbiddenError(ApiError):
    """The caller is known and may not do this."""

    category = "forbidden"
    status = 403


def granted(scopes: Collection[str], caller: str, owners: Collection[str]) -> frozenset[str]:
    """A caller's scopes with one agent. An owner without a scope of its own stays without: nobody let it in."""
    return frozenset(scopes) | ({"owner"} if scopes and caller in owners else frozenset())


def rank(scopes: Collection[str]) -> int:
    """How much a caller with these scope names may do: the index of the strongest in SCOPES.

    Names of other parts of the system count as `all`. Raises ForbiddenError for none at all: a caller whose
    authentication gave nothing must not go on as everybody.
    """
    if not scopes:
        raise ForbiddenError("the caller has no scope; use a key that has one")
    return max(SCOPES.index(name) if name in SCOPES else 0 for name in scopes)


def allowed(needed: Scope, caller: int) -> bool:
    """Whether a caller of this rank has the scope that is needed."""
    return SCOPES.index(needed) <= caller
