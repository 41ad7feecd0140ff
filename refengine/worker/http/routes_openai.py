"""The routes of OpenAI's API, and those of the tokenizer. Jobs, limits and errors are the same as for /execute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from refengine.engine.sampling import SamplingParams
from refengine.errors import RefengineError
from refengine.worker.errors import WorkerError
from refengine.worker.http.app import body_of, parsed
from refengine.worker.http.openai import Answer, Choice
from refengine.worker.http.openai_requests import (
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from refengine.worker.http.stream import EventStream, events_of, json_of, taken, watching
from refengine.worker.jobs.job import Event, Job
from refengine.worker.jobs.worker import Worker
from refengine.worker.telemetry.log import prompt_facts

R = TypeVar("R", bound=Common)
T = TypeVar("T")


def make_router(worker: Worker) -> APIRouter:
    """The router with these routes for one worker."""
    router = APIRouter()
    tokenizer, info = worker.tokenizer, worker.state.model

    entry = {"id": info.model, "object": "model", "created": 0, "owned_by": "refengine"}
    entry |= {"context_length": info.context_length}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """A list of the worker's one model."""
        return {"object": "list", "data": [entry]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The worker's model, by its name."""
        if model != info.model:
            message = f"model: given {model[:80]!r}, this worker has {info.model!r}"
            raise WorkerError("INVALID_REQUEST", message, "model", status=404)
        return entry

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Complete one or several prompts, given as text or token ids."""
        body, params = await _read(worker, request, CompletionRequest)
        prompts = body.prompts
        with worker.refusing():
            texts = [await text_of(prompt) if body.echo else None for prompt in prompts]
        choices = [
            Choice(i, tokenizer, False, body.logprobs is not None, text, body.max_tokens == 0)
            for i, text in enumerate(texts)
        ]
        answer = Answer(False, info.model, choices, body.with_usage)
        jobs = [
            Job(answer.job_id(i), partial(ids_of, prompt, choice), params, prompt_facts(words_of(prompt)), answer.id)
            for i, (prompt, choice) in enumerate(zip(prompts, choices, strict=True))
        ]
        return await _answer(worker, request, bool(body.stream), answer, jobs)

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation. The model's chat template turns the messages into the prompt."""
        body, params = await _read(worker, request, ChatRequest)
        messages = [message.for_template() for message in body.messages]
        answer = Answer(True, info.model, [Choice(0, tokenizer, True, bool(body.logprobs))], body.with_usage)
        job = Job(
            answer.id,
            partial(tokenizer.encode_chat, messages),
            params,
            prompt_facts(json_of(messages)),
            field="messages",
        )
        return await _answer(worker, request, bool(body.stream), answer, [job])

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """The token ids of a text."""
        worker.check_open()
        text, keywords = (await parsed(worker, request, TokenizeRequest)).arguments()
        tokens = await in_thread(partial(tokenizer.encode, text, **keywords), "content")
        return {"tokens": tokens, "count": len(tokens), "max_model_len": info.context_length}

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids, in the fields `content` (llama.cpp) and `prompt` (vLLM)."""
        worker.check_open()
        body = await parsed(worker, request, DetokenizeRequest)
        text = await in_thread(partial(tokenizer.decode, body.tokens), "tokens")
        return {"content": text, "prompt": text}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The special tokens and the chat template, as lm-evaluation-harness reads them to use /tokenize."""
        roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        texts = {name: None if i is None else tokenizer.token_text(i) for name, i in roles.items()}
        return {"tokenizer_class": info.tokenizer_kind, **texts, "chat_template": tokenizer.chat_template}

    def ids_of(prompt: str | list[int], choice: Choice) -> list[int]:
        choice.prompt_ids = ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return ids

    async def text_of(prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else await in_thread(partial(tokenizer.decode, prompt), "prompt")

    async def in_thread(work: Callable[[], T], field: str) -> T:
        try:
            return await worker.run_aside(work)
        except RefengineError as e:
            raise WorkerError("INVALID_REQUEST", f"{field}: {e}", field) from None

    return router


def words_of(prompt: str | list[int]) -> str:
    """A prompt as text: token ids are written as JSON. Used for the prompt's hash and length in the log."""
    return prompt if isinstance(prompt, str) else json_of(prompt)


async def _read(worker: Worker, request: Request, kind: type[R]) -> tuple[R, SamplingParams]:
    """Read a body and its sampling parameters. Raises WorkerError."""
    with worker.refusing():
        worker.check_open()
        body = await parsed(worker, request, kind)
        return body, body.sampling(worker.options.max_tokens_out)


async def _answer(worker: Worker, request: Request, stream: bool, answer: Answer, jobs: Sequence[Job]) -> Response:
    worker.accept(jobs, request.headers.get("x-deadline"))
    with watching(worker, jobs, request.receive):
        await taken(jobs)
        if not stream:
            events = await _all_events(jobs)
            body = await worker.run_aside(lambda: json_of(answer.whole(events)))
            return Response(body, media_type="application/json")

    def render(number: int, event: Event) -> str:
        return "".join(f"data: {json_of(chunk)}\n\n" for chunk in answer.chunks(number, event))

    return EventStream(worker, jobs, render, "data: [DONE]\n\n")


async def _all_events(jobs: Sequence[Job]) -> list[list[Event]]:
    """Wait for the jobs to end; returns the events of each job. Raises WorkerError if a job ends with an error."""
    collected: list[list[Event]] = [[] for _ in jobs]
    async for events in events_of(jobs):
        for number, (name, data) in events:
            if name == "error":
                raise WorkerError(data["code"], data["message"])
            collected[number].append((name, data))
    return collected
