"""The engine in a thread of its own: commands come in through a queue, what happens goes out to the event loop.

The thread opens the device, loads the model and takes every step, so that one thread alone speaks to the device and the
event loop never waits for it. Cancellations are obeyed between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from refengine.engine.engine import Engine
from refengine.engine.generation import Generation, Score, Token
from refengine.errors import DeviceError, RefengineError
from refengine.worker.errors import WorkerError, to_worker_error
from refengine.worker.jobs.job import Job
from refengine.worker.telemetry.log import Log
from refengine.worker.telemetry.status import Load, State, check_residency, vram_of


@dataclass(frozen=True)
class Started:
    """What a start-up made."""

    engine: Engine
    state: State


class Listener(Protocol):
    """Who is told what happens; in the event loop's thread."""

    def on_start(self, job: Job, queue_position: int) -> None: ...
    def on_scores(self, job: Job, scores: list[Score | None]) -> None: ...
    def on_tokens(self, job: Job, tokens: list[Token], drawn: float) -> None: ...
    def on_end(self, job: Job, stop_reason: str, prefix_tokens_reused: int) -> None: ...
    def on_error(self, job: Job, error: WorkerError) -> None: ...


class EngineThread:
    """start: opens, loads and makes the engine; called in the thread. `started` then has its result or its error."""

    def __init__(self, start: Callable[[], Started], log: Log, residency_check_s: float) -> None:
        self._start, self._log, self._residency_check_s = start, log, residency_check_s
        self._loop = asyncio.get_running_loop()
        self.started: asyncio.Future[Started] = self._loop.create_future()
        self.listener: Listener | None = None
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Generation, Job] = {}
        self._generations: dict[Job, Generation] = {}
        self._fault: WorkerError | None = None  # what ended the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises WorkerError where the thread has ended."""
        self._commands.put(("submit", job))
        if self._fault is not None:  # looked at afterwards: what was put before, the thread itself still finds
            raise self._fault

    def cancel(self, job: Job) -> None:
        """Harmless for a job that has ended, or was never submitted."""
        self._commands.put(("cancel", job))

    def stop(self) -> None:
        """End after the step that is under way, freeing what there is."""
        self._commands.put(("stop", None))

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within this time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            started = self._start()
        except BaseException as e:
            self._tell(_settle, self.started, None, e)
            return
        self._engine, self._state = started.engine, started.state
        self._on_gpu = started.state.model.device.startswith("cuda")
        self._next_check = time.monotonic() + self._residency_check_s
        self._look()
        self._tell(_settle, self.started, started, None)
        try:
            while self._obey():
                self._step()
                self._look()
                self._check_residency()
            for generation in list(self._jobs):
                self._engine.free(generation)
        except BaseException as e:  # a bug; without this thread nothing can be served
            self._log.failure(e)
            self._fault = to_worker_error(e, self._on_gpu)
            self._state.faults["engine"] = "the engine's thread has ended"
            for job in [*self._generations, *self._unread()]:
                self._report_error(job, self._fault)

    def _obey(self) -> bool:
        """Take all commands; where there is nothing to do, wait for one. False: stop."""
        try:
            wait = self._engine.idle
            while True:
                left = max(0.0, self._next_check - time.monotonic())
                command, job = self._commands.get(wait, left if wait else None)
                if job is None:
                    return False
                if command == "submit":
                    self._take(job)
                else:
                    self._drop(job)
                wait = False
        except queue.Empty:
            return True

    def _unread(self) -> list[Job]:
        """Jobs that were submitted, and that the thread has not taken."""
        commands = [self._commands.get_nowait() for _ in range(self._commands.qsize())]
        return [job for command, job in commands if command == "submit" and job is not None]

    def _take(self, job: Job) -> None:
        try:
            generation = self._engine.start(job.ids, job.params)
        except Exception as e:
            if not isinstance(e, RefengineError):
                self._log.failure(e, job_id=job.job_id)
            self._report_error(job, to_worker_error(e, self._on_gpu))
            return
        self._jobs[generation], self._generations[job] = job, generation
        if self.listener is not None:
            self._tell(self.listener.on_start, job, self._engine.queue_position(generation))

    def _drop(self, job: Job) -> None:
        generation = self._generations.pop(job, None)
        if generation is not None:
            del self._jobs[generation]
            self._engine.free(generation)

    def _step(self) -> None:
        if self._engine.idle:
            return
        fault, aborted = None, None
        try:
            moved = self._engine.step()
            self._state.faults.pop("step", None)
        except Exception as e:  # the device failed, or we have a bug: this step's requests end, the worker goes on
            self._log.failure(e)
            fault = to_worker_error(e, self._on_gpu)
            if fault.code == "CUDA_ERROR":
                self._state.faults["step"] = fault.message
            aborted = RefengineError(fault.message)
            self._engine.abort(aborted)
            moved = [generation for generation in self._jobs if generation.end is not None]
        for generation in moved:
            tokens = list(generation.pending)
            generation.pending.clear()
            if generation.prompt_scores and generation.n_generated == 1 and self.listener is not None:
                self._tell(self.listener.on_scores, self._jobs[generation], generation.prompt_scores)
            if tokens and self.listener is not None:
                self._tell(self.listener.on_tokens, self._jobs[generation], tokens, time.perf_counter())
            if generation.end is not None:
                of_step = fault if generation.error is aborted else None
                self._end(generation, of_step)

    def _end(self, generation: Generation, fault: WorkerError | None) -> None:
        """Free a sequence that has ended and report how. fault: the step's, which says more than the sequence's own."""
        job = self._jobs.pop(generation)
        del self._generations[job]
        self._engine.free(generation)
        if generation.error is not None:
            self._report_error(job, fault or to_worker_error(generation.error))
        elif self.listener is not None:
            self._tell(self.listener.on_end, job, str(generation.end), generation.progress.prefix_tokens)

    def _report_error(self, job: Job, fault: WorkerError) -> None:
        if self.listener is not None:
            self._tell(self.listener.on_error, job, fault)

    def _tell(self, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)

    def _look(self) -> None:
        """What /health and /metrics will say."""
        self._state.load = Load(vram_of(self._engine.model), self._engine.stats())

    def _check_residency(self) -> None:
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + self._residency_check_s
        try:
            check_residency(self._engine.model)
        except DeviceError as e:
            self._state.resident = False
            self._state.faults["residency"] = str(e)
            self._log("error", "CRITICAL", code="CUDA_ERROR", message=str(e))


def _settle(future: asyncio.Future[Started], result: Started | None, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    elif result is not None:
        future.set_result(result)
