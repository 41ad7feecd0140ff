"""Renders chat templates in a separate process (`python -P chat_renderer.py MEMORY_BYTES`).

A template comes from a model file, so it is not trusted. jinja2's immutable sandbox keeps it away from Python's
objects, but cannot stop it from running forever or filling the memory, even in one operation (`'a' * 10**9`,
`10**10**9`); only a process can be limited: its memory here, its time by the parent, which kills it.

Protocol: writes the line "ready"; then, for each input line with a JSON object {template, variables, max_output}, one
output line {"text": ...} or {"error": ...}. Exits at the end of the input. Imports only jinja2 and the standard
library.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_ERROR = 500  # characters of an error message, whose length the template controls


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(f"the template refuses these messages: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` that chat templates expect: unlike jinja2's own, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def build_environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates on the Hugging Face hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render(environment: ImmutableSandboxedEnvironment, request: dict[str, Any]) -> dict[str, str]:
    """Render a template. Returns {"text": the result} or {"error": the problem, on one line}."""
    try:
        chunks: list[str] = []
        n_chars = 0
        for chunk in environment.from_string(request["template"]).generate(request["variables"]):
            n_chars += len(chunk)
            if n_chars > request["max_output"]:
                return {"error": f"its output exceeds {request['max_output']} characters"}
            chunks.append(chunk)
        return {"text": "".join(chunks)}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": "it needs more memory than a chat template may use"}
    except Exception as error:  # a template can make Python raise any exception
        text = " ".join(str(error)[:_MAX_ERROR].split())
        return {"error": text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"}


def _limit_memory(n_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit; the parent's time limit remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def main() -> None:
    _limit_memory(int(sys.argv[1]))
    environment = build_environment()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(render(environment, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
