"""Renders conversations with the model's own jinja2 chat template, within limits.

Templates run in a separate process (`chat_renderer.py`), which is started at the first use and kept. It is killed when
a template exceeds its time limit, and the next call starts a new one. So a malicious template costs its caller at most
the time limit, whatever it does.

Independent of token ids.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refengine.errors import RequestError, TokenizerError

MAX_TEMPLATE = 256 * 1024  # characters
MAX_OUTPUT = 4 * 1024 * 1024  # characters
MAX_INPUT = 16 * 1024 * 1024  # characters of JSON
TIME_LIMIT_S = 5.0  # real templates take a millisecond
MEMORY_LIMIT = 512 * 1024 * 1024  # bytes of address space of the renderer
_START_LIMIT_S = 60.0  # for the interpreter and jinja2, on a busy machine


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> str:
    """Render `template` for `messages`.

    The template can use `messages`, `add_generation_prompt`, `tools` and `documents` (None), and `variables`, which may
    override any of them; and the functions that templates on the Hugging Face hub use.
    Raises TokenizerError if the template is too long or invalid, fails or refuses the messages, or exceeds its limits
    of time, memory or output; RequestError if messages or variables are not JSON-like, or messages are not a list of
    objects with a role.
    """
    if len(template) > MAX_TEMPLATE:
        raise TokenizerError(f"the chat template has {len(template)} characters; the limit is {MAX_TEMPLATE}")
    _check_messages(messages)
    names = {
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **(variables or {}),
    }
    try:
        request = json.dumps({"template": template, "variables": names, "max_output": MAX_OUTPUT})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages for a chat template must be JSON-like: {error}") from None
    if len(request) > MAX_INPUT:
        raise RequestError(f"the messages have {len(request)} characters as JSON; the limit is {MAX_INPUT}")
    reply = _RENDERER.ask(request, time_limit_s)
    if "error" in reply:
        raise TokenizerError(f"the chat template cannot be rendered: {reply['error']}")
    return reply["text"]


def end_rendering() -> None:
    """Kill the renderer's process at once. A call that waits for its reply raises TokenizerError."""
    _RENDERER.kill()


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of objects, not {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a 'role' that is a string")


class _Renderer:
    """The renderer's process. It is started at the first request and renders one template at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # id of the process that started it; a forked process must not share its pipes

    def ask(self, request: str, time_limit_s: float) -> dict[str, str]:
        with self._lock:
            process = self._running()
            line = self._exchange(process, request, time_limit_s)
            if line is None:
                self._stop()
                raise TokenizerError(f"the chat template took more than its time limit of {time_limit_s:g} s")
            if not line.endswith("\n"):
                self._stop()
                raise TokenizerError("the process that renders the chat template died (out of memory?)")
            reply: dict[str, str] = json.loads(line)
            return reply

    def kill(self) -> None:
        process = self._process
        if process is not None and self._owner == os.getpid():
            process.kill()

    def close(self) -> None:
        with self._lock:
            if self._owner == os.getpid():
                self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._owner == os.getpid():
            if self._process is not None and self._process.poll() is None:
                return self._process
            self._stop()
        script = Path(__file__).with_name("chat_renderer.py")
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(MEMORY_LIMIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._process, self._owner = process, os.getpid()
        if self._exchange(process, None, _START_LIMIT_S) != "ready\n" or process.poll() is not None:
            self._stop()
            raise TokenizerError(f"the process that renders chat templates cannot start: {sys.executable} {script}")
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[str], request: str | None, time_limit_s: float) -> str | None:
        """The reply to `request`: a line, None after the time limit, or an incomplete line if the process died.

        If the limit passes just when the reply arrives, the reply is used, and the process is killed all the same.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            process.kill()

        # Killing the process ends a write or a read that waits for it.
        timer = threading.Timer(time_limit_s, kill)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
            timer.join()  # otherwise it might kill during the next exchange
            if expired.is_set():
                process.wait()  # so that `poll` reports its end to the next call
        return None if expired.is_set() and not line.endswith("\n") else line

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # unwritten data has no reader
                continue
        process.wait()


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
