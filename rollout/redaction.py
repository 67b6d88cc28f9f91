"""Takes secrets out of text that is about to be written somewhere.

Two ways: by form (what stands behind `Authorization`, `token=`, `ses_` and the like), and by value: words whose
SHA-256 is that of a known secret, so that no secret has to be handed to those who must not write it.

Invariant: what is taken out leaves `***` in its place and nothing of itself. It is no fence for texts that somebody
made in order to smuggle a secret out; it is for the URL, header or exception that nobody thought of.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

HIDDEN = "***"
# Shorter words are not looked up by their hash: keys are longer, and every word would have to be hashed.
MIN_SECRET_CHARS = 16

# Whether the patterns below can find anything: most lines have none of these words, and cost one search.
_HINT = re.compile(r"auth|bearer|basic|key|token|secret|passw|cookie|sig|ses_|sk-|hf_|gh[pousr]_|xox|eyj|://", re.I)
# In headers written as text, as a dict or as pairs of bytes.
_GAP = r"""["']?\s*[:=,]\s*(?:b(?=["']))?["']?"""
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"(authorization{_GAP}\s*(?:(?:bearer|basic|digest|token)\s+)?)[^\s\"',;)\]}}]+", re.I), r"\1"),
    (re.compile(rf"((?:set-)?cookie{_GAP}\s*)[^\"'\r\n)\]}}]+", re.I), r"\1"),
    (re.compile(r"\b(bearer\s+)[\w\-.~+/]{8,}=*", re.I), r"\1"),
    # Longer than any word of prose that follows "basic".
    (re.compile(r"\b(basic\s+)[A-Za-z0-9+/\-_]{16,}=*", re.I), r"\1"),
    # Ours, and those of the usual providers: their prefix says what they are.
    (re.compile(r"\b(ses_|sk-|hf_|gh[pousr]_|github_pat_|xox[abprs]-)[\w\-./]{8,}"), r"\1"),
    (re.compile(r"\beyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?"), ""),
    (re.compile(r"(://)[^/\s:@\"']{0,256}:[^/\s@\"']{1,256}(?=@)"), r"\1"),
    (
        re.compile(
            r"([?&](?:[\w.-]{0,40}[_.-])?(?:api-?key|key|token|secret|password|passwd|pwd|signature|sig)=)"
            r"[^&\s\"'#)>\]}]+",
            re.I,
        ),
        r"\1",
    ),
    # Bounded repetitions: a line of hostile text must not take the time of its length squared.
    (
        re.compile(
            r"((?<![A-Za-z0-9])(?:[\w-]{0,40}[_-])?(?:api[_-]?key|secret[_-]?key|access[_-]?key|token|secret|"
            rf"password|passwd){_GAP})[^\s\"',;&)\]}}]{{6,}}",
            re.I,
        ),
        r"\1",
    ),
)
_WORD = re.compile(rf"[A-Za-z0-9_\-+/=.~]{{{MIN_SECRET_CHARS},}}")
_PLAIN_WORD = re.compile(rf"[A-Za-z0-9_\-]{{{MIN_SECRET_CHARS},}}")


# Of environment variables and of headers, in any spelling.
_SECRET_NAME = re.compile(r"(key|token|secret|passw(or)?d|credentials?|authorization|cookie)s?$", re.I)


def is_secret_name(name: str) -> bool:
    """Whether a variable or header of this name holds a secret: `HF_TOKEN`, `X-Api-Key`."""
    return _SECRET_NAME.search(name) is not None


def digest(secret: str) -> str:
    """SHA-256 of a secret in hexadecimal, as API keys are configured."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def digests(values: Iterable[str]) -> frozenset[str]:
    """The hashes by which `Redactor` knows these values, and the words that they are made of (`Bearer KEY`)."""
    words = {word for value in values for word in (value, *value.split()) if len(word) >= MIN_SECRET_CHARS}
    return frozenset(map(digest, words))


class Redactor:
    """Takes out what looks like a secret, and what is known to be one."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        """`known`: SHA-256 hashes (hexadecimal) of secrets of at least MIN_SECRET_CHARS characters."""
        self._known = frozenset(hash_.lower() for hash_ in known)

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if _HINT.search(text) is not None:
            for pattern, kept in _FORMS:
                text = pattern.sub(kept + HIDDEN, text)
        return _WORD.sub(self._checked, text) if self._known else text

    def _checked(self, found: re.Match[str]) -> str:
        word = found[0]
        core = word.rstrip(".")
        if digest(core) in self._known:
            return HIDDEN + word[len(core) :]
        name, equals, value = word.partition("=")
        if equals and len(value) >= MIN_SECRET_CHARS and digest(value.rstrip(".")) in self._known:
            return name + equals + HIDDEN
        return _PLAIN_WORD.sub(lambda part: HIDDEN if digest(part[0]) in self._known else part[0], word)
