"""What libraries and unhandled errors say on stderr: a JSON line each, of kind and place, and no words of a request."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cli_runner import ENVIRONMENT, ROOT
from tests.worker.server import HAIKU, serving, text_of

# A process whose stderr is a worker's log. What follows goes wrong in it; its words are secret.
STRAYS = """
import asyncio, logging, sys, threading, warnings
from refengine.engine.generation import Token
from refengine.worker.telemetry.log import Log
from refengine.worker.telemetry.uncaught import log_uncaught
log_uncaught(Log("id", "model", "cpu"))
def fails(*arguments):
    raise ValueError("secret")
def in_loop(function):
    loop = asyncio.new_event_loop()
    loop.call_soon(function, Token(id=7, text="secret"))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
async def lost():
    async def task(text):
        fails(text)
    asyncio.create_task(task("secret"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
class Unraisable:
    def __del__(self):
        fails()
"""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a callback of the loop": ("in_loop(fails)", {"source": "asyncio", "kind": "ValueError", "level": "ERROR"}),
    "a task": ("asyncio.run(lost())", {"source": "asyncio", "kind": "ValueError"}),
    "a thread": (
        "t = threading.Thread(target=fails, args=('secret',), name='aside'); t.start(); t.join()",
        {"source": "aside", "kind": "ValueError"},
    ),
    "the main thread": ("fails()", {"source": "main thread", "kind": "ValueError"}),
    "a finalizer": ("Unraisable()", {"source": "unraisable", "kind": "ValueError"}),
    "a warning": ("warnings.warn('secret')", {"source": "warnings", "kind": "UserWarning", "level": "WARNING"}),
    "a library": (
        "logging.getLogger('some.library').warning('of %s', 'secret')",
        {"source": "some.library", "message": None, "level": "WARNING"},
    ),
    "uvicorn": (
        "logging.getLogger('uvicorn.error').error('Returned %s', 'secret')",
        {"source": "uvicorn.error", "message": "Returned %s", "level": "ERROR"},
    ),
    "ourselves": (
        "logging.getLogger('refengine.tokenizer.bpe').warning('%s is missing', 'a key')",
        {"source": "refengine.tokenizer.bpe", "message": "a key is missing", "level": "WARNING"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_goes_wrong_is_one_line_without_words(case: str) -> None:
    code, expected = CASES[case]
    line = [sys.executable, "-c", STRAYS + code]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)
    found: list[dict[str, Any]] = [json.loads(text) for text in done.stderr.splitlines()]
    assert len(found) == 1
    assert found[0]["event"] == "error"
    assert {**found[0], **expected} == found[0]
    assert found[0]["where"]
    assert "secret" not in done.stderr
    assert "Token" not in done.stderr


# `refengine serve` with an error in each callback that brings tokens from the engine.
CARELESS = """
import sys
from refengine.cli import main as cli
from refengine.worker.jobs.worker import Worker
sys.argv.pop(1)
on_tokens = Worker.on_tokens
def careless(self, job, tokens, drawn):
    on_tokens(self, job, tokens, drawn)
    raise ValueError(f"{tokens}")
Worker.on_tokens = careless
sys.exit(cli.main())
"""


def test_tokens_are_not_logged_where_a_callback_fails() -> None:
    with serving(script=(CARELESS, "")) as server:
        verses = text_of(server.run(**HAIKU)).splitlines()
        failures = server.events("error")  # all lines are JSON
        assert {line["kind"] for line in failures} == {"ValueError"}
        assert "careless" in failures[0]["where"][-1]
        log = server.log_file.read_text()
    assert len(verses) >= 3
    for words in (*filter(None, verses), "Token(", HAIKU["prompt"]):
        assert words not in log
