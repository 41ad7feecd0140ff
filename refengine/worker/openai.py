"""What OpenAI's clients send and read: requests, checked as strictly as our own, and answers made of a job's events.

Log-probabilities, echo and several choices are not offered: their fields are refused as unknown, not ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from refengine.engine.sampling import DEFAULT_MAX_TOKENS, MAX_STOPS, SamplingParams
from refengine.worker.jobs import Event
from refengine.worker.requests import MAX_PROMPT_CHARS, Strict, sampling_of

MAX_PROMPT_IDS = 1 << 17
MAX_MESSAGES = 1024
FINISH_REASON = {"eos": "stop", "stop": "stop", "length": "length"}

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """model: any name, since a worker has one model. user: ignored. The two penalties: off is all there is."""

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=DEFAULT_MAX_TOKENS)] = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int | None, Field(ge=0, le=2**64 - 1)] = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """As the engine takes them. Raises RequestError."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return sampling_of(self, max_tokens_out, stops)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """The body of POST /v1/completions: a prompt as text or as token ids, which are taken as they are."""

    prompt: (
        Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
        | Annotated[list[int], Field(min_length=1, max_length=MAX_PROMPT_IDS)]
    )


class Message(Strict):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text


class ChatRequest(Common):
    """The body of POST /v1/chat/completions. Goes through the model's own template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class TokenizeRequest(Strict):
    """The body of POST /tokenize."""

    content: Text
    add_special: bool = True
    parse_special: bool = False


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    tokens: Annotated[list[int], Field(max_length=MAX_PROMPT_IDS)]


class Answer:
    """Makes chunks, or one object, of the events of a job. id: the job's, as /cancel takes it."""

    def __init__(self, chat: bool, model: str, with_usage: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._chat, self._model, self._with_usage = chat, model, with_usage
        self._created = int(time.time())

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """What a stream sends for an event: maybe nothing."""
        name, data = event
        if name == "started":
            return [self._chunk({"role": "assistant", "content": ""})] if self._chat else []
        if name == "token":
            return [self._chunk({"content": data["t"]} if self._chat else data["t"])] if data["t"] else []
        if name == "end":
            last = self._chunk({} if self._chat else "", FINISH_REASON[data["stop_reason"]])
            return [last, {**self._head(True), "choices": [], "usage": _usage(data)}] if self._with_usage else [last]
        return [{"error": error_of(data["code"], data["message"], None)}]

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """One object, of the events of a job that has ended well."""
        text = "".join(data["t"] for name, data in events if name == "token")
        end = events[-1][1]
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text, "logprobs": None}
        choice = {"index": 0, **said, "finish_reason": FINISH_REASON[end["stop_reason"]]}
        return {**self._head(False), "choices": [choice], "usage": _usage(end)}

    def _chunk(self, said: Any, finish_reason: str | None = None) -> dict[str, Any]:
        body = {"delta": said} if self._chat else {"text": said, "logprobs": None}
        return {**self._head(True), "choices": [{"index": 0, **body, "finish_reason": finish_reason}]}

    def _head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}


def error_of(code: str, message: str, field: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if code == "INVALID_REQUEST" else "server_error"
    return {"message": message, "type": kind, "param": field, "code": code}


def _usage(end: dict[str, Any]) -> dict[str, Any]:
    n_in, n_out = end["tokens_in"], end["tokens_out"]
    details = {"cached_tokens": end["prefix_tokens_reused"]}
    return {
        "prompt_tokens": n_in,
        "completion_tokens": n_out,
        "total_tokens": n_in + n_out,
        "prompt_tokens_details": details,
    }
