"""Implements `refengine ask`: sends a prompt to a worker; streams its answer to stdout, and statistics to stderr."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time

from refengine.cli.console import say, write
from refengine.client.client import Client, Sampling, Stream
from refengine.client.events import ChatEnd, ChatEvent, ClientError, End, Event, Piece, Started, Token
from refengine.errors import RequestError

CANCEL_TIMEOUT_S = 2.0  # for the cancellation of an interrupted request


def ask(arguments: argparse.Namespace) -> None:
    given = [v for v in (arguments.text, arguments.prompt) if v is not None]
    if len(given) != 1:
        raise RequestError(f"give the prompt once, as PROMPT or with --prompt ({len(given)} were given)")
    if arguments.chat and arguments.logprobs:
        raise RequestError("--logprobs cannot be used with --chat")
    prompt = sys.stdin.read() if given[0] == "-" else given[0]
    api_key = arguments.api_key or os.environ.get("REFENGINE_API_KEY") or None
    stream: Stream[Event] | Stream[ChatEvent]
    with Client(arguments.url, api_key, arguments.timeout, arguments.retries) as client:
        sampling = _sampling(arguments)
        if arguments.chat:
            stream = client.chat([{"role": "user", "content": prompt}], deadline=arguments.deadline, **sampling)
        else:
            stream = client.execute(prompt, deadline=arguments.deadline, **sampling)
        with stream:
            try:
                _show(stream, bool(arguments.logprobs))
            except KeyboardInterrupt:
                _cancel(arguments.url, api_key, stream.job_id)
                raise


def _sampling(arguments: argparse.Namespace) -> Sampling:
    sampling: Sampling = {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "stop": arguments.stop,
    }
    if arguments.seed is not None:
        sampling["seed"] = arguments.seed
    if arguments.logprobs:
        sampling["logprobs"] = arguments.logprobs
    return sampling


def _show(stream: Stream[Event] | Stream[ChatEvent], with_logprobs: bool) -> None:
    start = time.perf_counter()
    first: float | None = None
    started: Started | None = None
    written = False
    try:
        for event in stream:
            if isinstance(event, Started):
                started = event
                if event.queue_position:
                    say(f"waiting at position {event.queue_position} in the queue")
            elif isinstance(event, Token | Piece):
                first = first or time.perf_counter()
                write(_line(event) if with_logprobs and isinstance(event, Token) else event.text)
                written = written or bool(event.text)
            elif isinstance(event, End | ChatEnd):
                end = event
    finally:
        if written and not with_logprobs:
            write("\n")
    seconds = time.perf_counter() - (first or start)
    _print_statistics(started, end, seconds, (first or start) - start)


def _print_statistics(started: Started | None, end: End | ChatEnd, seconds: float, first: float) -> None:
    speed = f", {(end.tokens_out - 1) / seconds:.1f} tokens/s" if end.tokens_out > 1 and seconds > 0 else ""
    reason = end.stop_reason if isinstance(end, End) else end.finish_reason
    seed = "" if started is None else f", seed {started.seed}"
    say(
        f"prompt {end.tokens_in} tokens ({end.prefix_tokens_reused} reused), {end.tokens_out} generated{speed}, "
        f"first token after {first * 1000:.0f} ms, stop: {reason}{seed}"
    )


def _line(token: Token) -> str:
    """A line with a token's index, id, probability and text, and the most likely tokens at its position."""
    if token.id is None:
        return f"{token.index:5} (part of a stop string)\n"
    others = "  ".join(f"{c.token!r} {_percent(c.logprob)}" for c in token.top)
    return f"{token.index:5} {token.id!s:>7} {_percent(token.logprob):>8}  {token.text!r:20} | {others}\n"


def _percent(logprob: float | None) -> str:
    return "0%" if logprob is None else f"{100 * math.exp(logprob):.4g}%"


def _cancel(url: str, api_key: str | None, job_id: str | None) -> None:
    """Cancel a job on a separate connection. Errors are ignored, because closing the stream ends the job as well."""
    if job_id is None:
        return
    with contextlib.suppress(ClientError), Client(url, api_key, CANCEL_TIMEOUT_S) as client:
        client.cancel(job_id)
