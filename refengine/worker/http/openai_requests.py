"""The request bodies of OpenAI's API, checked as strictly as the worker's own.

Where OpenAI's API allows null, it means the default. Features that the worker does not have (several choices for one
prompt, presence and frequency penalties, tools) are refused, not ignored: their fields accept only neutral values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from refengine.engine.sampling import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, SamplingParams
from refengine.worker.errors import WorkerError
from refengine.worker.http.requests import MAX_PROMPT_CHARS, Stop, Stops, Strict, sampling_of

MAX_PROMPT_IDS = 1 << 17
MAX_PROMPTS = 64
MAX_MESSAGES = 1024
MAX_PARTS = 1024  # text parts of a message
MAX_NAME_CHARS = 64


def _bool(value: Any) -> Any:
    """Refuse numbers: Literal[False] would accept 0, which equals False in Python."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be false")
    return value


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
PromptIds = Annotated[list[int], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
Count = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
One = Annotated[int, Field(ge=1, le=1)]
NoPenalty = Annotated[float, Field(ge=0.0, le=0.0)]
Off = Annotated[Literal[False], BeforeValidator(_bool)]
NoItems = Annotated[list[Any], Field(max_length=0)]
NoEntries = Annotated[dict[str, Any], Field(max_length=0)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Off = False


class Common(Strict):
    """The fields that completions and chats share.

    model: any name is accepted, because a worker has one model. user: ignored.
    """

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=DEFAULT_MAX_TOKENS)] = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 1.0
    top_p: Fraction | None = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Fraction = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    presence_penalty: NoPenalty | None = 0.0
    frequency_penalty: NoPenalty | None = 0.0
    logit_bias: NoEntries | None = None
    stop: Stop | Stops | None = None
    seed: Annotated[int | None, Field(ge=0, le=2**64 - 1)] = None
    n: One | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """The request's sampling parameters. Raises RequestError or WorkerError."""
        return self._sampling(max_tokens_out, None, None)

    def _sampling(self, max_tokens_out: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return sampling_of(self, max_tokens_out, stops, logprobs, prompt_logprobs)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """The body of POST /v1/completions.

    prompt: text, or token ids that are used unchanged, or a list of either; each prompt in a list gets its own choice.
    echo: return the prompt before its completion; with logprobs, also the log-probabilities of its tokens.
    max_tokens: 0 is allowed with echo and returns only the prompt.
    """

    prompt: (
        Prompt
        | PromptIds
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int | None, Field(ge=0, le=DEFAULT_MAX_TOKENS)] = None
    logprobs: Count | None = None
    echo: bool | None = False
    best_of: One | None = 1
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, at least one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        of_one = isinstance(self.prompt[0], int)
        return [self.prompt] if of_one else list(self.prompt)  # type: ignore[list-item, arg-type]

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """The request's sampling parameters. Raises RequestError or WorkerError.

        For max_tokens 0 the engine still generates one token, which the response omits.
        """
        if self.max_tokens == 0 and not self.echo:
            raise WorkerError("INVALID_REQUEST", "max_tokens: given 0, which is only allowed with echo", "max_tokens")
        request = self.model_copy(update={"max_tokens": self.max_tokens if self.max_tokens != 0 else 1})
        return request._sampling(max_tokens_out, self.logprobs, self.logprobs if self.echo else None)


# No other roles: many templates make special tokens from the role's name, so `end` or `endoftext` would become one.
Role = Literal["system", "developer", "user", "assistant", "tool", "function", "ipython"]


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a chat.

    name: the speaker's name, for templates that use it. The fields after it occur in the messages of responses, which
    clients send back; they must be null or empty.
    """

    role: Role
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: NoItems | None = None

    def for_template(self) -> dict[str, str]:
        """The message for the chat template. Text parts are joined with newlines, as in llama.cpp and vLLM."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        message = {"role": self.role, "content": "\n".join(parts)}
        return message if self.name is None else {**message, "name": self.name}


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    """The body of POST /v1/chat/completions. The model's chat template turns the messages into the prompt.

    max_completion_tokens: another name for max_tokens.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=DEFAULT_MAX_TOKENS)] = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    response_format: TextFormat | None = None
    store: Off | None = False
    metadata: NoEntries | None = None
    tools: NoItems | None = None
    audio: None = None
    modalities: None = None
    prediction: None = None
    reasoning_effort: None = None
    service_tier: None = None
    verbosity: None = None

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """The request's sampling parameters. Raises RequestError or WorkerError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise WorkerError("INVALID_REQUEST", "top_logprobs: given without logprobs: true", "top_logprobs")
        limit, field = self.max_completion_tokens, "max_completion_tokens"
        if limit is None:
            limit = self.max_tokens
        elif self.max_tokens not in (None, limit):
            message = f"{field}: given {limit}, but max_tokens is {self.max_tokens}"
            raise WorkerError("INVALID_REQUEST", message, field)
        elif limit > max_tokens_out:
            message = f"{field}: given {limit}, allowed 1 to {max_tokens_out} on this worker"
            raise WorkerError("INVALID_REQUEST", message, field)
        request = self.model_copy(update={"max_tokens": limit})
        return request._sampling(max_tokens_out, (self.top_logprobs or 0) if self.logprobs else None, None)


class TokenizeRequest(Strict):
    """The body of POST /tokenize.

    The text is in `content`, with the fields of llama.cpp's server, or in `prompt`, with those of vLLM's.
    """

    content: Text | None = None
    add_special: bool = True
    parse_special: bool = False
    prompt: Text | None = None
    add_special_tokens: bool = True
    model: str | None = None

    def arguments(self) -> tuple[str, dict[str, bool]]:
        """The text and the keyword arguments for `Tokenizer.encode`.

        Raises WorkerError unless exactly one of `content` and `prompt` is given.
        """
        if (self.content is None) == (self.prompt is None):
            given = "neither" if self.content is None else "both"
            message = f"content: given {given} of content and prompt, allowed exactly one"
            raise WorkerError("INVALID_REQUEST", message, "content")
        if self.content is not None:
            return self.content, {"add_special": self.add_special, "parse_special": self.parse_special}
        return self.prompt or "", {"add_special": self.add_special_tokens, "parse_special": True}


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    tokens: Annotated[list[int], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
    model: str | None = None
