"""What OpenAI's clients send and read: requests, checked as strictly as our own, and answers made of a job's events.

What is not offered (several choices of one prompt, the two penalties, tools) is refused, not ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from refengine.engine.generation import Score
from refengine.engine.sampling import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, SamplingParams
from refengine.tokenizer import Tokenizer
from refengine.tokenizer.stream import StreamDecoder
from refengine.worker.faults import Fault
from refengine.worker.jobs import Event, scored
from refengine.worker.requests import MAX_PROMPT_CHARS, Stop, Stops, Strict, sampling_of

MAX_PROMPT_IDS = 1 << 17
MAX_PROMPTS = 64
MAX_MESSAGES = 1024
FINISH_REASON = {"eos": "stop", "stop": "stop", "length": "length"}

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
PromptIds = Annotated[list[int], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
Count = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


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
    stop: Stop | Stops | None = None
    seed: Annotated[int | None, Field(ge=0, le=2**64 - 1)] = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """As the engine takes them. Raises RequestError, Fault."""
        return self._sampling(max_tokens_out, None, None)

    def _sampling(self, max_tokens_out: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return sampling_of(self, max_tokens_out, stops, logprobs, prompt_logprobs)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """The body of POST /v1/completions.

    prompt: text, or token ids that are taken as they are; or a list of either, which gives a choice for each.
    echo: the prompt comes before its completion; with logprobs, its tokens' log-probabilities too.
    max_tokens 0, with echo: nothing but the prompt.
    """

    prompt: (
        Prompt
        | PromptIds
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int | None, Field(ge=0, le=DEFAULT_MAX_TOKENS)] = None
    logprobs: Count | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """At least one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        of_one = isinstance(self.prompt[0], int)
        return [self.prompt] if of_one else list(self.prompt)  # type: ignore[list-item, arg-type]

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """As the engine takes them; where no token is asked for it draws one all the same. Raises RequestError."""
        if self.max_tokens == 0 and not self.echo:
            raise Fault("INVALID_REQUEST", "max_tokens: given 0, allowed with echo only", "max_tokens")
        asked = self.model_copy(update={"max_tokens": self.max_tokens if self.max_tokens != 0 else 1})
        return asked._sampling(max_tokens_out, self.logprobs, self.logprobs if self.echo else None)


# No other names: many templates make their special tokens of it, and `end` or `endoftext` would be one.
Role = Literal["system", "developer", "user", "assistant", "tool", "function", "ipython"]


class Message(Strict):
    role: Role
    content: Text


class ChatRequest(Common):
    """The body of POST /v1/chat/completions. Goes through the model's own template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: Count | None = None

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """As the engine takes them. Raises RequestError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Fault("INVALID_REQUEST", "top_logprobs: given without logprobs: true", "top_logprobs")
        return self._sampling(max_tokens_out, (self.top_logprobs or 0) if self.logprobs else None, None)


class TokenizeRequest(Strict):
    """The body of POST /tokenize: the text as llama.cpp's server names it (content), or as vLLM's (prompt)."""

    content: Text | None = None
    add_special: bool = True
    parse_special: bool = False
    prompt: Text | None = None
    add_special_tokens: bool = True
    model: str | None = None

    def arguments(self) -> tuple[str, dict[str, bool]]:
        """Text and keywords of `Tokenizer.encode`. Raises Fault unless one of the two texts is given."""
        if (self.content is None) == (self.prompt is None):
            given = "neither" if self.content is None else "both"
            raise Fault("INVALID_REQUEST", f"content: given {given} of content and prompt, allowed one", "content")
        if self.content is not None:
            return self.content, {"add_special": self.add_special, "parse_special": self.parse_special}
        return self.prompt or "", {"add_special": self.add_special_tokens, "parse_special": True}


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    tokens: Annotated[list[int], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
    model: str | None = None


class Logprobs:
    """Log-probabilities of tokens in the form of completions: parallel lists."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.offset = 0  # in the text of the choice, where the next token's begins

    def text_of(self, token_id: int) -> str:
        """Of a token; bytes that are no text by themselves, such as a part of a code point, in hexadecimal."""
        found = self._tokenizer.token_bytes(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def of(self, entries: Sequence[dict[str, Any]], decoder: StreamDecoder) -> dict[str, Any]:
        """entries: of `jobs.scored`. decoder: of their text, part of which may be sent later than they are."""
        tokens, offsets = [self.text_of(entry["id"]) for entry in entries], []
        for token, entry in zip(tokens, entries, strict=True):
            text = decoder.push(entry["id"])
            before = len(text) - len(token) if text.endswith(token) else 0  # U+FFFD, for bytes that are no text
            offsets.append(self.offset + before)
            self.offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: dict[str, Any]) -> dict[str, float] | None:
        """The likeliest, and the token itself; of tokens with one text the likeliest counts."""
        if entry["logprob"] is None and not entry["top"]:
            return None
        found: dict[str, float] = {}
        for one in [*entry["top"], entry]:
            if one["logprob"] is not None:
                found.setdefault(self.text_of(one["id"]), one["logprob"])
        return found

    def of_chat(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The same in the form of chats."""
        return {**self._one(entry), "top_logprobs": [self._one(one) for one in entry["top"]]}

    def _one(self, entry: dict[str, Any]) -> dict[str, Any]:
        token_bytes = list(self._tokenizer.token_bytes(entry["id"]))
        return {"token": self.text_of(entry["id"]), "logprob": entry["logprob"], "bytes": token_bytes}


class Choice:
    """Makes the parts of one choice of a job's events; a whole one is its parts put together.

    echo: the prompt's text, where it is to come first. silent: leave what was generated out.
    prompt_ids: to be set before the first event.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        chat: bool = False,
        logprobs: bool = False,
        echo: str | None = None,
        silent: bool = False,
    ) -> None:
        self._index, self._tokenizer, self._chat, self._silent = index, tokenizer, chat, silent
        self._logprobs = Logprobs(tokenizer) if logprobs else None
        self._echo = echo
        self._decoder = tokenizer.stream()
        self.prompt_ids: Sequence[int] = ()
        self.usage: dict[str, Any] | None = None  # once it has ended well

    def parts(self, event: Event) -> list[dict[str, Any]]:
        """What a stream sends for an event: maybe nothing."""
        name, data = event
        if name == "started":
            self._decoder = self._tokenizer.stream(skip_special=True, prompt_ids=self.prompt_ids)
            if self._chat:
                return [self._part({"role": "assistant", "content": ""})]
            return [self._part(self._echo)] if self._echo is not None and self._logprobs is None else []
        if name == "prompt":
            return [self._part(self._echo, self._of_prompt(data["ids"], data["scores"]))] if self._logprobs else []
        if name == "token" and not self._silent:
            text, logprobs = data["t"], self._of_token(data)
            if not text and logprobs is None:
                return []
            return [self._part({"content": text} if self._chat else text, logprobs)]
        if name == "end":
            self.usage = self._usage(data)
            reason = "length" if self._silent else FINISH_REASON[data["stop_reason"]]
            return [self._part({} if self._chat else "", None, reason)]
        return []

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Of all events of a job that has ended well."""
        parts = [part for event in events for part in self.parts(event)]
        kept = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        logprobs = None
        if self._logprobs is not None:
            names = ["content"] if self._chat else ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
            logprobs = {name: [one for block in kept for one in block[name]] for name in names}
        said: dict[str, Any]
        if self._chat:
            content = "".join(part["delta"].get("content", "") for part in parts)
            said = {"message": {"role": "assistant", "content": content}}
        else:
            said = {"text": "".join(part["text"] for part in parts)}
        finish_reason = parts[-1]["finish_reason"]
        return {"index": self._index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _part(self, said: Any, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        body = {"delta": said} if self._chat else {"text": said}
        return {"index": self._index, **body, "logprobs": logprobs, "finish_reason": finish_reason}

    def _of_token(self, data: dict[str, Any]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": [self._logprobs.of_chat(data)]} if self._chat else self._logprobs.of([data], self._decoder)

    def _of_prompt(self, ids: Sequence[int], scores: Sequence[Score | None]) -> dict[str, Any]:
        """Of a long prompt it takes its time."""
        assert self._logprobs is not None
        entries = [scored(i, score, self._tokenizer) for i, score in zip(ids, scores, strict=True)]
        with_special = self._tokenizer.decode(ids) == self._echo  # without the BOS that a text is given
        logprobs = self._logprobs.of(entries, self._tokenizer.stream(skip_special=not with_special))
        self._logprobs.offset = len(self._echo or "")
        return logprobs

    def _usage(self, end: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt_tokens": end["tokens_in"],
            "completion_tokens": 0 if self._silent else end["tokens_out"],
            "cached_tokens": end["prefix_tokens_reused"],
        }


class Answer:
    """Choices under one head. id: as /cancel takes it, which ends all jobs; a later job's own adds -1, -2, …"""

    def __init__(self, chat: bool, model: str, choices: Sequence[Choice], with_usage: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._chat, self._model, self._choices, self._with_usage = chat, model, choices, with_usage
        self._created = int(time.time())

    def job_id(self, number: int) -> str:
        return f"{self.id}-{number}" if number else self.id

    def chunks(self, number: int, event: Event) -> list[dict[str, Any]]:
        """What a stream sends for an event of a job: maybe nothing."""
        name, data = event
        if name == "error":
            return [{"error": error_of(data["code"], data["message"], None)}]
        chunks = [{**self._head(True), "choices": [part]} for part in self._choices[number].parts(event)]
        if name == "end" and self._with_usage and all(choice.usage is not None for choice in self._choices):
            chunks.append({**self._head(True), "choices": [], "usage": self._usage()})
        return chunks

    def whole(self, events: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """One object, of the events of jobs that have all ended well."""
        choices = [choice.whole(own) for choice, own in zip(self._choices, events, strict=True)]
        return {**self._head(False), "choices": choices, "usage": self._usage()}

    def _head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, Any]:
        n_in, n_out, n_cached = (
            sum(choice.usage[name] for choice in self._choices if choice.usage is not None)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
        )
        return {
            "prompt_tokens": n_in,
            "completion_tokens": n_out,
            "total_tokens": n_in + n_out,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }


def error_of(code: str, message: str, field: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if code == "INVALID_REQUEST" else "server_error"
    return {"message": message, "type": kind, "param": field, "code": code}
