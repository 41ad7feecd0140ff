"""The worker's jobs: who may come in, how each ends, and when the last has gone. All of it in the event loop's thread.

However a job ends (last token, error, cancel, disconnect, deadline, shutdown), its client gets exactly one last event,
at once; the engine is told to drop it, and what it still says of a job that has ended is not heard.
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
from refengine.worker.errors import Fault, fault_of
from refengine.worker.http.requests import ExecuteRequest, deadline_seconds
from refengine.worker.jobs.engine_thread import EngineThread, Started
from refengine.worker.jobs.job import Ended, Job, JobSpec, Taken
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log, now_rfc3339
from refengine.worker.telemetry.metrics import Metrics

OUTCOME_OF = {"CANCELLED": "cancelled", "INFERENCE_TIMEOUT": "timeout", "INVALID_REQUEST": "refused"}
T = TypeVar("T")
LOGGED_FIELDS = {*ExecuteRequest.model_fields, "X-Deadline"}


class Worker:
    def __init__(
        self, options: WorkerOptions, started: Started, metrics: Metrics, engine: EngineThread, log: Log
    ) -> None:
        self.options, self.state, self.metrics, self.log = options, started.state, metrics, log
        model = started.engine.model
        self.tokenizer: Tokenizer = model.tokenizer
        self._room = started.engine.max_batch + options.max_queue  # for jobs
        self._max_tokens_in = options.max_tokens_in or model.n_ctx
        self._engine = engine
        engine.listener = self
        self._jobs: dict[str, Job] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._pool = ThreadPoolExecutor(1, "aside")
        self.closing = False
        self.stop_asked = asyncio.Event()

    def accept(self, wanted: Sequence[JobSpec], deadline: str | None) -> list[Job]:
        """A job for each, on its way to the engine; all of them, or none. Raises Fault."""
        try:
            timeout_s = self._admit(wanted, deadline)
        except Fault as e:
            self.refused(e, wanted[0].job_id)
            raise
        return [self._begin(one, timeout_s) for one in wanted]

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """What is refused inside is counted and logged. Raises Fault."""
        try:
            yield
        except (Fault, RefengineError) as e:
            fault = fault_of(e)
            self.refused(fault)
            raise fault from None

    def refused(self, fault: Fault, job_id: str | None = None) -> None:
        """Count and log a request that never became a job."""
        self.metrics.requests["refused"].inc()
        field = fault.field if fault.field in LOGGED_FIELDS else None  # not the name of an unknown one
        self.log("error", "WARNING", job_id=job_id, code=fault.code, field=field, status=fault.status)

    def _admit(self, wanted: Sequence[JobSpec], deadline: str | None) -> float:
        """The seconds that jobs are given. Raises Fault where one of them may not come in."""
        self.check_open()
        left = deadline_seconds(deadline, datetime.now(UTC))
        limit = self.options.max_tokens_out
        for one in wanted:
            given = one.params.max_tokens
            if given > limit:
                message = f"max_tokens: given {given}, allowed 1 to {limit} on this worker"
                raise Fault("INVALID_REQUEST", message, "max_tokens")
            if one.job_id in self._jobs:
                message = "job_id: a job of this id is alive; ids must differ"
                raise Fault("INVALID_REQUEST", message, "job_id", status=409)
        if len(wanted) > self._room:
            message = f"prompt: given {len(wanted)} of them, allowed {self._room} on this worker"
            raise Fault("INVALID_REQUEST", message, "prompt")
        if len(self._jobs) + len(wanted) > self._room:
            n_wait = self.options.max_queue
            raise Fault("QUEUE_FULL", f"{self._room - n_wait} requests run and {n_wait} wait: come back later")
        return min(self.options.inference_timeout_sec, math.inf if left is None else left)

    def _begin(self, wanted: JobSpec, timeout_s: float) -> Job:
        job = Job(wanted.job_id, timeout_s, wanted.answer_id)
        self._jobs[job.job_id] = job
        self._empty.clear()
        params = wanted.params
        job.params = params if params.seed is not None else replace(params, seed=choose_seed())
        job.prompt_facts = wanted.prompt_facts
        job.timer = asyncio.get_running_loop().call_later(timeout_s, self._time_is_up, job)
        job.preparing = asyncio.create_task(self._prepare(job, wanted))
        return job

    async def _prepare(self, job: Job, wanted: JobSpec) -> None:
        try:
            job.ids = await self.aside(partial(self._encoded, wanted))
            self._engine.submit(job)
        except Exception as e:
            if not isinstance(e, Fault | RefengineError):
                self.log.failure(e, job_id=job.job_id)
            self.end(job, fault_of(e))

    def _encoded(self, wanted: JobSpec) -> list[int]:
        """The prompt's ids, checked, as the parameters are. Raises Fault, RequestError."""
        wanted.params.check_for_model(self.state.facts.vocab_size, self._n_tokens)
        try:
            ids = wanted.encode()
        except RefengineError as e:  # of this text
            raise Fault("INVALID_REQUEST", f"{wanted.field}: {e}", wanted.field) from None
        if len(ids) > self._max_tokens_in:
            message = f"{wanted.field}: given {len(ids)} tokens, allowed 1 to {self._max_tokens_in} on this worker"
            raise Fault("INVALID_REQUEST", message, wanted.field)
        return ids

    def _n_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special=False))

    async def aside(self, function: Callable[[], T]) -> T:
        """Its result, from the one thread for what would hold up the event loop: long prompts, answers about them."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def on_taken(self, job: Job, taken: Taken) -> None:
        if not job.alive:
            return
        started = {
            "job_id": job.job_id,
            "model": self.state.facts.model,
            "started_at": now_rfc3339(),
            "seed": job.params.seed,
            "queue_position": taken.queue_position,
        }
        job.emit("started", started)
        job.taken.set_result(taken)
        self.log(
            "execute_start",
            job_id=job.job_id,
            **job.prompt_facts,
            tokens_in=len(job.ids),
            max_tokens=job.params.max_tokens,
            queue_position=taken.queue_position,
            deadline_sec=round(job.timeout_s, 3),
        )

    def on_scores(self, job: Job, scores: list[Score | None]) -> None:
        if job.alive:
            job.emit("prompt", {"ids": job.ids, "scores": scores})

    def on_tokens(self, job: Job, tokens: list[Token], drawn: float, ended: Ended | None) -> None:
        if not job.alive:
            return
        if tokens and job.first_token is None:
            self.metrics.first_token_ms.observe((drawn - job.arrived) * 1000)
        for token in tokens:
            job.emit_token(token, drawn, self.tokenizer)
        self._emit_metrics(job, drawn)
        if ended is None:
            return
        if ended.fault is not None:
            self.end(job, ended.fault)
            return
        end = {
            "tokens_out": job.tokens_out,
            "decode_time_ms": job.decode_time_ms,
            "stop_reason": ended.stop_reason,
            "first_token_ms": job.first_token_ms,
            "tokens_in": len(job.ids),
            "prefix_tokens_reused": ended.prefix_tokens_reused,
        }
        job.emit("end", end)
        self._close(job, str(ended.stop_reason))

    def _emit_metrics(self, job: Job, now: float) -> None:
        """The event `metrics`, where the worker's options ask for it and its time has come."""
        every, began = self.options.metrics_event_sec, job.first_token
        if not every or began is None or now - (job.last_metrics or began) < every:
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

    def end(self, job: Job, fault: Fault, outcome: str | None = None) -> None:
        """End a job with an error. Harmless for one that has ended."""
        if not job.alive:
            return
        if job.taken.done():
            job.emit("error", fault.event())
        else:
            job.taken.set_exception(fault)
            job.taken.exception()  # whoever waits gets it; if nobody does, nobody is to be warned
        self._engine.cancel(job)
        outcome = outcome or OUTCOME_OF.get(fault.code, "error")
        if outcome == "refused":
            self._forget(job, outcome)
            self.refused(fault, job.job_id)
        else:
            self._close(job, outcome, code=fault.code)

    def cancel(self, name: str) -> None:
        """End the job of this id, or all jobs of the answer of this id. Harmless where there is none."""
        for job in list(self._jobs.values()):
            if name in (job.job_id, job.answer_id):
                self.end(job, Fault("CANCELLED", "the job was cancelled"))

    def disconnected(self, *jobs: Job) -> None:
        """Nobody reads any more. Harmless for a job that has ended."""
        for job in jobs:
            self.end(job, Fault("CANCELLED", "the client has gone"), "disconnected")

    def _time_is_up(self, job: Job) -> None:
        self.end(job, Fault("INFERENCE_TIMEOUT", f"not done after the {job.timeout_s:.3f} s it was given"))

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
        """Raises Fault once the worker is closing."""
        if self.closing:
            raise Fault("SHUTTING_DOWN", "this worker is shutting down: ask another")

    async def finish(self, grace_s: float) -> int:
        """Take nothing new in; the jobs that live finish, or are cut after `grace_s`. How many were cut."""
        self.closing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), grace_s)
        cut = list(self._jobs.values())
        for job in cut:
            self.end(job, Fault("CANCELLED", "the worker is shutting down"))
        return len(cut)

    def close(self) -> None:
        """The last answer has been sent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
