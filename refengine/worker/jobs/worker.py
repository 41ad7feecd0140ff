"""Accepts jobs, passes them to the engine, and ends them. All of this runs in the event loop's thread.

Every job sends exactly one final event to its client, without delay, whatever ends it (the last token, an error, a
cancellation, a disconnect, the deadline, a shutdown). The engine is then told to drop the job, and any later result of
the engine for that job is ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from refengine.engine.generation import Score, Token
from refengine.engine.sampling import choose_seed
from refengine.errors import RefengineError
from refengine.tokenizer import Tokenizer
from refengine.worker.errors import WorkerError, to_worker_error
from refengine.worker.http.requests import ExecuteRequest, deadline_seconds
from refengine.worker.jobs.engine_thread import EngineThread, Started
from refengine.worker.jobs.job import Job
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log, now_rfc3339
from refengine.worker.telemetry.metrics import Metrics

OUTCOME_OF = {"CANCELLED": "cancelled", "INFERENCE_TIMEOUT": "timeout", "INVALID_REQUEST": "refused"}
T = TypeVar("T")
LOGGED_FIELDS = {*ExecuteRequest.model_fields, "X-Deadline"}


class Worker:
    """The jobs of one worker, and the limits that a new job is checked against."""

    def __init__(
        self, options: WorkerOptions, started: Started, metrics: Metrics, engine: EngineThread, log: Log
    ) -> None:
        self.options, self.state, self.metrics, self.log = options, started.state, metrics, log
        model = started.engine.model
        self.tokenizer: Tokenizer = model.tokenizer
        self._max_jobs = started.engine.max_batch + options.max_queue
        self._max_tokens_in = options.max_tokens_in or model.n_ctx
        self._engine = engine
        engine.listener = self
        self._jobs: dict[str, Job] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._pool = ThreadPoolExecutor(1, "slow-work")
        self.closing = False
        self.stop_asked = asyncio.Event()

    def accept(self, jobs: Sequence[Job], deadline: str | None) -> None:
        """Accept all of the jobs, or none, and pass them to the engine. Raises WorkerError if one is refused."""
        try:
            timeout_s = self._admit(jobs, deadline)
        except WorkerError as e:
            self.refused(e, jobs[0].job_id)
            raise
        for job in jobs:
            self._begin(job, timeout_s)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Count and log an error that is raised inside as a refused request. Raises it as a WorkerError."""
        try:
            yield
        except (WorkerError, RefengineError) as e:
            error = to_worker_error(e)
            self.refused(error)
            raise error from None

    def refused(self, fault: WorkerError, job_id: str | None = None) -> None:
        """Count and log a request that was refused."""
        self.metrics.requests["refused"].inc()
        field = fault.field if fault.field in LOGGED_FIELDS else None  # an unknown field's name is the client's text
        self.log("error", "WARNING", job_id=job_id, code=fault.code, field=field, status=fault.status)

    def _admit(self, jobs: Sequence[Job], deadline: str | None) -> float:
        """Check new jobs against the limits; returns their time limit in seconds. Raises WorkerError if one fails."""
        self.check_open()
        left = deadline_seconds(deadline, datetime.now(UTC))
        limit = self.options.max_tokens_out
        for job in jobs:
            max_tokens = job.params.max_tokens
            if max_tokens > limit:
                message = f"max_tokens: given {max_tokens}, allowed 1 to {limit} on this worker"
                raise WorkerError("INVALID_REQUEST", message, "max_tokens")
            if job.job_id in self._jobs:
                message = "job_id: another job with this id is still running or waiting; use a different id"
                raise WorkerError("INVALID_REQUEST", message, "job_id", status=409)
        if len(jobs) > self._max_jobs:
            message = f"prompt: given {len(jobs)} prompts, allowed {self._max_jobs} on this worker"
            raise WorkerError("INVALID_REQUEST", message, "prompt")
        if len(self._jobs) + len(jobs) > self._max_jobs:
            n_wait = self.options.max_queue
            message = f"the queue is full ({self._max_jobs - n_wait} requests run, {n_wait} wait): try again later"
            raise WorkerError("QUEUE_FULL", message)
        return min(self.options.inference_timeout_sec, math.inf if left is None else left)

    def _begin(self, job: Job, timeout_s: float) -> None:
        job.timeout_s = timeout_s
        self._jobs[job.job_id] = job
        self._empty.clear()
        if job.params.seed is None:
            job.params = replace(job.params, seed=choose_seed())
        job.timer = asyncio.get_running_loop().call_later(timeout_s, self._time_is_up, job)
        job.preparing = asyncio.create_task(self._prepare(job))

    async def _prepare(self, job: Job) -> None:
        try:
            job.ids = await self.run_aside(partial(self._encoded, job))
            self._engine.submit(job)
        except Exception as e:
            if not isinstance(e, WorkerError | RefengineError):
                self.log.failure(e, job_id=job.job_id)
            self.end(job, to_worker_error(e))

    def _encoded(self, job: Job) -> list[int]:
        """Check the job's parameters and tokenize its prompt. Raises WorkerError or RequestError."""
        job.params.check_for_model(self.state.model.vocab_size, self._n_tokens)
        try:
            ids = job.encode()
        except RefengineError as e:  # the prompt cannot be tokenized
            raise WorkerError("INVALID_REQUEST", f"{job.field}: {e}", job.field) from None
        if len(ids) > self._max_tokens_in:
            message = f"{job.field}: given {len(ids)} tokens, allowed 1 to {self._max_tokens_in} on this worker"
            raise WorkerError("INVALID_REQUEST", message, job.field)
        return ids

    def _n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special=False))

    async def run_aside(self, function: Callable[[], T]) -> T:
        """Run a function in the worker's one extra thread and return its result.

        For work that would block the event loop, such as tokenizing a long prompt or building a large answer.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def on_start(self, job: Job, queue_position: int) -> None:
        if not job.alive:
            return
        started = {
            "job_id": job.job_id,
            "model": self.state.model.model,
            "started_at": now_rfc3339(),
            "seed": job.params.seed,
            "queue_position": queue_position,
        }
        job.emit("started", started)
        job.queue_position.set_result(queue_position)
        self.log(
            "execute_start",
            job_id=job.job_id,
            **job.prompt_facts,
            tokens_in=len(job.ids),
            max_tokens=job.params.max_tokens,
            queue_position=queue_position,
            deadline_sec=round(job.timeout_s, 3),
        )

    def on_scores(self, job: Job, scores: list[Score | None]) -> None:
        if job.alive:
            job.emit("prompt", {"ids": job.ids, "scores": scores})

    def on_tokens(self, job: Job, tokens: list[Token], drawn: float) -> None:
        if not job.alive:
            return
        if job.first_token is None:
            self.metrics.first_token_ms.observe((drawn - job.arrived) * 1000)
        for token in tokens:
            job.emit_token(token, drawn, self.tokenizer)
        self._emit_metrics(job, drawn)

    def on_error(self, job: Job, error: WorkerError) -> None:
        self.end(job, error)

    def on_end(self, job: Job, stop_reason: str, prefix_tokens_reused: int) -> None:
        if not job.alive:
            return
        end = {
            "tokens_out": job.tokens_out,
            "decode_time_ms": job.decode_time_ms,
            "stop_reason": stop_reason,
            "first_token_ms": job.first_token_ms,
            "tokens_in": len(job.ids),
            "prefix_tokens_reused": prefix_tokens_reused,
        }
        job.emit("end", end)
        self._close(job, stop_reason)

    def _emit_metrics(self, job: Job, now: float) -> None:
        """Queue a `metrics` event if the worker's options ask for one and the interval since the last is over."""
        interval, began = self.options.metrics_event_sec, job.first_token
        if not interval or began is None or now - (job.last_metrics or began) < interval:
            return
        job.last_metrics = now
        engine = self.state.load.engine
        figures = {
            "tokens_out": job.tokens_out,
            "tokens_per_second": round((job.tokens_out - 1) / (now - began), 3),
            "batch_size": engine.running,
            "queue_depth": engine.waiting,
            "kv_blocks_used": engine.blocks_used,
            "kv_blocks_free": engine.blocks_free + engine.blocks_cached,
        }
        job.emit("metrics", figures)

    def end(self, job: Job, fault: WorkerError, outcome: str | None = None) -> None:
        """End a job with an error. Does nothing for a job that has ended."""
        if not job.alive:
            return
        if job.queue_position.done():
            job.emit("error", fault.event())
        else:
            job.queue_position.set_exception(fault)
            job.queue_position.exception()  # marks it as read: asyncio must not warn if nothing awaits this future
        self._engine.cancel(job)
        outcome = outcome or OUTCOME_OF.get(fault.code, "error")
        if outcome == "refused":
            self._forget(job, outcome)
            self.refused(fault, job.job_id)
        else:
            self._close(job, outcome, code=fault.code)

    def cancel(self, name: str) -> None:
        """End the job with this id, or all jobs of the answer with this id. Does nothing if there is none."""
        for job in list(self._jobs.values()):
            if name in (job.job_id, job.answer_id):
                self.end(job, WorkerError("CANCELLED", "the job was cancelled"))

    def disconnected(self, *jobs: Job) -> None:
        """End jobs whose client has disconnected. Does nothing for a job that has ended."""
        for job in jobs:
            self.end(job, WorkerError("CANCELLED", "the client disconnected"), "disconnected")

    def _time_is_up(self, job: Job) -> None:
        self.end(job, WorkerError("INFERENCE_TIMEOUT", f"not finished within its limit of {job.timeout_s:.3f} s"))

    def _close(self, job: Job, outcome: str, **fields: Any) -> None:
        self._forget(job, outcome)
        self.metrics.requests[outcome].inc()
        self.metrics.duration_ms.observe((time.perf_counter() - job.arrived) * 1000)
        self.log(
            "execute_end",
            job_id=job.job_id,
            outcome=outcome,
            **fields,
            vram_bytes=self.state.vram_bytes_used,
            tokens_in=len(job.ids),
            tokens_out=job.tokens_out,
            first_token_ms=job.first_token_ms,
            decode_time_ms=job.decode_time_ms,
        )

    def _forget(self, job: Job, outcome: str) -> None:
        job.close(outcome)
        self._jobs.pop(job.job_id, None)
        if not self._jobs:
            self._empty.set()

    def check_open(self) -> None:
        """Raises WorkerError once the worker is closing."""
        if self.closing:
            raise WorkerError("SHUTTING_DOWN", "this worker is shutting down: use another worker")

    async def finish(self, grace_s: float) -> int:
        """Accept no new jobs, and wait for the live ones. Cancels those that have not ended after `grace_s` seconds.

        Returns the number of cancelled jobs.
        """
        self.closing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), grace_s)
        cut = list(self._jobs.values())
        for job in cut:
            self.end(job, WorkerError("CANCELLED", "the worker is shutting down"))
        return len(cut)

    def close(self) -> None:
        """Stop the extra thread. Called after the last answer has been sent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
