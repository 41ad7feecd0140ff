"""Measures the distance between two tensors, or between two sets of logits.

`value` is the tensor under test, `reference` the correct one. Everything is computed in float64. If exactly one of the
two is NaN or infinite at a coordinate, or they are infinite with different signs, the coordinate is a mismatch: it is
counted, and excluded from the other metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOP_K = 10


@dataclass(frozen=True)
class TensorMetrics:
    """The distance of a tensor from its reference; see `compare` for the definitions."""

    size: int
    nmse: float
    cosine: float
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    worst: tuple[int, ...]
    worst_value: float
    worst_reference: float
    ulp_median: float
    ulp_p99: float
    ulp_max: float
    nonfinite_mismatches: int

    @property
    def finite(self) -> bool:
        """Whether there is no mismatch, that is, no coordinate with NaN or infinity in only one of the two."""
        return self.nonfinite_mismatches == 0


def compare(value: np.ndarray, reference: np.ndarray) -> TensorMetrics:
    """Compare two tensors with the same shape.

    nmse:     mean((value - reference)²) / mean(reference²): the mean-square definition.
    cosine:   ⟨value, reference⟩ / (‖value‖ ‖reference‖); 1 for two zero tensors.
    *_abs:    of |value - reference|.      *_rel: of |value - reference| / |reference|, where the reference is not 0.
    worst:    the coordinate of max_abs, or of the first mismatch; worst_value and worst_reference are the values there.
    ulp_*:    the number of float32 steps between the two, after rounding both to float32.
    Raises ValueError for different shapes or empty tensors.
    """
    if value.shape != reference.shape:
        raise ValueError(f"shapes differ: {value.shape} and {reference.shape}")
    if value.size == 0:
        raise ValueError("nothing to compare: the tensors are empty")
    a, b = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    # Equal infinities and two NaNs agree, and have no distance.
    both_odd = (np.isnan(a) & np.isnan(b)) | (np.isinf(a) & (a == b))
    mismatch = ~both_odd & ~(np.isfinite(a) & np.isfinite(b))
    n_mismatch = int(mismatch.sum())
    usable = ~(both_odd | mismatch)
    x, y = a[usable], b[usable]
    if x.size == 0:
        worst = int(np.argmax(mismatch))
        figures = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
        ulps = (0.0, 0.0, 0.0)
    else:
        error = np.abs(x - y)
        nonzero = y != 0
        relative = error[nonzero] / np.abs(y[nonzero])
        worst = int(np.argmax(mismatch)) if n_mismatch else int(np.flatnonzero(usable)[np.argmax(error)])
        figures = (
            _nmse(error, y),
            _cosine(x, y),
            float(error.max()),
            float(error.mean()),
            float(relative.max(initial=0.0)),
            float(relative.mean()) if relative.size else 0.0,
        )
        distance = ulp_distance(x, y)
        median, p99 = np.percentile(distance, (50, 99))
        ulps = (float(median), float(p99), float(distance.max()))
    return TensorMetrics(
        value.size, *figures,
        worst=tuple(int(i) for i in np.unravel_index(worst, value.shape)),
        worst_value=float(a[worst]),
        worst_reference=float(b[worst]),
        ulp_median=ulps[0],
        ulp_p99=ulps[1],
        ulp_max=ulps[2],
        nonfinite_mismatches=n_mismatch,
    )  # fmt: skip


def nmse(value: np.ndarray, reference: np.ndarray) -> float:
    """Normalised mean square error: mean((value - reference)²) / mean(reference²), in float64."""
    wide = reference.astype(np.float64)
    power = float(np.mean(np.square(wide)))
    error = float(np.mean(np.square(value.astype(np.float64) - wide)))
    return error / power if power else (0.0 if error == 0.0 else float("inf"))


def _nmse(error: np.ndarray, reference: np.ndarray) -> float:
    # Scaled, so that the squares of very large values do not overflow.
    scale = float(np.abs(reference).max())
    if scale == 0.0:
        return math.inf if error.any() else 0.0
    return float(np.mean(np.square(error / scale)) / np.mean(np.square(reference / scale)))


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    norm_x, norm_y = (float(np.abs(v).max()) for v in (x, y))
    if norm_x == 0.0 or norm_y == 0.0:
        return 1.0 if norm_x == norm_y else 0.0
    x, y = x / norm_x, y / norm_y
    return float(np.dot(x, y) / math.sqrt(float(np.dot(x, x)) * float(np.dot(y, y))))


def ulp_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The number of float32 steps between each pair, (n,) int64; +0 and -0 are equal. Only for finite numbers."""
    with np.errstate(over="ignore"):
        distance: np.ndarray = np.abs(_ordered(x.astype(np.float32)) - _ordered(y.astype(np.float32)))
    return distance


def _ordered(x: np.ndarray) -> np.ndarray:
    """float32 → integers in the same order, whose neighbours differ by 1."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@dataclass(frozen=True)
class Flip:
    """A position at which the most likely token differs.

    margin: the reference's logit of its own token minus its logit of `token`. bound: how far rounding may change logits
    at this position. A tie is a flip that rounding explains: margin ≤ 2 · bound.
    """

    position: int
    token: int
    reference_token: int
    margin: float
    bound: float

    @property
    def is_tie(self) -> bool:
        return self.margin <= 2 * self.bound


@dataclass(frozen=True)
class LogitMetrics:
    """The distance of logits from their reference over the positions of a prompt; see `compare_logits`."""

    kl: tuple[float, ...]
    top1_agreement: float
    topk_overlap: float
    delta_p_max: float
    delta_p_rms: float
    perplexity_ratio: float | None
    flips: tuple[Flip, ...]
    first_position: int = 0

    @property
    def kl_mean(self) -> float:
        return float(np.mean(self.kl))

    @property
    def kl_p99(self) -> float:
        return float(np.percentile(self.kl, 99))

    @property
    def kl_max(self) -> float:
        return max(self.kl)


def compare_logits(
    value: np.ndarray,
    reference: np.ndarray,
    ids: Sequence[int] = (),
    bounds: np.ndarray | None = None,
    first_position: int = 0,
) -> LogitMetrics:
    """Compare logits (n, n_vocab) of the n positions of a prompt with token ids `ids`.

    kl:               KL(reference ‖ value) of every position, in nats.
    top1_agreement:   share of positions with the same likeliest token (ties to the lower id).
    topk_overlap:     mean share of the TOP_K likeliest tokens in common.
    delta_p_*:        of p_value - p_reference of the token that follows (of the reference's likeliest where none does).
    perplexity_ratio: of value's to reference's over the prompt; None for fewer than two ids.
    flips:            positions with another likeliest token. bounds (n,): how far the logits of each position may be
                      off by rounding; by default nothing is excused.
    first_position:   of the first row, where a prompt's earlier positions are left out.
    Raises ValueError for unlike shapes, or ids that are not one a row.
    """
    if value.shape != reference.shape or value.ndim != 2 or value.size == 0:
        raise ValueError(f"logits must be two equal (n, n_vocab), found {value.shape} and {reference.shape}")
    if len(ids) not in (0, len(value)):
        raise ValueError(f"{len(ids)} ids for {len(value)} positions")
    log_q, log_p = log_softmax(value), log_softmax(reference)
    p = np.exp(log_p)
    # p · (log p - log q) → 0 for p → 0, also where log p is -inf.
    terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0.0) - log_q), 0.0)
    kl = np.maximum(terms.sum(axis=1), 0.0)
    ours, theirs = value.argmax(axis=1), reference.argmax(axis=1)
    rows = np.arange(len(value))
    following = np.append(np.asarray(ids[1:], dtype=np.int64), theirs[-1:]) if len(ids) else theirs
    delta = np.exp(log_q[rows, following]) - np.exp(log_p[rows, following])
    ratio = None
    if len(ids) > 1:
        ratio = float(np.exp(np.mean(log_p[rows[:-1], following[:-1]] - log_q[rows[:-1], following[:-1]])))
    allowed = np.zeros(len(value)) if bounds is None else bounds
    flips = tuple(
        Flip(
            position=first_position + int(i),
            token=int(ours[i]),
            reference_token=int(theirs[i]),
            margin=float(reference[i, theirs[i]]) - float(reference[i, ours[i]]),
            bound=float(allowed[i]),
        )
        for i in np.flatnonzero(ours != theirs)
    )
    k = min(TOP_K, value.shape[1])
    shared = [len(np.intersect1d(a, b)) / k for a, b in zip(_top(value, k), _top(reference, k), strict=True)]
    return LogitMetrics(
        kl=tuple(float(v) for v in kl),
        top1_agreement=float(np.mean(ours == theirs)),
        topk_overlap=float(np.mean(shared)),
        delta_p_max=float(np.abs(delta).max()),
        delta_p_rms=float(np.sqrt(np.mean(np.square(delta)))),
        perplexity_ratio=ratio,
        flips=flips,
        first_position=first_position,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-probabilities of every row, in nats, float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    log_probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probabilities


def _top(logits: np.ndarray, k: int) -> np.ndarray:
    """The k most likely ids of every row, (n, k); of equal logits the lower id is first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]
