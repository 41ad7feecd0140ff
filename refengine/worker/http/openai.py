"""Responses in the form that OpenAI's clients read, made from the events of jobs."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from refengine.engine.generation import Score
from refengine.tokenizer import Tokenizer
from refengine.tokenizer.stream import StreamDecoder
from refengine.worker.jobs.job import Event, scored

FINISH_REASON = {"eos": "stop", "stop": "stop", "length": "length"}


class Logprobs:
    """Formats log-probabilities of tokens: as parallel lists for completions, as objects for chats."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.offset = 0  # where the next token begins in the choice's text, in characters

    def text_of(self, token_id: int) -> str:
        """A token's text. If its bytes are not valid UTF-8, such as a part of a code point, they are in hexadecimal."""
        token_bytes = self._tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def of(self, entries: Sequence[dict[str, Any]], decoder: StreamDecoder) -> dict[str, Any]:
        """The log-probabilities of successive tokens as the parallel lists of a completion.

        entries: the results of `scored` in jobs/job.py. decoder: decodes the tokens; it may hold text back until a
        later token completes it.
        """
        tokens, offsets = [self.text_of(entry["id"]) for entry in entries], []
        for token, entry in zip(tokens, entries, strict=True):
            text = decoder.push(entry["id"])
            before = len(text) - len(token) if text.endswith(token) else 0  # U+FFFD, for earlier invalid bytes
            offsets.append(self.offset + before)
            self.offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: dict[str, Any]) -> dict[str, float] | None:
        """Log-probabilities by text: the most likely tokens and the token itself.

        If several tokens have the same text, the most likely one is used.
        """
        if entry["logprob"] is None and not entry["top"]:
            return None
        by_text: dict[str, float] = {}
        for one in [*entry["top"], entry]:
            if one["logprob"] is not None:
                by_text.setdefault(self.text_of(one["id"]), one["logprob"])
        return by_text

    def of_chat(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of one token as the object of a chat completion."""
        return {**self._one(entry), "top_logprobs": [self._one(one) for one in entry["top"]]}

    def _one(self, entry: dict[str, Any]) -> dict[str, Any]:
        token_bytes = list(self._tokenizer.token_bytes(entry["id"]))
        return {"token": self.text_of(entry["id"]), "logprob": entry["logprob"], "bytes": token_bytes}


class Choice:
    """Makes one choice of a response, in parts or as a whole, from the events of its job.

    echo: the prompt's text if it comes before the completion, else None. silent: omit the generated text.
    prompt_ids: the prompt's token ids, to be set before the first event.
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
        self.usage: dict[str, Any] | None = None  # set when the job has ended without an error

    def parts(self, event: Event) -> list[dict[str, Any]]:
        """The parts that a stream sends for an event; may be empty."""
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
        """The whole choice, from all events of a job that has ended without an error."""
        parts = [part for event in events for part in self.parts(event)]
        kept = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        logprobs = None
        if self._logprobs is not None:
            names = ["content"] if self._chat else ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
            logprobs = {name: [one for block in kept for one in block[name]] for name in names}
        body: dict[str, Any]
        if self._chat:
            content = "".join(part["delta"].get("content", "") for part in parts)
            body = {"message": {"role": "assistant", "content": content}}
        else:
            body = {"text": "".join(part["text"] for part in parts)}
        finish_reason = parts[-1]["finish_reason"]
        return {"index": self._index, **body, "logprobs": logprobs, "finish_reason": finish_reason}

    def _part(self, content: Any, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        body = {"delta": content} if self._chat else {"text": content}
        return {"index": self._index, **body, "logprobs": logprobs, "finish_reason": finish_reason}

    def _of_token(self, data: dict[str, Any]) -> dict[str, Any] | None:
        if self._logprobs is None or "id" not in data:  # a token of a stop string has no id here
            return None
        return {"content": [self._logprobs.of_chat(data)]} if self._chat else self._logprobs.of([data], self._decoder)

    def _of_prompt(self, ids: Sequence[int], scores: Sequence[Score | None]) -> dict[str, Any]:
        """The log-probabilities of the prompt's tokens. Slow for a long prompt."""
        assert self._logprobs is not None
        entries = [scored(i, score, self._tokenizer) for i, score in zip(ids, scores, strict=True)]
        with_special = self._tokenizer.decode(ids) == self._echo  # false if the tokenizer has added BOS to a text
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
    """A response with one or several choices, each made by its own job.

    id: the response's id; /cancel with this id cancels all its jobs. The first job has the same id, the next ones have
    -1, -2, … added to it.
    """

    def __init__(self, chat: bool, model: str, choices: Sequence[Choice], with_usage: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._chat, self._model, self._choices, self._with_usage = chat, model, choices, with_usage
        self._created = int(time.time())

    def job_id(self, number: int) -> str:
        return f"{self.id}-{number}" if number else self.id

    def chunks(self, number: int, event: Event) -> list[dict[str, Any]]:
        """The chunks that a stream sends for an event of job `number`; may be empty."""
        name, data = event
        if name == "error":
            return [{"error": error_of(data["code"], data["message"], None)}]
        chunks = [{**self._head(True), "choices": [part]} for part in self._choices[number].parts(event)]
        if name == "end" and self._with_usage and all(choice.usage is not None for choice in self._choices):
            chunks.append({**self._head(True), "choices": [], "usage": self._usage()})
        return chunks

    def whole(self, events: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """The whole response, from the events of each job. All jobs must have ended without an error."""
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
    """An error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if code == "INVALID_REQUEST" else "server_error"
    return {"message": message, "type": kind, "param": field, "code": code}
