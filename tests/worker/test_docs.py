"""/docs in a real browser, and the OpenAPI document that it shows."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from refengine.worker.http.openapi import as_openapi_30, with_components
from tests.chromium import chromium, texts
from tests.worker.server import Server, serving, until


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def haiku() -> Iterator[Server]:
    with serving() as running:
        yield running


def problems(browser: Any) -> list[str]:
    """What the console has of errors and warnings."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.ci
def test_the_documents_operations_are_rendered(browser: Any, haiku: Server) -> None:
    document = httpx.get(haiku.url + "/openapi.json").json()
    operations = [f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item]
    browser.get(haiku.url + "/docs")
    until(lambda: len(texts(browser, ".opblock-summary-path")) == len(operations))
    paths = [path.replace("\u200b", "") for path in texts(browser, ".opblock-summary-path")]
    found = zip(texts(browser, ".opblock-summary-method"), paths, strict=True)
    assert sorted(f"{method} {path}" for method, path in found) == sorted(operations)
    browser.find_element("css selector", "#operations-default-chat_v1_chat_completions_post button").click()
    until(lambda: "messages" in "".join(texts(browser, ".opblock-body .highlight-code")))
    assert texts(browser, ".errors-wrapper") == []
    assert problems(browser) == []
    assert httpx.get(haiku.url + "/docs/swagger-ui-bundle.js.map").status_code == 404


def test_every_reference_of_the_document_leads_somewhere(haiku: Server) -> None:
    for path, version in (("/openapi.json", "3.1"), ("/docs/openapi.json", "3.0")):
        document = httpx.get(haiku.url + path).json()
        assert document["openapi"].startswith(version)
        found = list(references(document))
        assert found
        for reference in found:
            target: Any = document
            for name in reference.removeprefix("#/").split("/"):
                target = target[name]


def test_every_example_of_the_document_works(haiku: Server) -> None:
    for path, item in httpx.get(haiku.url + "/openapi.json").json()["paths"].items():
        for operation in item.values():
            if "requestBody" in operation:
                example = operation["requestBody"]["content"]["application/json"]["example"]
                answered = httpx.post(haiku.url + path, json=example)
                assert answered.is_success, (path, answered.text)


def references(value: Any) -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if name == "$ref":
            yield item
        yield from references(item)


def test_version_3_0_says_the_same_in_its_own_words() -> None:
    said = {
        "seed": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "title": "Seed"},
        "penalty": {"type": "number", "exclusiveMinimum": 0.0, "maximum": 2.0},
        "n": {"const": 1, "default": 1},
        "best_of": {"anyOf": [{"const": 1, "type": "integer"}, {"type": "null"}], "default": 1},
        "suffix": {"type": "null", "default": None},
        "options": {"anyOf": [{"$ref": "#/$defs/Options"}, {"type": "null"}]},
    }
    document = {"openapi": "3.1.0", "paths": {"/x": {"properties": said, "$defs": {"Options": {"type": "object"}}}}}
    assert as_openapi_30(with_components(document)) == {
        "openapi": "3.0.3",
        "paths": {"/x": {"properties": {
            "seed": {"type": "integer", "minimum": 0, "title": "Seed", "nullable": True},
            "penalty": {"type": "number", "minimum": 0.0, "exclusiveMinimum": True, "maximum": 2.0},
            "n": {"enum": [1], "default": 1},
            "best_of": {"type": "integer", "nullable": True, "enum": [1, None], "default": 1},
            "suffix": {"type": "string", "nullable": True, "enum": [None], "default": None},
            "options": {"anyOf": [{"$ref": "#/components/schemas/Options"}], "nullable": True},
        }}},
        "components": {"schemas": {"Options": {"type": "object"}}},
    }  # fmt: skip
