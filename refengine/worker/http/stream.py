"""Streaming responses: the events of one or several jobs as they arrive, and comments while there are none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from refengine.worker.errors import WorkerError
from refengine.worker.jobs.job import Event, Job
from refengine.worker.jobs.worker import Worker

SEND_TIMEOUT_S = 30.0  # for a client to read the sent data
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
SLOW = ("prompt",)  # events with data for each prompt token, which are rendered outside the event loop's thread
LINE_ENDS = "\x85\u2028\u2029"  # the line ends that JSON does not escape
HEARTBEAT = ": nothing yet\n\n"  # a comment: clients ignore it; it shows proxies that the connection is alive


class EventStream(Response):
    """A response that streams the events of jobs. If the client disconnects, its jobs end at once.

    render: makes the text that is sent, from a job's number and an event; may be empty. last: text sent at the end.
    """

    def __init__(
        self, worker: Worker, jobs: Sequence[Job], render: Callable[[int, Event], str], last: str = ""
    ) -> None:
        super().__init__(None, headers=HEADERS)
        del self.headers["content-length"]
        self._worker, self._jobs, self._render, self._last = worker, jobs, render, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(OSError), watching(self._worker, self._jobs, receive):
            await self._send(send)

    async def _send(self, send: Send) -> None:
        await _soon(send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sent = time.monotonic()

        def left_s() -> float:
            return sent + self._worker.options.heartbeat_sec - time.monotonic()

        async for events in events_of(self._jobs, left_s):
            if any(name in SLOW for _, (name, _) in events):
                body = await self._worker.run_aside(partial(self._rendered, events))
            else:
                body = self._rendered(events)
            if not body and left_s() <= 0:  # the text of some events is empty
                body = HEARTBEAT
            if body:
                await _soon(send, {"type": "http.response.body", "body": body.encode(), "more_body": True})
                sent = time.monotonic()
        await _soon(send, {"type": "http.response.body", "body": self._last.encode(), "more_body": False})

    def _rendered(self, events: Sequence[tuple[int, Event]]) -> str:
        return "".join(self._render(number, event) for number, event in events)


async def events_of(
    jobs: Sequence[Job], left_s: Callable[[], float] | None = None
) -> AsyncIterator[list[tuple[int, Event]]]:
    """Yields lists of (job number, event) of all jobs as they arrive. Yields an empty list if none arrives in time.

    left_s: gives the seconds to wait; None: no limit.
    """
    waiting = {asyncio.create_task(job.events()): number for number, job in enumerate(jobs)}
    try:
        while waiting:
            timeout = None if left_s is None else left_s()
            done, _ = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            ready: list[tuple[int, Event]] = []
            for task in done:
                number, events = waiting.pop(task), task.result()
                if events is not None:
                    ready += [(number, event) for event in events]
                    waiting[asyncio.create_task(jobs[number].events())] = number
            if ready or not done:
                yield ready
    finally:
        for task in waiting:
            task.cancel()


@contextlib.contextmanager
def watching(worker: Worker, jobs: Sequence[Job], receive: Receive) -> Iterator[None]:
    """While the context is active, the jobs end if their client disconnects, or if an exception leaves the context."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        worker.disconnected(*jobs)

    gone = asyncio.create_task(until_gone())
    try:
        yield
    except WorkerError:  # one of the jobs has failed
        for job in jobs:
            worker.cancel(job.job_id)
        raise
    except BaseException:
        worker.disconnected(*jobs)
        raise
    finally:
        gone.cancel()


async def taken(jobs: Sequence[Job]) -> None:
    """Wait until the engine has accepted all jobs. Raises the WorkerError of a job that ended before."""
    for job in jobs:
        await asyncio.shield(job.queue_position)


def sse(_: int, event: Event) -> str:
    """The text of an event in /execute's stream of server-sent events."""
    name, data = event
    return f"event: {name}\ndata: {json_of(data)}\n\n"


def json_of(data: Any) -> str:
    """JSON on one line, even for clients that split lines at more characters than LF and CR (`str.splitlines`)."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for end in LINE_ENDS:
        text = text.replace(end, f"\\u{ord(end):04x}")
    return text


async def _soon(send: Send, message: Message) -> None:
    """Send a message. Raises TimeoutError, which is an OSError, if the client has stopped reading."""
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send(message)
