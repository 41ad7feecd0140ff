"""Philox4x32-10: a counter-based random generator, a pure function of (seed, token index).

The generator has no state, so the batch, the chunking or a restart cannot change its result. The generator
is that of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011);
`tests/engine/test_philox.py` holds the known-answer vectors its authors publish with Random123.

How refengine uses it:

    key     = (seed low 32, seed high 32)
    counter = (index low 32, index high 32, 0, 0)
    bits    = out[0] + out[1] * 2**32                  the uniform number is u = bits / 2**64, in [0, 1)

Everything here is integer arithmetic modulo 2**32, so the CUDA version (`__umulhi` and `*` on unsigned
words) gives the same bits. Functions take Python ints, or NumPy uint64 arrays of broadcastable shapes.
"""

from collections.abc import Sequence
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from refengine.errors import RequestError

Words = int | NDArray[np.integer[Any]]
"""A word of 32 bits (seeds and indexes: 64 bits): a Python int, or a uint64 array of any shape."""

N_ROUNDS = 10
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
"""Added to key word 0 after each round: the golden ratio's fraction, times 2**32."""
WEYL_1 = 0xBB67AE85
"""Added to key word 1 after each round: the fraction of the square root of 3, times 2**32."""
MASK_32 = 0xFFFFFFFF
MAX_UINT64 = 2**64 - 1


def philox4x32_10(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Four random 32-bit words from a counter of four words and a key of two, in ten rounds.

    One round, with the 64-bit products p0 = M0 * c0 and p1 = M1 * c2:
    (hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0)), then k += (W0, W1).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i_round in range(N_ROUNDS):
        round_k0 = (k0 + i_round * WEYL_0) & MASK_32
        round_k1 = (k1 + i_round * WEYL_1) & MASK_32
        p0 = MULTIPLIER_0 * c0  # below 2**64: no bit is lost in uint64
        p1 = MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ round_k0,
            p1 & MASK_32,
            (p0 >> 32) ^ c3 ^ round_k1,
            p0 & MASK_32,
        )
    return c0, c1, c2, c3


@overload
def random_bits(seed: int, index: int) -> int: ...
@overload
def random_bits(seed: Words, index: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def random_bits(seed: Words, index: Words) -> Words:
    """The 64 random bits of token `index` under `seed`; u = bits / 2**64 is uniform in [0, 1).

    Ints give an int. uint64 arrays give a uint64 array of the broadcast shape. Raises RequestError
    for an int outside 0..2**64-1 and for an array of another dtype.
    """
    for name, words in (("seed", seed), ("index", index)):
        _require_uint64(name, words)
    counter = (index & MASK_32, index >> 32, 0, 0)
    key = (seed & MASK_32, seed >> 32)
    out0, out1, _, _ = philox4x32_10(counter, key)
    return out0 | (out1 << 32)


@overload
def uniform(seed: int, index: int) -> float: ...
@overload
def uniform(seed: Words, index: NDArray[np.uint64]) -> NDArray[np.float32]: ...
def uniform(seed: Words, index: Words) -> float | NDArray[np.float32]:
    """floor(u * 2**24) / 2**24 in [0, 1): the top 24 bits of `random_bits`, exact in float32.

    An int index gives a float, an array a float32 array. On a device: `(out[1] >> 8) * 0x1p-24f`.
    """
    bits = random_bits(cast(int, seed), cast(int, index))
    top_24 = bits >> 40
    if isinstance(top_24, np.ndarray):
        return top_24.astype(np.float32) * np.float32(2**-24)
    return top_24 * 2**-24


def _require_uint64(name: str, words: Words) -> None:
    if isinstance(words, np.ndarray):
        if words.dtype != np.uint64:
            raise RequestError(f"{name}: given an array of {words.dtype}, allowed uint64")
    elif isinstance(words, bool) or not isinstance(words, int) or not 0 <= words <= MAX_UINT64:
        raise RequestError(f"{name}: given {words!r}, allowed an integer from 0 to {MAX_UINT64}")
