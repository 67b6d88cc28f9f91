"""What Python reads as JSON and others do not is found, and named in text that can be sent."""

from __future__ import annotations

import json

import pytest

from rollout.strict_json import MAX_DEPTH, MAX_SHOWN, as_unicode, problems


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        ("NaN", "number", ""),
        ('{"a": [1, -Infinity]}', "number", "a.1"),
        ('{"a": 1e999}', "number", "a"),
        (r'{"messages": [{"content": "\ud83d"}]}', "text", "messages.0.content"),
        (r'{"a": {"\udc00": {"b": NaN}}}', "text", "a"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "depth", "a" + ".0" * (MAX_DEPTH - 1)),
    ],
)
def test_a_problem_is_named_with_its_place(text: str, kind: str, where: str):
    (found,) = problems(json.loads(text))
    assert (found.kind, found.where) == (kind, where[:MAX_SHOWN])
    str(found).encode()


def test_all_of_them_are_found():
    value = json.loads(r'{"a": NaN, "b": ["\ud800", {"c": Infinity}]}')
    assert {(problem.kind, problem.where) for problem in problems(value)} == {
        ("number", "a"),
        ("text", "b.0"),
        ("number", "b.1.c"),
    }


def test_good_json_has_none():
    value = {"a": [1, 0.5, None, True, "é🙂", {"ü": "x" * 10}], "b": {}, "deep": json.loads("[" * 100 + "]" * 100)}
    assert list(problems(value)) == []
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def test_halves_of_characters_become_question_marks():
    assert [as_unicode(text) for text in ("abc", "é🙂", "a\ud83d", "\udc00é")] == ["abc", "é🙂", "a?", "?é"]
