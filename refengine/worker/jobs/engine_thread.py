"""Runs the engine in its own thread. Commands reach it through a queue; results are passed to the event loop.

The thread opens the device, loads the model and runs every step. So only one thread uses the device, and the event loop
never waits for it. Cancellations take effect between two steps.
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
    """The result of a successful start: the engine and the worker's state."""

    engine: Engine
    state: State


class Listener(Protocol):
    """Receives the events of jobs. All methods are called in the event loop's thread.

    drawn: the time when the tokens were sampled, as time.perf_counter() gives it.
    """

    def on_start(self, job: Job, queue_position: int) -> None: ...
    def on_scores(self, job: Job, scores: list[Score | None]) -> None: ...
    def on_tokens(self, job: Job, tokens: list[Token], drawn: float) -> None: ...
    def on_end(self, job: Job, stop_reason: str, prefix_tokens_reused: int) -> None: ...
    def on_error(self, job: Job, error: WorkerError) -> None: ...


class EngineThread:
    """Runs the engine's steps in a thread and reports the results to `listener`.

    start: opens the device, loads the model and makes the engine. It is called in the thread; the future `started` gets
    its result or its exception.
    residency_check_s: the seconds between two checks that the model is in device memory.
    """

    def __init__(self, start: Callable[[], Started], log: Log, residency_check_s: float) -> None:
        self._start, self._log, self._residency_check_s = start, log, residency_check_s
        self._loop = asyncio.get_running_loop()
        self.started: asyncio.Future[Started] = self._loop.create_future()
        self.listener: Listener | None = None
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Generation, Job] = {}
        self._generations: dict[Job, Generation] = {}
        self._fatal_error: WorkerError | None = None  # the error that ended the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job for the engine. Raises WorkerError if the thread has ended."""
        self._commands.put(("submit", job))
        if self._fatal_error is not None:  # checked after put(): a thread that ends later reports queued jobs itself
            raise self._fatal_error

    def cancel(self, job: Job) -> None:
        """Stop a job. Does nothing for a job that has ended or was never submitted."""
        self._commands.put(("cancel", job))

    def stop(self) -> None:
        """End the thread after the current step and free all sequences."""
        self._commands.put(("stop", None))

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end. Returns whether it ended within `timeout_s` seconds."""
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
        self._update_load()
        self._tell(_settle, self.started, started, None)
        try:
            while self._run_commands():
                self._step()
                self._update_load()
                self._check_residency()
            for generation in list(self._jobs):
                self._engine.free(generation)
            self._engine.wait()
        except BaseException as e:  # a bug; the worker cannot serve anything without this thread
            self._log.failure(e)
            self._fatal_error = to_worker_error(e, self._on_gpu)
            self._state.errors["engine"] = "the engine's thread has ended"
            for job in [*self._generations, *self._unread()]:
                self._report_error(job, self._fatal_error)

    def _run_commands(self) -> bool:
        """Run all queued commands; an idle engine waits for one. Returns False if the command is to stop."""
        try:
            wait = self._engine.idle
            while True:
                left = max(0.0, self._next_check - time.monotonic())
                command, job = self._commands.get(wait, left if wait else None)
                if job is None:
                    return False
                if command == "submit":
                    self._start_job(job)
                else:
                    self._drop(job)
                wait = False
        except queue.Empty:
            return True

    def _unread(self) -> list[Job]:
        """Jobs that were submitted but not started by the thread."""
        commands = [self._commands.get_nowait() for _ in range(self._commands.qsize())]
        return [job for command, job in commands if command == "submit" and job is not None]

    def _start_job(self, job: Job) -> None:
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
        step_error, aborted = None, None
        try:
            changed = self._engine.step()
            self._state.errors.pop("step", None)
        except Exception as e:  # a device error or a bug: the requests of this step end, the worker continues
            self._log.failure(e)
            step_error = to_worker_error(e, self._on_gpu)
            if step_error.code == "CUDA_ERROR":
                self._state.errors["step"] = step_error.message
            aborted = RefengineError(step_error.message)
            self._engine.abort(aborted)
            changed = [generation for generation in self._jobs if generation.end is not None]
        for generation in changed:
            tokens = list(generation.pending)
            generation.pending.clear()
            if generation.prompt_scores and generation.n_generated == 1 and self.listener is not None:
                self._tell(self.listener.on_scores, self._jobs[generation], generation.prompt_scores)
            if tokens and self.listener is not None:
                self._tell(self.listener.on_tokens, self._jobs[generation], tokens, time.perf_counter())
            if generation.end is not None:
                self._end(generation, step_error if generation.error is aborted else None)

    def _end(self, generation: Generation, step_error: WorkerError | None) -> None:
        """Free a sequence that has ended and report its result.

        step_error: the error of a failed step, which is reported instead of the sequence's own error.
        """
        job = self._jobs.pop(generation)
        del self._generations[job]
        self._engine.free(generation)
        if generation.error is not None:
            self._report_error(job, step_error or to_worker_error(generation.error))
        elif self.listener is not None:
            self._tell(self.listener.on_end, job, str(generation.end), generation.progress.prefix_tokens)

    def _report_error(self, job: Job, error: WorkerError) -> None:
        if self.listener is not None:
            self._tell(self.listener.on_error, job, error)

    def _tell(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the event loop's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has been closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _update_load(self) -> None:
        """Update the state that /health and /metrics report."""
        self._state.load = Load(vram_of(self._engine.model), self._engine.stats())

    def _check_residency(self) -> None:
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + self._residency_check_s
        try:
            check_residency(self._engine.model)
        except DeviceError as e:
            self._state.resident = False
            self._state.errors["residency"] = str(e)
            self._log("error", "CRITICAL", code="CUDA_ERROR", message=str(e))


def _settle(future: asyncio.Future[Started], result: Started | None, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    elif result is not None:
        future.set_result(result)
