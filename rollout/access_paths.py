"""Which path needs which scope: one table for everything that speaks HTTP.

Invariant: no spelling of a path needs less than the plain one, and no path needs less than the route that it may
reach. A path is read twice, as routers see it and as it is without double slashes, dot segments and percent signs;
the stricter reading counts, and what stands in no row needs `admin`.
"""

from __future__ import annotations

import functools
import posixpath
from typing import Literal
from urllib.parse import unquote

Scope = Literal["serve", "trainer", "admin"]
Need = Scope | Literal["any"]
"""`any`: one of the scopes, whichever."""
Form = Literal["openai", "anthropic", "remote", "ours"]
"""Whose error bodies a path's clients understand."""

SCOPES: tuple[Scope, ...] = ("serve", "trainer", "admin")
# Percent-decoding is repeated until nothing changes; nobody encodes more often than this in good faith.
MAX_DECODINGS = 8
# Paths whose reading is remembered. Run names make them many; a path forgotten costs microseconds.
CACHED_PATHS = 4096
# Longer ones are nobody's, and must not fill the cache.
MAX_PATH_CHARS = 2048

_READ = frozenset({"GET", "HEAD"})
_POST = frozenset({"POST"})
_ANY = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})

# A pattern's "*" is one segment, "**" at the end any number of them, none included. The first row that fits counts.
# scope None: open to everybody.
_TABLE: tuple[tuple[str, frozenset[str], Need | None], ...] = (
    ("/health", _READ, None),
    ("/ready", _READ, None),
    ("/metrics", _READ, "any"),
    # The page and its scripts hold nothing; what they show is asked for with the reader's own key.
    ("/ui/**", _READ, None),
    # Remote rollout servers come with the key of one rollout, which the route itself looks at (routes.foreign).
    ("/remote/*/v1/completions", _POST, None),
    ("/remote/*/v1/chat/completions", _POST, None),
    ("/remote/*/v1/rollout/completed", _POST, None),
    # OpenAI's and Anthropic's, as vLLM serves them.
    ("/v1/chat/completions", _POST, "serve"),
    ("/v1/completions", _POST, "serve"),
    ("/v1/responses", _POST, "serve"),
    ("/v1/responses/*", _READ | {"DELETE"}, "serve"),
    ("/v1/responses/*/cancel", _POST, "serve"),
    ("/v1/models/**", _READ, "serve"),
    ("/tokenize", _POST, "serve"),
    ("/detokenize", _POST, "serve"),
    ("/v1/messages", _POST, "serve"),
    ("/v1/messages/count_tokens", _POST, "serve"),
    # Ours.
    ("/v1/inference/**", _ANY, "serve"),
    ("/v1/loading/progress", _READ, "serve"),
    ("/docs/**", _READ, "serve"),
    ("/openapi.json", _READ, "serve"),
    # To register and remove agents is to change what everybody is served; to talk to one, below its name, is not.
    ("/agents/**", _READ, "serve"),
    ("/agents/*/*/**", _POST, "serve"),
    ("/v1/runs/**", _ANY, "trainer"),
    ("/v1/leases/**", _ANY, "trainer"),
    ("/v1/batches/**", _ANY, "trainer"),
    ("/v1/rollout/**", _ANY, "trainer"),
    # The remote rollout protocol's own paths, as the rollout server.
    ("/rollout", _POST, "trainer"),
    ("/tools", _READ, "trainer"),
    ("/platform/health", _READ, "trainer"),
    ("/v1/sessions/**", _ANY, "trainer"),
    ("/v1/trajectories/**", _READ, "trainer"),
    ("/v1/weights", _READ, "trainer"),
)
# Families whose clients expect error bodies of their own; all other paths have ours.
_FORMS: tuple[tuple[str, Form], ...] = (
    ("/v1/messages/**", "anthropic"),
    ("/v1/chat/**", "openai"),
    ("/v1/completions/**", "openai"),
    ("/v1/responses/**", "openai"),
    ("/v1/models/**", "openai"),
    ("/v1/embeddings", "openai"),
    ("/v1/audio/**", "openai"),
    ("/agents/**", "openai"),
    ("/tokenize", "openai"),
    ("/detokenize", "openai"),
    # The remote rollout protocol's, as the rollout server.
    ("/v1/rollout/**", "remote"),
    ("/rollout", "remote"),
    ("/tools", "remote"),
    ("/platform/health", "remote"),
)


def needed_scope(method: str, path: str) -> Need | None:
    """The scope that a request needs; None where everybody may. `path`: as the server decoded it, without a query."""
    if len(path) > MAX_PATH_CHARS:
        return "admin"
    return _needed(method, path)


@functools.lru_cache(CACHED_PATHS)
def _needed(method: str, path: str) -> Need | None:
    # Routers match the path as it stands, with or without a slash at its end.
    literal = path[:-1] if path.endswith("/") and len(path) > 1 else path
    seen, meant = _row(method, literal), _row(method, normalised(path))
    if seen is None or meant is None or seen == meant:
        return seen or meant
    # serve and trainer do not imply each other.
    return "admin"


def error_form(path: str) -> Form:
    """Whose form an error about this path has."""
    segments = normalised(path[:MAX_PATH_CHARS]).split("/")[1:]
    return next((form for pattern, form in _FORMS if _fits(pattern, segments)), "ours")


def normalised(path: str) -> str:
    """The path in its plain spelling: decoded, without double slashes, dot segments and a slash at its end.

    One that is still encoded after MAX_DECODINGS keeps what is left, and so stands in no table.
    """
    for _ in range(MAX_DECODINGS):
        decoded = unquote(path)
        if decoded == path:
            break
        path = decoded
    # normpath keeps exactly two slashes at the beginning, as POSIX has it.
    return posixpath.normpath("/" + path.replace("\\", "/").lstrip("/"))


def _row(method: str, path: str) -> Need | None:
    if not path.startswith("/"):
        return "admin"
    segments = path.split("/")[1:]
    for pattern, methods, scope in _TABLE:
        if method in methods and _fits(pattern, segments):
            return scope
    return "admin"


def _fits(pattern: str, segments: list[str]) -> bool:
    wanted = pattern.split("/")[1:]
    if wanted[-1] == "**":
        wanted = wanted[:-1]
        if len(segments) < len(wanted):
            return False
    elif len(segments) != len(wanted):
        return False
    return all(want == got or (want == "*" and got != "") for want, got in zip(wanted, segments, strict=False))
