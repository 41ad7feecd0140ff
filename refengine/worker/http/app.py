"""The HTTP side: routes, the answer that streams, and how faults look to a client. What is done is in worker.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from refengine.errors import RefengineError
from refengine.worker.errors import WorkerError, to_worker_error
from refengine.worker.http.openai import error_of
from refengine.worker.http.requests import MAX_BODY_BYTES, CancelRequest, ExecuteRequest, R, parse
from refengine.worker.http.stream import EventStream, sse, taken, watching
from refengine.worker.jobs.job import Job
from refengine.worker.jobs.worker import Worker
from refengine.worker.telemetry.log import prompt_facts
from refengine.worker.telemetry.metrics import CONTENT_TYPE

LONG_BODY_BYTES = 1 << 16  # parsing 1 MiB takes up to 60 ms
BODY_TIMEOUT_S = 10.0  # for a client to send all of its request
OPEN_PATHS = {"/health"}  # answered without a key
CHALLENGE = 'Basic realm="refengine", charset="UTF-8", Bearer realm="refengine"'


class Guard:
    """Lets a request through that has the key, or needs none, and that no page of another site sent.

    A browser sends such requests for any page that its user looks at, also to 127.0.0.1, and says so in `Origin`;
    unless that site's name has been made to mean 127.0.0.1 (DNS rebinding), which shows in `Host`.
    hosts: the names that are answered in `Host`; None: any.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: frozenset[str] | None = None) -> None:
        self._app, self._key, self._hosts = app, None if key is None else key.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            fault = self._fault(Headers(scope=scope), scope["path"])
            if fault is not None:
                refusal = answer(fault, scope["path"])
                if fault.status == 401:
                    refusal.headers["WWW-Authenticate"] = CHALLENGE
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _fault(self, headers: Headers, path: str) -> WorkerError | None:
        host = headers.get("host")
        if self._hosts is not None and host is not None and _name_in(host) not in self._hosts:
            message = "Host: not a name of this worker (see --allowed-host)"
            return WorkerError("INVALID_REQUEST", message, "Host", status=421)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return WorkerError("UNAUTHORIZED", "requests from pages of other sites are refused", "Origin", status=403)
        if self._key is None or path in OPEN_PATHS:
            return None
        if hmac.compare_digest(_key_in(headers.get("authorization", "")), self._key):  # takes as long for every key
            return None
        return WorkerError("UNAUTHORIZED", "this worker wants its key: Authorization: Bearer KEY, or as a password")


def _name_in(host: str) -> str:
    """Of a `Host` header, without the port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _key_in(authorization: str) -> bytes:
    """The key of a Bearer, or the password of a Basic header, whatever its user; else nothing."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip().encode()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    return b""


def make_app(worker: Worker) -> FastAPI:
    """All routes of one worker."""
    app = FastAPI(title="refengine worker", docs_url=None, redoc_url=None)

    app.add_middleware(Guard, key=worker.options.api_key, hosts=worker.options.hosts)

    @app.exception_handler(WorkerError)
    async def on_fault(request: Request, fault: WorkerError) -> Response:
        return answer(fault, request.url.path)

    @app.exception_handler(RefengineError)
    async def on_error(request: Request, error: RefengineError) -> Response:
        return answer(to_worker_error(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        fault = WorkerError(
            "INVALID_REQUEST", f"{request.method} {request.url.path[:80]}: {error.detail}", None, error.status_code
        )
        refusal = answer(fault, request.url.path)
        refusal.headers.update(error.headers or {})
        return refusal

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        worker.log.failure(error)
        return answer(to_worker_error(error), request.url.path)

    @app.post("/execute", openapi_extra=body_of(ExecuteRequest))
    async def execute(request: Request) -> Response:
        """Generate: answers with server-sent events: started, token (many), metrics (where asked for), end or error."""
        with worker.refusing():
            worker.check_open()
            body = await parsed(worker, request, ExecuteRequest)
            params = body.sampling(worker.options.max_tokens_out)
        encode = partial(worker.tokenizer.encode, body.prompt)
        jobs = [Job(body.job_id, encode, params, prompt_facts(body.prompt))]
        worker.accept(jobs, request.headers.get("x-deadline"))
        with watching(worker, jobs, request.receive):
            await taken(jobs)
        return EventStream(worker, jobs, sse)

    @app.post("/cancel", status_code=202, openapi_extra=body_of(CancelRequest))
    async def cancel(request: Request) -> dict[str, Any]:
        """End a job, or all jobs of an answer. Accepted also for one that has ended, or never was."""
        job_id = (await parsed(worker, request, CancelRequest)).job_id
        worker.cancel(job_id)
        return {"job_id": job_id}

    @app.post("/shutdown", status_code=202)
    async def shutdown() -> dict[str, Any]:
        """Take nothing new in, let the jobs that live finish for a few seconds, and exit."""
        worker.closing = True
        worker.stop_asked.set()
        return {"status": "shutting down"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Healthy or not and why, the model, the device, its memory: what is known, without asking the device."""
        return worker.state.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, gauges and histograms as Prometheus reads them."""
        return Response(worker.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return app


def answer(fault: WorkerError, path: str = "") -> Response:
    """Under /v1/ as OpenAI's clients read it."""
    body = fault.body()
    if path.startswith("/v1/"):
        body = {"error": error_of(fault.code, fault.message, fault.field)}
    return JSONResponse(body, fault.status, fault.headers())


async def parsed(worker: Worker, request: Request, kind: type[R]) -> R:
    """What a body asks for; a long one is not parsed in the event loop's thread. Raises WorkerError."""
    body = await read_body(request)
    return parse(kind, body) if len(body) <= LONG_BODY_BYTES else await worker.run_aside(partial(parse, kind, body))


async def read_body(request: Request) -> bytes:
    """All of it, within a size and a time. Raises WorkerError."""
    parts, n_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > MAX_BODY_BYTES:
                    raise WorkerError(
                        "INVALID_REQUEST", f"the body: given more than the {MAX_BODY_BYTES} bytes allowed", status=413
                    )
                parts.append(part)
    except TimeoutError:
        message = f"the body was not there within {BODY_TIMEOUT_S:g} s"
        raise WorkerError("INVALID_REQUEST", message, status=408) from None
    except ClientDisconnect:
        raise WorkerError("CANCELLED", "the client has gone") from None
    return b"".join(parts)


def body_of(kind: Any) -> dict[str, Any]:
    """The OpenAPI document's words for a body that is parsed here, and not by FastAPI."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
