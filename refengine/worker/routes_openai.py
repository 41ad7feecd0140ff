"""Routes that OpenAI's clients know, and the tokenizer's own. They share jobs, limits and faults with /execute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from refengine.errors import RefengineError
from refengine.worker.app import EventStream, body_of, json_of, read_body, until_gone
from refengine.worker.faults import Fault
from refengine.worker.jobs import Event, Job, Wanted
from refengine.worker.log import prompt_facts
from refengine.worker.openai import (
    Answer,
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from refengine.worker.requests import parse
from refengine.worker.worker import Worker

R = TypeVar("R", bound=Common)


def make_router(worker: Worker) -> APIRouter:
    """All of them, for one worker."""
    router = APIRouter()
    tokenizer, facts = worker.tokenizer, worker.state.facts

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": facts.model, "object": "model", "created": 0, "owned_by": "refengine"}
        return {"object": "list", "data": [{**entry, "context_length": facts.context_length}]}

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a prompt, given as text or token ids."""
        body = await _read(worker, request, CompletionRequest)
        prompt = body.prompt
        encode = partial(tokenizer.encode, prompt) if isinstance(prompt, str) else lambda: list(prompt)
        words = prompt if isinstance(prompt, str) else json_of(prompt)
        return await _answer(worker, request, body, False, encode, words)

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation, which goes through the model's own template."""
        body = await _read(worker, request, ChatRequest)
        messages = [message.model_dump() for message in body.messages]

        def encode() -> list[int]:
            try:
                rendered = tokenizer.render_chat(messages)
            except RefengineError as e:
                raise Fault("INVALID_REQUEST", f"messages: {e}", "messages") from None
            return tokenizer.encode(rendered, add_special=False, parse_special=True)

        return await _answer(worker, request, body, True, encode, json_of(messages))

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text."""
        body = parse(TokenizeRequest, await read_body(request))
        encode = partial(tokenizer.encode, body.content, add_special=body.add_special, parse_special=body.parse_special)
        return {"tokens": await worker.tokenizing(encode)}

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids."""
        tokens = parse(DetokenizeRequest, await read_body(request)).tokens
        try:
            return {"content": await worker.tokenizing(partial(tokenizer.decode, tokens))}
        except RefengineError as e:
            raise Fault("INVALID_REQUEST", f"tokens: {e}", "tokens") from None

    return router


async def _read(worker: Worker, request: Request, kind: type[R]) -> R:
    try:
        worker.check_open()
        return parse(kind, await read_body(request))
    except Fault as e:
        worker.refused(e)
        raise


async def _answer(
    worker: Worker, request: Request, body: Common, chat: bool, encode: Callable[[], list[int]], words: str
) -> Response:
    answer = Answer(chat, worker.state.facts.model, body.with_usage)
    wanted = Wanted(answer.id, encode, body.sampling(worker.options.max_tokens_out), prompt_facts(words))
    job = await worker.execute(wanted, request.headers.get("x-deadline"))
    if not body.stream:
        return JSONResponse(answer.whole(await _all_events(worker, job, request)))

    def render(event: Event) -> str:
        sent = "".join(f"data: {json_of(chunk)}\n\n" for chunk in answer.chunks(event))
        return sent + "data: [DONE]\n\n" if event[0] in ("end", "error") else sent

    return EventStream(worker, job, render)


async def _all_events(worker: Worker, job: Job, request: Request) -> list[Event]:
    """Until the job has ended well. Raises Fault where it has not; ends it where the client goes."""
    gone = asyncio.create_task(until_gone(request.receive))
    gone.add_done_callback(lambda _: worker.disconnected(job))
    events: list[Event] = []
    try:
        while (more := await job.events()) is not None:
            events += more
    finally:
        gone.cancel()
        worker.disconnected(job)  # harmless for a job that has ended
    name, data = events[-1]
    if name == "error":
        raise Fault(data["code"], data["message"])
    return events
