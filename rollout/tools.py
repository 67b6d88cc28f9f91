"""Tools: typed, documented Python functions that the model may call, and their JSON schemas.

Invariant: what the model is shown (the schema) and what its arguments are checked against (a pydantic model)
come from the same signature. rollout/tool_calls.py runs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, create_model


@dataclass(frozen=True)
class Tool:
    """A tool: its schema as the model sees it, and how to run it."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments object."""
    run: Callable[..., Any] = field(repr=False)
    """Called with the validated arguments as keywords. Sync functions run in a thread of their own."""
    arguments: type[BaseModel] | None = field(default=None, repr=False)
    """Validates and converts arguments; None where the server behind the tool does (MCP)."""

    @property
    def spec(self) -> dict[str, Any]:
        """The tool in OpenAI's function form."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain function, so that a decorated one is still called as before."""
        return self.run(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Tool:
        """A decorated method of an environment becomes a tool of the instance."""
        if instance is None:
            return self
        bound = self.run.__get__(instance, owner)  # type: ignore[attr-defined]
        return Tool(self.name, self.description, self.parameters, bound, self.arguments)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(*, name: str | None = None, description: str | None = None) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, description: str | None = None
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Turn a typed, documented function (sync or async) into a tool.

    The JSON schema comes from the annotations, descriptions from the docstring (Google, NumPy or reST style).
    Raises TypeError for a parameter without annotation, for *args or **kwargs, or without any description.
    """
    if function is None:
        return lambda decorated: _make_tool(decorated, name, description)
    return _make_tool(function, name, description)


def _make_tool(function: Callable[..., Any], name: str | None, description: str | None) -> Tool:
    import docstring_parser

    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    about = {param.arg_name: " ".join((param.description or "").split()) for param in doc.params}
    hints = get_type_hints(function, include_extras=True)
    label = name or function.__name__
    text = description or " ".join(part.strip() for part in (doc.short_description, doc.long_description) if part)
    if not text:
        raise TypeError(f"tool {label!r} has no docstring: the model would not know what it does")
    fields: dict[str, Any] = {}
    for parameter in _parameters(function):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"tool {label!r}: *{parameter.name} has no schema; name every parameter")
        if parameter.name not in hints:
            raise TypeError(f"tool {label!r}: parameter {parameter.name!r} has no type annotation")
        default = ... if parameter.default is parameter.empty else parameter.default
        # A description of None would override one that the annotation brings (Annotated[..., Field(description=…)]).
        described: dict[str, Any] = {"description": about[parameter.name]} if about.get(parameter.name) else {}
        fields[parameter.name] = (hints[parameter.name], Field(default, **described))
    model = create_model(label, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False), **fields)
    return Tool(label, text, _plain_schema(model), function, model)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    # A method that is decorated inside its class body: `self` comes from the binding, not from the model.
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    return parameters


def _plain_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The arguments schema as chat templates expect it: no titles, no closed-world keyword, required last."""
    schema = without_titles(model.model_json_schema())
    schema.pop("additionalProperties", None)
    schema.setdefault("properties", {})
    order = ("type", "properties", "required", "$defs")
    return {key: schema[key] for key in order if key in schema}


def without_titles(node: Any, *, names: bool = False) -> Any:
    """A JSON schema without generated titles, its types first. `names`: the keys of this node are the user's."""
    if isinstance(node, dict):
        # Under "properties" the keys are the user's names, and a parameter may well be called "title".
        kept = {
            # A default is the user's value, whatever its keys; "properties" of "properties" is a parameter's name.
            key: value
            if key == "default" and not names
            else without_titles(value, names=not names and key in ("properties", "$defs"))
            for key, value in node.items()
            if names or key != "title" or not isinstance(value, str)
        }
        # The order that people write, and that models have read most: the type before its description.
        return kept if names or "type" not in kept else {"type": kept.pop("type"), **kept}
    if isinstance(node, list):
        return [without_titles(item) for item in node]
    return node
