"""Secrets that nobody meant to write, in the forms in which they turn up, and prose that must stay as it is."""

from __future__ import annotations

import time

import pytest

from rollout.redaction import HIDDEN, MIN_SECRET_CHARS, Redactor, digest, digests, is_secret_name
from rollout.session_keys import session_key

KEY = "q8Zr-3xT_wPl0mN5vYc7Bd2Kf9Hs4Jg1"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJlX29mX2l0"


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {KEY}",
        f"authorization: {KEY}",
        f"{{'authorization': 'Bearer {KEY}', 'accept': '*/*'}}",
        f'{{"Authorization": "Basic {KEY}"}}',
        f"[(b'authorization', b'Bearer {KEY}'), (b'host', b'x')]",
        f"Proxy-Authorization: Digest {KEY}",
        f"sent bearer {KEY} to the server",
        f"Set-Cookie: session={KEY}; Path=/",
        f"GET /v1/models?key={KEY}&limit=3 failed",
        f"https://host/path?a=b&access_token={KEY}",
        f"https://host/path?x-api-key={KEY}#part",
        f"https://user:{KEY}@host/path",
        f"api_key={KEY}",
        f"OPENAI_API_KEY={KEY}",
        f'{{"api_key": "{KEY}", "model": "m"}}',
        f"AccessConfig(client_secret='{KEY}')",
        f"x-api-key: {KEY}",
        f"HF_TOKEN={KEY} python train.py",
        f"password: {KEY}",
        f"401 for sk-{KEY}",
        f"hf_{KEY} was refused",
        session_key(b"secret of the cluster", KEY) + " is nobody's",
        JWT.replace("c2lnbmF0dXJlX29mX2l0", KEY),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str):
    clean = Redactor()(text)
    assert KEY not in clean and HIDDEN in clean, clean


def test_what_stands_beside_it_stays():
    redact = Redactor()
    assert redact(f"GET /v1/models?key={KEY}&limit=3 failed") == f"GET /v1/models?key={HIDDEN}&limit=3 failed"
    assert redact(f"{{'authorization': 'Bearer {KEY}', 'a': 1}}") == f"{{'authorization': 'Bearer {HIDDEN}', 'a': 1}}"
    assert redact(f"https://ann:{KEY}@host/x") == f"https://{HIDDEN}@host/x"
    assert redact(f"token {JWT}.") == f"token {HIDDEN}."
    assert redact(session_key(b"s", "a" * 32)) == f"ses_{HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "session ended with stop after 1.25 s: reward 1.0, 312 tokens sampled, attempt 1",
        "max_tokens=512, stop_token_ids=[1, 2], tokens: 12345678",
        "POST '/v1/runs' of ann refused: 403 the key `ann` lacks the scope `admin`",
        "run a/b?limit=100&cursor=abcdefghijkl",
        "the basic idea is to bear with it; uses_the_same_thing_twice",
        "trajectory run-1/task-77/3 in https://host:8800/v1/runs",
        "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
    ],
)
def test_prose_stays_as_it_is(text: str):
    assert Redactor()(text) == text
    assert Redactor([digest(KEY)])(text) == text


@pytest.mark.parametrize(
    "text", [KEY, f"'{KEY}'", f"see {KEY}.", f"x={KEY}", f"/path/{KEY}/x", f"({KEY})", f"a,{KEY},b", f"{KEY}\n{KEY}"]
)
def test_a_known_secret_is_found_wherever_it_stands(text: str):
    assert Redactor([digest(KEY).upper()])(text) == text.replace(KEY, HIDDEN)
    assert Redactor([digest("another" * 4)])(text) == text


def test_known_secrets_of_other_letters():
    base64 = "q8Zr+3xT/wPl0mN5vYc7Bd2Kf9Hs4Jg1=="
    redact = Redactor(digests([f"Bearer {base64}"]))
    assert redact(f"sent {base64} there") == f"sent {HIDDEN} there"
    assert redact(f"key={base64}") == f"key={HIDDEN}"


def test_short_values_are_not_known_or_every_word_would_be_one():
    assert digests(["x", "true", "a" * (MIN_SECRET_CHARS - 1)]) == frozenset()
    assert digests(["a" * MIN_SECRET_CHARS]) == {digest("a" * MIN_SECRET_CHARS)}


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "api-key", "X-Api-Key", "Authorization", "DB_PASSWORD", "AWS_CREDENTIALS"]
)
def test_names_of_secrets(name: str):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "Content-Type", "OMP_NUM_THREADS"])
def test_names_of_others(name: str):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "unit", ["a-", "token", "key=", "bearer ", "://", "eyJ", "a_b-c.", "&key=", "authorization "]
)
def test_hostile_text_takes_no_time_of_its_length_squared(unit: str):
    text = (unit * 100_000)[:100_000]
    started = time.perf_counter()
    Redactor([digest(KEY)])(text)
    # About 0.1 s, and minutes if it were squared.
    assert time.perf_counter() - started < 5.0
