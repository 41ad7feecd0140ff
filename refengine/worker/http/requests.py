"""The JSON bodies of requests, parsed strictly and checked before any work is done.

Stricter than JSON's grammar: no NaN or infinity, no duplicate name in an object, no unknown field, no string where a
number is expected. Every error is a WorkerError that names the field. The engine checks the limits that depend on the
model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from refengine.engine.sampling import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, MAX_STOPS, SamplingParams
from refengine.worker.errors import MAX_FIELD, WorkerError

MAX_BODY_BYTES = 1 << 20  # a prompt of 32,768 characters, each written as two escapes of six bytes, takes 384 KiB
MAX_PROMPT_CHARS = 32_768
MAX_ID_CHARS = 256  # the id is logged with every event of the job
MESSAGES = {"model_type": "Input should be an object", "none_required": "Input should be null"}  # instead of pydantic's
MAX_STOP_CHARS = 4096  # 32 tokens are allowed, and no vocabulary has tokens of more than 128 characters

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]


class Strict(BaseModel):
    """Base of all request bodies. Their lists use fail_fast, because only one of possibly many errors is reported."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_no_unknown_field(cls, value: Any) -> Any:
        """Refuse unknown fields before any other check; pydantic would collect an error for each of them."""
        if isinstance(value, dict) and any(name not in cls.model_fields for name in value):
            raise PydanticCustomError("unknown_field", "unknown field", {"kind": cls})
        return value


class ExecuteRequest(Strict):
    """The body of POST /execute."""

    job_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    max_tokens: Annotated[int | None, Field(ge=1, le=DEFAULT_MAX_TOKENS)] = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    stop: Stops = []
    seed: Annotated[int | None, Field(ge=0, le=2**64 - 1)] = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    def sampling(self, max_tokens_out: int) -> SamplingParams:
        """The request's sampling parameters. Raises RequestError."""
        return sampling_of(self, max_tokens_out, self.stop, self.logprobs or None)


def sampling_of(
    request: Any,
    max_tokens_out: int,
    stop: Sequence[str],
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The sampling parameters of a request whose fields are named as in `SamplingParams`.

    A field that is None gets the default. Raises RequestError.
    """
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
    values = {name: value for name in names if (value := getattr(request, name)) is not None}
    return SamplingParams(
        **{"max_tokens": max_tokens_out, **values},
        stop=tuple(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


class CancelRequest(Strict):
    """The body of POST /cancel."""

    job_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


R = TypeVar("R", bound=Strict)


def parse(kind: type[R], body: bytes) -> R:
    """Parse the bytes of a body. Raises WorkerError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as e:
        raise WorkerError("INVALID_REQUEST", f"the body is not UTF-8: byte {e.start} ({e.reason})") from None
    except json.JSONDecodeError as e:
        raise WorkerError("INVALID_REQUEST", f"the body is not JSON: {e.msg} at character {e.pos}") from None
    except RecursionError:
        raise WorkerError("INVALID_REQUEST", "the body's JSON is nested too deeply") from None
    except ValueError as e:  # an integer of thousands of digits
        raise WorkerError("INVALID_REQUEST", f"the body has a number that cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise WorkerError("INVALID_REQUEST", f"the body: given a JSON {type(value).__name__}, allowed an object")
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise _fault(e, value) from None


def deadline_seconds(header: str | None, now: datetime) -> float | None:
    """The seconds until the deadline in an `X-Deadline` header; None if there is no header.

    The header has a number of seconds from now, or a point in time (RFC 3339). Raises WorkerError for anything else,
    and for a deadline that has passed.
    """
    if header is None:
        return None
    text = header.strip()
    try:
        left = float(text)
    except ValueError:
        left = _seconds_until(text, now)
    if not math.isfinite(left):
        raise _bad_deadline(text)
    if left <= 0:
        raise WorkerError("INFERENCE_TIMEOUT", f"X-Deadline: given {text[:40]!r}, which has passed", "X-Deadline")
    return left


def _seconds_until(text: str, now: datetime) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _bad_deadline(text) from None
    if moment.tzinfo is None:
        raise _bad_deadline(text)
    return (moment - now).total_seconds()


def _bad_deadline(text: str) -> WorkerError:
    return WorkerError(
        "INVALID_REQUEST",
        f"X-Deadline: given {text[:40]!r}, allowed seconds from now or a time with its zone (2030-01-31T12:00:00Z)",
        "X-Deadline",
    )


def _no_constant(name: str) -> Any:
    raise WorkerError("INVALID_REQUEST", f"the body has {name}, which is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise WorkerError("INVALID_REQUEST", f"{name[:MAX_FIELD]}: given more than once", name)
    return result


def _fault(error: ValidationError, body: dict[str, Any]) -> WorkerError:
    """The WorkerError for one of pydantic's errors: the field, what was given (of text only its length), the problem.

    A value that may have one of several types has an error for each of them. Errors other than a wrong type are
    preferred, then the error at the deepest place.
    """
    problems = error.errors(include_url=False)
    problems = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    found = max(problems, key=lambda problem: (not problem["type"].endswith("_type"), len(_path(problem, body))))
    path = _path(found, body)
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    if found["type"] == "unknown_field":
        known = ", ".join(found["ctx"]["kind"].model_fields)
        return WorkerError("INVALID_REQUEST", f"{where}: unknown field, allowed {known}", str(path[0]))
    if found["type"] == "missing":
        return WorkerError("INVALID_REQUEST", f"{where}: is missing", str(path[0]))
    message = MESSAGES.get(found["type"], found["msg"])
    return WorkerError("INVALID_REQUEST", f"{where}: given {_shown(found['input'])}; {message}", str(path[0]))


def _path(problem: ErrorDetails, body: dict[str, Any]) -> list[str | int]:
    """The names and indexes of the invalid value in the body, without the type names that pydantic inserts."""
    path: list[str | int] = []
    value: Any = body
    for step in problem["loc"]:
        if isinstance(step, int) or (isinstance(value, dict) and step in value):
            path.append(step)
            value = value[step]
    if problem["type"] == "missing":
        path.append(problem["loc"][-1])
    if problem["type"] == "unknown_field":
        path.append(next(name for name in value if name not in problem["ctx"]["kind"].model_fields)[:MAX_FIELD])
    return path


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return f"{value:.10g}" if abs(value) < 2**63 else "a huge number"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"
