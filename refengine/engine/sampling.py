"""Samples a token from logits: temperature, repetition penalty, top-k, top-p, min-p, random draw, in that order.

The draw is exact, so every implementation of it gives the same token. Candidates are ranked by logit,
descending, ties by id, ascending. Each gets an integer weight

    weight = round(2**40 * exp((logit - largest logit) / temperature))         float64, half to even

and with the 64 random bits of (seed, token index) the token is the first in rank order whose running
sum of weights exceeds floor(bits * kept_mass / 2**64). Integer sums do not depend on the order of
additions, so a partial sort here and a parallel scan on a GPU reach the same token as a full sort.
Rounding changes a weight by at most half of 2**-40 of the most likely token's weight; 2**-40 is the least weight
of a token that can be drawn. On two machines whose exp() differs in the last bit, a weight can differ by one such
step, which is rare.

Top-k, top-p and min-p each keep a prefix of the ranking, so the kept set is the shortest of the three
and is described by its mass (sum of weights) alone.

Dividing by the temperature and penalising commute: a temperature is positive, and the penalty scales a
logit by a factor that depends on its sign only. The code penalises first and divides differences to the
largest logit, which cannot overflow however small the temperature is. Temperature 0 is the arg-max of
the penalised logits, ties to the lowest id; top-k, top-p and min-p always keep that token, and no random
number is used.

Runs on the host in NumPy. Independent of models, sequences and tokenizers.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.engine.philox import MAX_UINT64, random_bits
from refengine.errors import RefengineError, RequestError

MAX_TEMPERATURE = 2.0
MAX_REPETITION_PENALTY = 2.0
MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 32
DEFAULT_MAX_TOKENS = 2048

WEIGHT_ONE = 2**40
"""Weight of the most likely token. The sum of 2**22 tokens of this weight still fits into an int64."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample tokens, and when to stop. The constructor raises RequestError, which names field, value and range.

    Numbers are kept as Python float and int, `stop` as a tuple. Limits that depend on the model are checked by
    `check_for_model`.
    """

    temperature: float = 1.0
    """0 to 2; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the most likely tokens until their probabilities sum up to top_p, at least one; 1 is off."""
    min_p: float = 0.0
    """Keep tokens that are at least min_p times as likely as the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 0, up to 2; 1 is off, and more than 1 makes tokens of the history less likely."""
    seed: int | None = None
    """uint64; None means that the caller chooses one with `choose_seed` and reports it."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Maximum number of generated tokens, at least 1."""
    stop: Sequence[str] = ()
    """Up to 4 non-empty strings; see `refengine.engine.stop`."""
    logprobs: int | None = None
    """Report the log-probability of each token and of the 0 to 20 most likely ones; None reports none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens. The whole prompt is then computed, without the prefix cache."""

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE),
            "top_k": _integer("top_k", self.top_k, 0, None),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, above_low=True
            ),
            "seed": None if self.seed is None else _integer("seed", self.seed, 0, MAX_UINT64),
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, None),
            "stop": _stops(self.stop),
            "logprobs": _count("logprobs", self.logprobs),
            "prompt_logprobs": _count("prompt_logprobs", self.prompt_logprobs),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_for_model(self, n_vocab: int, count_tokens: Callable[[str], int]) -> None:
        """Check the limits that depend on the model: top_k by its vocabulary, and at most 32 tokens per stop string.

        `count_tokens` gives the number of tokens of a text, without BOS and EOS. Raises RequestError.
        """
        if self.top_k > n_vocab:
            raise _refused("top_k", self.top_k, f"an integer from 0 to {n_vocab}, the size of the vocabulary")
        for stop in self.stop:
            n_tokens = count_tokens(stop)
            if n_tokens > MAX_STOP_TOKENS:
                raise _refused("stop", stop, f"strings of up to {MAX_STOP_TOKENS} tokens; this one has {n_tokens}")


def choose_seed() -> int:
    """A random uint64 seed from the operating system, for a request without a seed."""
    return int.from_bytes(os.urandom(8), "little")


def sample(
    logits: NDArray[np.floating[Any]],
    params: SamplingParams,
    history: Sequence[int] | NDArray[np.integer[Any]],
    seed: int,
    index: int,
) -> int:
    """The id of the token sampled from `logits` (n_vocab,) with `params`.

    history: ids of the prompt and of the tokens generated so far; only the repetition penalty uses them.
    seed:    uint64; `params.seed`, or the one chosen for the request.
    index:   the number of the generated token, from 0.
    Raises the errors of `draw`, and RequestError for a seed or an index that is not a uint64.
    """
    return draw(logits, params, history, random_bits(seed, index))


def draw(
    logits: NDArray[np.floating[Any]],
    params: SamplingParams,
    history: Sequence[int] | NDArray[np.integer[Any]],
    bits: int,
) -> int:
    """Like `sample`, but with 64 given random bits. The GPU's sampling kernel is compared with this function.

    Raises RefengineError if a logit is NaN or +Inf, naming its index, or if all logits are -Inf (a single -Inf
    means that this token cannot be sampled); RequestError if an id of the history is not below n_vocab.
    """
    _check_logits(logits)
    penalised = _penalise(logits, history, params.repetition_penalty)  # (n_vocab,)
    if params.temperature == 0.0:
        return int(np.argmax(penalised))  # the first of equal maxima

    top_k_ids = _ranked(penalised, params.top_k) if 0 < params.top_k < penalised.size else None  # (n_candidates,)
    candidates = penalised if top_k_ids is None else penalised[top_k_ids]  # (n_candidates,)
    weights = _weights(candidates, params.temperature)  # (n_candidates,) i64
    ranking = _Ranking(candidates, weights)

    top_k_mass = int(weights.sum())
    top_p_mass = top_k_mass
    if params.top_p < 1.0:
        # float64 product, then ceil: one rounding, the same on a GPU.
        _, top_p_mass = ranking.first_reaching(math.ceil(params.top_p * top_k_mass))
    min_weight = math.ceil(params.min_p * WEIGHT_ONE)
    min_p_mass = int(weights[weights >= min_weight].sum()) if min_weight > 0 else top_k_mass
    kept_mass = min(top_p_mass, min_p_mass)

    position, _ = ranking.first_reaching((bits * kept_mass >> 64) + 1)
    return position if top_k_ids is None else int(top_k_ids[position])


def logprobs(logits: NDArray[np.floating[Any]], token_id: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """(log-probability of `token_id`, [(id, log-probability)] of the `n_top` most likely tokens, ties by id).

    logprob = logit - log(sum(exp(logits))), natural logarithm in float64, of `logits` (n_vocab,) as the
    model computed them: before temperature, penalty and filters. A -Inf logit has -Inf. `n_top` above n_vocab
    means all. Raises the errors of `draw` for invalid logits, RequestError for an id or a count out of range.
    """
    _check_logits(logits)
    _integer("token_id", token_id, 0, logits.size - 1)
    _integer("n_top", n_top, 0, None)
    shifted = logits.astype(np.float64) - np.float64(logits.max())  # (n_vocab,)
    log_softmax = shifted - np.log(np.exp(shifted).sum())  # (n_vocab,) f64
    if n_top == 0:
        return float(log_softmax[token_id]), []
    # Ranked by logit: two logits may differ and have the same rounded log-probability.
    top_ids = _ranked(logits, min(n_top, logits.size))  # (n_top,)
    return float(log_softmax[token_id]), [(int(i), float(log_softmax[i])) for i in top_ids]


class _Ranking:
    """Candidates ranked by logit, descending, ties by position, ascending; sorted only as far as a draw needs."""

    FIRST_SORTED = 256
    GROWTH = 16

    def __init__(self, candidates: NDArray[np.floating[Any]], weights: NDArray[np.int64]) -> None:
        self._candidates = candidates  # (n_candidates,)
        self._weights = weights  # (n_candidates,) i64
        self._sort(min(self.FIRST_SORTED, candidates.size))

    def _sort(self, n_sorted: int) -> None:
        self._positions = _ranked(self._candidates, n_sorted)  # (n_sorted,)
        self._masses = np.cumsum(self._weights[self._positions])  # (n_sorted,) i64

    def first_reaching(self, mass: int) -> tuple[int, int]:
        """(position, running sum of weights) of the first ranked candidate whose running sum is >= `mass`.

        `mass` is at most the sum of all weights.
        """
        while self._masses[-1] < mass and self._positions.size < self._candidates.size:
            self._sort(min(self.GROWTH * self._positions.size, self._candidates.size))
        rank = int(np.searchsorted(self._masses, mass, side="left"))
        return int(self._positions[rank]), int(self._masses[rank])


def _ranked(values: NDArray[np.floating[Any]], n_ranked: int) -> NDArray[np.intp]:
    """Positions of the `n_ranked` (>= 1) largest values, descending, equal ones by position, ascending."""
    # A partition orders equal values arbitrarily, so only its boundary value is used; positions come from comparisons.
    n_below = values.size - n_ranked
    boundary = np.partition(values, n_below)[n_below]
    above = np.flatnonzero(values > boundary)
    at_boundary = np.flatnonzero(values == boundary)[: n_ranked - above.size]
    positions = np.concatenate([above, at_boundary])
    return positions[np.argsort(-values[positions], kind="stable")]


def _weights(candidates: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.int64]:
    """round(2**40 * exp((logit - max) / temperature)), (n_candidates,) i64; the largest logit gets 2**40."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -Inf, weight 0
        exponents = (candidates.astype(np.float64) - np.float64(candidates.max())) / temperature
    weights: NDArray[np.int64] = np.rint(np.exp(exponents) * WEIGHT_ONE).astype(np.int64)
    return weights


def _penalise(
    logits: NDArray[np.floating[Any]], history: Sequence[int] | NDArray[np.integer[Any]], penalty: float
) -> NDArray[np.floating[Any]]:
    """Apply the repetition penalty: logits of tokens in the history are divided by it if positive, else multiplied.

    Applied once per token, however often it occurs, in float64; see Keskar et al., "CTRL" (2019), section 4.1, with
    the sign rule of llama.cpp and Hugging Face transformers.
    """
    if penalty == 1.0 or len(history) == 0:
        return logits
    ids = np.asarray(history)
    out_of_range = ids[(ids < 0) | (ids >= logits.size)]
    if out_of_range.size:
        raise RequestError(f"history: given token id {out_of_range[0]}, allowed 0 to {logits.size - 1}")
    penalised = logits.astype(np.float64)
    before = penalised[ids]  # (n_history,)
    with np.errstate(over="ignore"):
        # A tiny penalty can overflow. Keep the value finite, so that differences of logits are not NaN.
        divided = np.minimum(before / penalty, np.finfo(np.float64).max)
        penalised[ids] = np.where(before > 0, divided, before * penalty)
    return penalised


def _check_logits(logits: NDArray[np.floating[Any]]) -> None:
    if logits.ndim != 1 or logits.size == 0:
        raise RefengineError(f"logits: given shape {logits.shape}, expected (n_vocab,), one row of the model's output")
    largest = logits.max()  # NaN if any logit is NaN
    if np.isnan(largest):
        index = int(np.flatnonzero(np.isnan(logits))[0])
        raise RefengineError(f"logits[{index}] is NaN: the forward pass went wrong; trace the model to find where")
    if np.isposinf(largest):
        index = int(np.argmax(logits))
        raise RefengineError(f"logits[{index}] is +Inf: the forward pass overflowed; trace the model to find where")
    if np.isneginf(largest):
        raise RefengineError(f"all {logits.size} logits are -Inf: no token can be sampled")


def _number(name: str, value: object, low: float, high: float, above_low: bool = False) -> float:
    allowed = f"a number above {low:g}, up to {high:g}" if above_low else f"a number from {low:g} to {high:g}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise _refused(name, value, allowed)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        raise _refused(name, value, allowed) from None
    if not low <= number <= high or (above_low and number == low):  # also true for NaN
        raise _refused(name, value, allowed)
    return number


def _integer(name: str, value: object, low: int, high: int | None) -> int:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise _refused(name, value, allowed)
    integer = int(value)
    if integer < low or (high is not None and integer > high):
        raise _refused(name, value, allowed)
    return integer


def _count(name: str, value: object) -> int | None:
    return None if value is None else _integer(name, value, 0, MAX_LOGPROBS)


def _stops(value: object) -> tuple[str, ...]:
    allowed = f"a list of up to {MAX_STOPS} non-empty strings"
    if not isinstance(value, list | tuple) or len(value) > MAX_STOPS:
        raise _refused("stop", value, allowed)
    if any(not isinstance(stop, str) or not stop for stop in value):
        raise _refused("stop", value, allowed)
    return tuple(value)


def _refused(name: str, value: object, allowed: str) -> RequestError:
    try:
        shown = ascii(value)
    except ValueError:  # Python does not convert integers with thousands of digits to text
        shown = f"{type(value).__name__} with a huge integer"
    shortened = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return RequestError(f"{name}: given {shortened}, allowed {allowed}", name)
