"""The HTTP application: the worker's own routes, access checks, and error responses. Jobs are run by jobs/worker.py."""

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

LONG_BODY_BYTES = 1 << 16  # longer bodies are parsed outside the event loop: 1 MiB takes up to 60 ms
BODY_TIMEOUT_S = 10.0  # for a client to send the whole body
OPEN_PATHS = {"/health"}  # need no key
CHALLENGE = 'Basic realm="refengine", charset="UTF-8", Bearer realm="refengine"'


class Guard:
    """Refuses requests without the required key, and requests from web pages of other sites.

    Any page in a browser can send requests, even to 127.0.0.1. The browser names the page's site in `Origin`. If the
    site has made its own name resolve to 127.0.0.1 (DNS rebinding), `Origin` looks right, but `Host` has that name.
    hosts: the names that `Host` may have; None: any name.
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
        if hmac.compare_digest(_key_in(headers.get("authorization", "")), self._key):  # in constant time
            return None
        return WorkerError("UNAUTHORIZED", "this worker requires its key: Authorization: Bearer KEY, or as a password")


def _name_in(host: str) -> str:
    """The name in a `Host` header, without the port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _key_in(authorization: str) -> bytes:
    """The key in an `Authorization` header: the token of Bearer, or the password of Basic; else empty."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    return b""


def make_app(worker: Worker) -> FastAPI:
    """The application with the worker's own routes; the other modules add theirs."""
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
        """Generate text. The response is a stream of server-sent events.

        They are `started`, then a `token` for each token, `metrics` if the worker's options ask for it, and finally
        `end` or `error`.
        """
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
        """Cancel a job, or all jobs of an answer. Also accepted if no job with this id exists."""
        job_id = (await parsed(worker, request, CancelRequest)).job_id
        worker.cancel(job_id)
        return {"job_id": job_id}

    @app.post("/shutdown", status_code=202)
    async def shutdown() -> dict[str, Any]:
        """Accept no new jobs, give running jobs a few seconds to finish, and exit."""
        worker.closing = True
        worker.stop_asked.set()
        return {"status": "shutting down"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The worker's health with the reasons if unhealthy, the model, the device and its memory, all from a cache."""
        return worker.state.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(worker.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return app


def answer(fault: WorkerError, path: str = "") -> Response:
    """The response to a failed request. For paths under /v1/ it has the form of OpenAI's errors."""
    body = fault.body()
    if path.startswith("/v1/"):
        body = {"error": error_of(fault.code, fault.message, fault.field)}
    return JSONResponse(body, fault.status, fault.headers())


async def parsed(worker: Worker, request: Request, kind: type[R]) -> R:
    """Read and parse a request's body. Long bodies are parsed outside the event loop's thread. Raises WorkerError."""
    body = await read_body(request)
    return parse(kind, body) if len(body) <= LONG_BODY_BYTES else await worker.run_aside(partial(parse, kind, body))


async def read_body(request: Request) -> bytes:
    """Read a request's whole body. Raises WorkerError if it is too large or takes too long."""
    parts, n_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > MAX_BODY_BYTES:
                    raise WorkerError(
                        "INVALID_REQUEST", f"the body: given more than the allowed {MAX_BODY_BYTES} bytes", status=413
                    )
                parts.append(part)
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise WorkerError("INVALID_REQUEST", message, status=408) from None
    except ClientDisconnect:
        raise WorkerError("CANCELLED", "the client disconnected") from None
    return b"".join(parts)


def body_of(kind: Any) -> dict[str, Any]:
    """The OpenAPI description of a body that this module parses instead of FastAPI."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
