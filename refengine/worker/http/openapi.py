"""Completes the OpenAPI document, and converts it for tools that do not read version 3.1."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

DEFS, SCHEMAS = "#/$defs/", "#/components/schemas/"
NULL = {"type": "null"}
HAIKU = "Write a haiku about the sea"
EXAMPLES: dict[str, dict[str, Any]] = {
    "/execute": {"job_id": "1", "prompt": HAIKU, "max_tokens": 64, "temperature": 0.7, "seed": 42, "logprobs": 3},
    "/cancel": {"job_id": "1"},
    "/v1/completions": {"prompt": HAIKU, "max_tokens": 64, "temperature": 0.7, "seed": 42},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": HAIKU}], "max_tokens": 64, "seed": 42},
    "/tokenize": {"content": HAIKU},
    "/detokenize": {"tokens": [1, 2, 3]},
}


def describe(app: FastAPI) -> None:
    """Complete /openapi.json: add examples, and move the schemas of bodies that the worker parses to `components`."""
    make = app.openapi
    app.openapi = lambda: with_examples(with_components(make()))  # type: ignore[method-assign]


def with_examples(document: dict[str, Any]) -> dict[str, Any]:
    """Add a working example to each body. Tools would otherwise make one from the fields' largest values."""
    for path, example in EXAMPLES.items():
        document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] = example
    return document


def with_components(document: dict[str, Any]) -> dict[str, Any]:
    """Move the `$defs` of every schema to the document's components, and change each `$ref` accordingly."""
    schemas: dict[str, Any] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        schemas.update({name: moved(schema) for name, schema in value.get("$defs", {}).items()})
        found = {name: moved(item) for name, item in value.items() if name != "$defs"}
        if str(found.get("$ref", "")).startswith(DEFS):
            found["$ref"] = SCHEMAS + found["$ref"].removeprefix(DEFS)
        return found

    whole: dict[str, Any] = moved(document)
    components = whole.get("components", {})
    return {**whole, "components": {**components, "schemas": {**components.get("schemas", {}), **schemas}}}


def as_openapi_30(document: dict[str, Any]) -> dict[str, Any]:
    """Convert the document to version 3.0.3 for Swagger UI 4: null, const and exclusive limits have another form."""
    return {**_converted(document), "openapi": "3.0.3"}


def _converted(value: Any) -> Any:
    if isinstance(value, list):
        return [_converted(item) for item in value]
    if not isinstance(value, dict):
        return value
    if NULL in value.get("anyOf", []):
        kinds = [kind for kind in value["anyOf"] if kind != NULL]
        alone = len(kinds) == 1 and "$ref" not in kinds[0]  # fields beside a $ref are ignored in 3.0
        value = {name: item for name, item in value.items() if name != "anyOf"}
        value |= {"nullable": True, **(kinds[0] if alone else {"anyOf": kinds})}
    found = {name: _converted(item) for name, item in value.items()}
    if "const" in found:
        found["enum"] = [found.pop("const")]
    if found.get("type") == "null":
        found |= {"type": "string", "nullable": True, "enum": []}
    if found.get("nullable") and "enum" in found:
        found["enum"] = [*found["enum"], None]
    for exclusive, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in found:
            found |= {limit: found[exclusive], exclusive: True}
    return found
