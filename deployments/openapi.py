"""The OpenAPI document of the gateway, made true: errors as they are served, and schemas that can be looked up.

FastAPI writes down the answers of routes. What it cannot know is added here: every path may answer with an error, in
the form that this family of paths has, and bodies that routes read themselves bring schemas with definitions of their
own, which must stand where the document's references look for them.

Invariant: a reference in the document leads somewhere, and every status that a route may answer with is described.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from rollout.access_paths import Form, error_form

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
OUR_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "field"],
            "properties": {"type": _TEXT, "message": _TEXT, "field": _TEXT_OR_NULL},
        }
    },
}
OPENAI_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": _TEXT_OR_NULL,
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": _TEXT, "event": _TEXT, "id": _TEXT},
}
"""One server-sent event; `data` is JSON, and `[DONE]` at the end."""
EVENT_STREAM = "text/event-stream"
_SCHEMAS: dict[Form, tuple[str, dict[str, Any]]] = {
    "ours": ("Error", OUR_ERROR),
    "openai": ("OpenAIError", OPENAI_ERROR),
}
_METHODS = frozenset({"get", "put", "post", "delete", "patch", "head", "options"})
_HOME = "#/components/schemas/"
_LOCAL = "#/$defs/"


def install(app: FastAPI) -> None:
    """Let an application's document be finished when it is first asked for."""
    make = app.openapi

    def finished() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            finish(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = finished  # type: ignore[method-assign]


def finish(document: dict[str, Any]) -> None:
    """Add the errors, and move definitions to where references can find them."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path, operations in document.get("paths", {}).items():
        form = error_form(path)
        name, schema = _SCHEMAS["openai" if form == "openai" else "ours"]
        schemas[name] = schema
        for method, operation in operations.items():
            if method in _METHODS:
                _add_errors(operation, name)
    _hoist(document["paths"], schemas)
    # FastAPI's own form of an error, which nothing here answers with.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _add_errors(operation: dict[str, Any], schema: str) -> None:
    responses = operation.setdefault("responses", {})
    content = {"application/json": {"schema": {"$ref": f"{_HOME}{schema}"}}}
    given = responses.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if given.get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]
    for status, response in responses.items():
        if EVENT_STREAM in response.get("content", {}):
            response["content"][EVENT_STREAM] = {"schema": EVENT}
        if status[:1] in ("4", "5"):
            # A route says what it means there; the form is everybody's.
            response.setdefault("content", content)
    responses.setdefault("4XX", {"description": "What is wrong with the request, and what to do", "content": content})
    responses.setdefault("5XX", {"description": "What is wrong here; 503: come again", "content": content})


def _hoist(node: Any, schemas: dict[str, Any]) -> None:
    """Move every `$defs` below a node into the document's schemas, and let its references follow."""
    if isinstance(node, list):
        for item in node:
            _hoist(item, schemas)
        return
    if not isinstance(node, dict):
        return
    found = node.pop("$defs", None)
    if isinstance(found, dict):
        names = {name: _free_name(name, schema, schemas) for name, schema in found.items()}
        _follow(node, names)
        for name, schema in found.items():
            _follow(schema, names)
            schemas[names[name]] = schema
    for value in node.values():
        _hoist(value, schemas)


def _free_name(name: str, schema: Any, schemas: dict[str, Any]) -> str:
    """A name that is not taken by another schema. FastAPI's are of answers, these of bodies."""
    while name in schemas and schemas[name] != schema:
        name += "Body"
    return name


def _follow(node: Any, names: dict[str, str]) -> None:
    if isinstance(node, list):
        for item in node:
            _follow(item, names)
    elif isinstance(node, dict):
        for key, value in node.items():
            # A `$ref`, or what a discriminator maps a value to.
            if isinstance(value, str) and value.startswith(_LOCAL):
                node[key] = _HOME + names[value.removeprefix(_LOCAL)]
            else:
                _follow(value, names)
