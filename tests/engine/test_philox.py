"""Philox4x32-10 against its authors' vectors, the layout of seed and index, and the uniform numbers."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.engine.philox import MASK_32, MAX_UINT64, philox4x32_10, random_bits, uniform
from refengine.errors import RequestError

Words = tuple[int, int, int, int]

# (counter, key, output) of philox4x32 with 10 rounds, from Random123's tests/kat_vectors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK_32,) * 4, (MASK_32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

examples = settings(max_examples=100, deadline=None)  # no deadline: a busy machine is no failure

uint64s = st.integers(0, MAX_UINT64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: Words, key: tuple[int, int], expected: Words) -> None:
    assert philox4x32_10(counter, key) == expected


def test_philox_gives_the_published_words_on_arrays() -> None:
    counters = np.array([counter for counter, _, _ in KNOWN_ANSWERS], np.uint64).T  # (4, 3)
    keys = np.array([key for _, key, _ in KNOWN_ANSWERS], np.uint64).T  # (2, 3)
    expected = np.array([out for _, _, out in KNOWN_ANSWERS], np.uint64).T  # (4, 3)
    np.testing.assert_array_equal(np.stack(philox4x32_10(tuple(counters), tuple(keys))), expected)


@examples
@given(seed=uint64s, index=uint64s)
def test_random_bits_use_every_bit_of_seed_and_index(seed: int, index: int) -> None:
    out = philox4x32_10((index & MASK_32, index >> 32, 0, 0), (seed & MASK_32, seed >> 32))
    assert random_bits(seed, index) == out[0] + 2**32 * out[1]


def test_random_bits_are_pinned() -> None:
    # A change of layout would change every seeded answer: these values may never change.
    assert random_bits(0, 0) == 0xE169C58D6627E8D5
    assert len({random_bits(seed, index) for seed in (0, 1, 2**32, 2**63) for index in (0, 1, 2**32, 2**63)}) == 16


@examples
@given(seed=uint64s, indexes=st.lists(uint64s, min_size=1, max_size=5))
def test_arrays_and_ints_agree(seed: int, indexes: list[int]) -> None:
    index_array = np.array(indexes, np.uint64)
    bits = random_bits(seed, index_array)
    assert bits.dtype == np.uint64
    assert bits.tolist() == [random_bits(seed, index) for index in indexes]
    assert uniform(seed, index_array).tolist() == [uniform(seed, index) for index in indexes]


def test_seeds_broadcast_over_indexes() -> None:
    seeds = np.array([[3], [2**40]], np.uint64)
    bits = random_bits(seeds, np.array([0, 1, 7], np.uint64))
    assert bits.shape == (2, 3)
    assert int(bits[1, 2]) == random_bits(2**40, 7)


@examples
@given(seed=uint64s, index=uint64s)
def test_uniform_is_the_top_24_bits_exact_in_float32(seed: int, index: int) -> None:
    u = uniform(seed, index)
    assert 0.0 <= u < 1.0
    assert float(np.float32(u)) == u
    assert int(u * 2**24) == random_bits(seed, index) >> 40


def test_uniform_is_flat() -> None:
    n_draws, n_bins = 100_000, 64
    u = uniform(12345, np.arange(n_draws, dtype=np.uint64))
    assert u.dtype == np.float32
    counts = np.bincount((u * n_bins).astype(int), minlength=n_bins)
    expected = n_draws / n_bins
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 63 degrees of freedom: 0.1 % quantiles on both sides (a counter or a lattice would be too even).
    assert 34.6 < chi_square < 103.4


@pytest.mark.parametrize("bad", [-1, 2**64, 1.0, True, None])
def test_random_bits_refuse_what_is_no_uint64(bad: Any) -> None:
    with pytest.raises(RequestError, match="seed: given"):
        random_bits(bad, 0)
    with pytest.raises(RequestError, match="index: given"):
        random_bits(0, bad)


def test_random_bits_refuse_signed_arrays() -> None:
    with pytest.raises(RequestError, match="index: given an array of int64"):
        random_bits(0, np.arange(3))  # type: ignore[arg-type]
