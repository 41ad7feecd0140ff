"""Runs a worker: loads the model, serves HTTP, and shuts down in order after a signal or POST /shutdown.

Exit codes: 0 after a shutdown, 1 if the start fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from threadpoolctl import threadpool_limits

from refengine.tokenizer.chat import end_rendering
from refengine.worker.http.app import make_app
from refengine.worker.http.callback import announce
from refengine.worker.http.connections import CHECK_S, RESERVED, Connection, limited
from refengine.worker.http.openapi import describe
from refengine.worker.http.routes_openai import make_router
from refengine.worker.http.routes_page import make_page_router
from refengine.worker.jobs.engine_thread import EngineThread, Started
from refengine.worker.jobs.worker import Worker
from refengine.worker.options import WorkerOptions
from refengine.worker.startup import StartFailed, Startup, failure_of
from refengine.worker.telemetry.log import Log
from refengine.worker.telemetry.uncaught import log_uncaught

THREADS_END_S = 0.1  # how long the end of the process waits for threads
LAST_BYTES_S = 1  # how long a shutdown waits for clients to read their last event
DESCRIPTORS = 100  # file descriptors for files and pipes, in addition to the connections
SWITCH_S = 0.0001  # Python's thread switch interval: after each system call the event loop waits this long for the GIL
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # the user's own number of threads


def serve(options: WorkerOptions) -> int:
    """Run a worker until it is told to stop. Returns the exit code."""
    log = Log(options.worker_id, str(options.model), options.device)
    log.write_behind()
    log_uncaught(log)
    sys.setswitchinterval(SWITCH_S)
    _leave_a_core()
    code = asyncio.run(_live(options, log))
    _exit_despite_threads(log, code)
    return code


def _exit_despite_threads(log: Log, code: int) -> None:
    """Exit the process if a thread is still busy, for example with a long prompt: the interpreter would wait for it."""
    end_rendering()
    others = [t for t in threading.enumerate() if not t.daemon and t is not threading.current_thread()]
    end = time.monotonic() + THREADS_END_S
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in others):
        log.drain()
        os._exit(code)


def _leave_a_core() -> None:
    """Limit BLAS to all cores but one, which is left for the event loop.

    BLAS threads wait for each other in busy loops: one thread more than there are free cores slows every product down.
    """
    if not any(os.environ.get(name) for name in BLAS_THREADS):
        threadpool_limits(max(1, len(os.sched_getaffinity(0)) - 1), user_api="blas")


async def _live(options: WorkerOptions, log: Log) -> int:
    start = time.perf_counter()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    n_connections = _allowed_connections(options.connections)
    log(
        "startup",
        url=options.url,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_connections=n_connections,
    )
    startup = Startup(options, log)
    engine = EngineThread(startup, log, options.residency_check_sec)
    try:
        started = await _started(engine, stop)
        if started is None:
            log("shutdown", reason="stopped during the start")
            return 0
        listener = _listen(options)
    except Exception as e:
        failed = failure_of(e)
        log(
            "error",
            "ERROR",
            code=failed.code,
            message=failed.message,
            device=options.device,
            model=str(options.model),
            bytes_required=failed.required,
            bytes_available=failed.available,
        )
        engine.stop()
        return 1
    assert startup.metrics is not None
    worker = Worker(options, started, startup.metrics, engine, log)
    app = make_app(worker)
    app.include_router(make_router(worker))
    app.include_router(make_page_router(worker))
    describe(app)
    server = _Server(
        uvicorn.Config(
            app,
            http=limited(n_connections),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_keep_alive=5,
            timeout_graceful_shutdown=LAST_BYTES_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await server.listening.wait()
    gc.collect()
    gc.freeze()  # objects of the start live until exit; without this, each full collection takes 25 ms to scan them
    log(
        "ready", url=options.url, seconds=round(time.perf_counter() - start, 3), vram_bytes=worker.state.vram_bytes_used
    )
    _call_back(options, worker)
    await _first(stop, worker.stop_asked)
    n_cut = await worker.finish(options.shutdown_grace_sec)
    engine.stop()
    server.should_exit = True
    await serving
    worker.close()
    ended = engine.join(0.5)
    log("shutdown", jobs_cut=n_cut, engine_ended=ended)
    return 0


async def _started(engine: EngineThread, stop: asyncio.Event) -> Started | None:
    """The result of the start, or None if a signal arrived first. Raises the start's exception."""
    stopped = asyncio.create_task(stop.wait())
    waiting: set[asyncio.Future[Any]] = {engine.started, stopped}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    return engine.started.result() if engine.started.done() else None


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _call_back(options: WorkerOptions, worker: Worker) -> None:
    if options.callback_url is None:
        return
    state = worker.state
    body = {
        "worker_id": options.worker_id,
        "url": options.url,
        "vram_bytes": state.vram_bytes_used,
        "model": state.model.model,
    }
    announce(options.callback_url, body, worker.log)


def _listen(options: WorkerOptions) -> socket.socket:
    """A listening socket on the address and port. Raises StartFailed."""
    try:
        family, _, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only if the protocol is given; without it a head and its body can be 40 ms apart.
        listener = socket.socket(family, socket.SOCK_STREAM, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as e:
        raise StartFailed("PORT_UNAVAILABLE", f"{options.host} port {options.port}: {e.strerror or e}") from None
    return listener


def _allowed_connections(n_connections: int) -> int:
    """The number of connections that the system allows, at most `n_connections`. May raise the soft limit on files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = RESERVED + DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= n_connections + others:
        return n_connections
    soft = n_connections + others if hard == resource.RLIM_INFINITY else min(n_connections + others, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft - others)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers (this module has its own). Checks its connections' timeouts."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every tenth of a second."""
        if counter % round(CHECK_S * 10) == 0:
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.check(time.monotonic())
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()
