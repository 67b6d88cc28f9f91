"""`@tool`: the schema that the model is shown, and what is refused when it is made."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from rollout.tool_calls import ToolCall, ToolSet
from rollout.tools import Tool, tool


class Place(BaseModel):
    """A place."""

    city: str
    country: str = "NL"


def outcome(made: Tool, **arguments: Any) -> str:
    call = ToolCall("1", made.name, arguments)
    return asyncio.run(ToolSet([made]).call(call, timeout=5, max_output_chars=1000)).content


def test_the_schema_comes_from_annotations_and_docstring():
    @tool
    def search(query: str, limit: int = 10, *, exact: bool = False) -> list[str]:
        """Search the archive.

        Newest first.

        Args:
            query: What to look for,
                in one line.
            limit: Most results.
        """
        return [query] * limit

    assert search.spec == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the archive. Newest first.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to look for, in one line."},
                    "limit": {"type": "integer", "default": 10, "description": "Most results."},
                    "exact": {"type": "boolean", "default": False},
                },
                "required": ["query"],
            },
        },
    }
    # The order is part of the prompt: type first, as models have read it most.
    assert list(search.parameters["properties"]["query"]) == ["type", "description"]
    assert list(search.parameters) == ["type", "properties", "required"]


@pytest.mark.parametrize(
    "doc",
    [
        "Do it.\n\nArgs:\n    a: The a.",
        "Do it.\n\nParameters\n----------\na : int\n    The a.",
        "Do it.\n\n:param a: The a.",
    ],
    ids=["google", "numpy", "rest"],
)
def test_three_styles_of_docstring(doc: str):
    def f(a: int) -> int:
        return a

    f.__doc__ = doc
    made = tool(f)
    assert made.description == "Do it."
    assert made.parameters["properties"] == {"a": {"type": "integer", "description": "The a."}}


def test_a_tool_without_parameters():
    @tool
    def now() -> str:
        """The time."""
        return "noon"

    assert now.parameters == {"type": "object", "properties": {}}
    assert outcome(now) == "noon"


def test_name_and_description_can_be_given():
    @tool(name="web_search", description="Search the web.")
    def f(q: str) -> str:
        return q

    assert (f.name, f.description) == ("web_search", "Search the web.")


def test_a_decorated_function_is_still_called_as_before():
    @tool
    def double(x: int) -> int:
        """Double it."""
        return 2 * x

    assert double(21) == 42 and double(x=4) == 8


def test_models_and_enumerations_have_no_titles():
    @tool
    def visit(place: Place, how: Literal["train", "car"]) -> str:
        """Visit a place."""
        return f"{place.city}, {place.country} by {how}"

    assert visit.parameters == {
        "type": "object",
        "properties": {
            "place": {"$ref": "#/$defs/Place"},
            "how": {"type": "string", "enum": ["train", "car"]},
        },
        "required": ["place", "how"],
        "$defs": {
            "Place": {
                "type": "object",
                "description": "A place.",
                "properties": {"city": {"type": "string"}, "country": {"type": "string", "default": "NL"}},
                "required": ["city"],
            }
        },
    }
    assert outcome(visit, place={"city": "Delft"}, how="train") == "Delft, NL by train"


def test_parameters_may_have_the_names_of_schema_keywords():
    @tool
    def book(title: str, type: str, required: int) -> str:
        """Book it."""
        return f"{title}/{type}/{required}"

    assert book.parameters == {
        "type": "object",
        "properties": {"title": {"type": "string"}, "type": {"type": "string"}, "required": {"type": "integer"}},
        "required": ["title", "type", "required"],
    }
    assert outcome(book, title="t", type="k", required=1) == "t/k/1"


def test_a_parameter_may_be_called_properties():
    @tool
    def f(properties: int) -> int:
        """Do it."""
        return properties

    assert f.parameters["properties"] == {"properties": {"type": "integer"}}


def test_a_default_is_shown_as_it_is():
    @tool
    def f(options: dict[str, str] = {"title": "x", "a": "b"}) -> str:  # noqa: B006
        """Do it."""
        return str(options)

    assert f.parameters["properties"]["options"]["default"] == {"title": "x", "a": "b"}


def test_a_description_in_the_annotation_is_shown():
    @tool
    def f(count: Annotated[int, Field(description="How many.", ge=1)]) -> int:
        """Do it."""
        return count

    assert f.parameters["properties"]["count"] == {"type": "integer", "description": "How many.", "minimum": 1}


def test_bounds_in_the_annotation_are_shown_and_checked():
    @tool
    def f(count: Annotated[int, Field(ge=1, le=3)]) -> int:
        """Do it."""
        return count

    assert f.parameters["properties"]["count"] == {"type": "integer", "minimum": 1, "maximum": 3}
    assert outcome(f, count=3) == "3"
    assert outcome(f, count=4) == "Error: invalid arguments for f: count: Input should be less than or equal to 3"


def test_a_function_that_cannot_be_described_is_refused():
    def undocumented(a: int) -> int:
        return a

    def untyped(a) -> int:
        """Do it."""
        return a

    def variable(*args: int) -> int:
        """Do it."""
        return sum(args)

    def keywords(**options: int) -> int:
        """Do it."""
        return len(options)

    for function, message in (
        (undocumented, "tool 'undocumented' has no docstring"),
        (untyped, "tool 'untyped': parameter 'a' has no type annotation"),
        (variable, r"tool 'variable': \*args has no schema"),
        (keywords, r"tool 'keywords': \*options has no schema"),
    ):
        with pytest.raises(TypeError, match=message):
            tool(function)


class Counter:
    """Holds a decorated method."""

    def __init__(self, start: int) -> None:
        self.value = start

    @tool
    async def add(self, amount: int) -> int:
        """Add to the counter.

        Args:
            amount: How much.
        """
        self.value += amount
        return self.value


def test_a_decorated_method_belongs_to_its_instance():
    first, second = Counter(0), Counter(100)
    assert first.add.parameters["properties"] == {"amount": {"type": "integer", "description": "How much."}}
    assert outcome(first.add, amount=5) == "5"
    assert outcome(second.add, amount=1) == "101"
    assert (first.value, second.value) == (5, 101)
    assert isinstance(Counter.add, Tool), "on the class it is the tool itself"
