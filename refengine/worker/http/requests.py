"""The JSON that clients send: parsed strictly, and checked before any work is done.

Beyond JSON's own grammar: no NaN or infinity, no name twice in an object, no unknown field, no text where a number is
expected. Every refusal is a WorkerError that names the field. Limits that need the model are the engine's to check.
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

MAX_BODY_BYTES = 1 << 20  # a prompt of 32,768 characters, each as two escapes of six, takes 384 KiB
MAX_PROMPT_CHARS = 32_768
MAX_ID_CHARS = 256  # it is logged with every event of the job
WANTED = {"model_type": "Input should be an object", "none_required": "Input should be null"}  # not in Python's words
MAX_STOP_CHARS = 4096  # 32 tokens are allowed, and no vocabulary has longer ones than 128 characters

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]


class Strict(BaseModel):
    """Lists in it fail fast: a body has room for hundreds of thousands of errors, and one is told."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_no_unknown_field(cls, value: Any) -> Any:
        """Before all else, since pydantic would collect them all."""
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
        """As the engine takes them. Raises RequestError."""
        return sampling_of(self, max_tokens_out, self.stop, self.logprobs or None)


def sampling_of(
    request: Any,
    max_tokens_out: int,
    stop: Sequence[str],
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Of a request whose fields have the names of `SamplingParams`; None is the default. Raises RequestError."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    return SamplingParams(
        **{"max_tokens": max_tokens_out, **given},
        stop=tuple(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


class CancelRequest(Strict):
    """The body of POST /cancel."""

    job_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


R = TypeVar("R", bound=Strict)


def parse(kind: type[R], body: bytes) -> R:
    """A request from the bytes of a body. Raises WorkerError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except UnicodeDecodeError as e:
        raise WorkerError("INVALID_REQUEST", f"the body is no UTF-8: byte {e.start} ({e.reason})") from None
    except json.JSONDecodeError as e:
        raise WorkerError("INVALID_REQUEST", f"the body is no JSON: {e.msg} at character {e.pos}") from None
    except RecursionError:
        raise WorkerError("INVALID_REQUEST", "the body is no JSON that is read here: nested too deeply") from None
    except ValueError as e:  # an integer of thousands of digits
        raise WorkerError("INVALID_REQUEST", f"the body has a number that cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise WorkerError("INVALID_REQUEST", f"the body: given a JSON {type(value).__name__}, allowed an object")
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise _fault(e, value) from None


def deadline_seconds(header: str | None, now: datetime) -> float | None:
    """Seconds that `X-Deadline` leaves, given as seconds from now or as a point in time (RFC 3339).

    Raises WorkerError for anything else.
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
        f"X-Deadline: given {text[:40]!r}, allowed seconds from now or a time with zone (2030-01-31T12:00:00Z)",
        "X-Deadline",
    )


def _no_constant(name: str) -> Any:
    raise WorkerError("INVALID_REQUEST", f"the body has {name}, which is no JSON number")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise WorkerError("INVALID_REQUEST", f"{twin[:MAX_FIELD]}: given more than once", twin)
    return found


def _fault(error: ValidationError, body: dict[str, Any]) -> WorkerError:
    """One problem in words: where, what was given (of text only its length), what is allowed.

    A value that may be of several kinds has a problem for each: one within its kind counts most, then the deepest.
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
    wanted = WANTED.get(found["type"], found["msg"])
    return WorkerError("INVALID_REQUEST", f"{where}: given {_shown(found['input'])}; {wanted}", str(path[0]))


def _path(problem: ErrorDetails, body: dict[str, Any]) -> list[str | int]:
    """Names and indexes that lead to a problem, without the kinds of value that pydantic puts between them."""
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
