"""The paged KV cache: accounting, reference counts, batches across block boundaries; and that where blocks lie, and who
else is in the batch, does not change the logits."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from refengine.api import load
from refengine.cache.paged import BlockPool, CacheSequence, KVCache, OutOfBlocks
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE
from tests.model_files import zeros_of
from tools.make_model import write_model

# float32 sums in another order: BLAS picks its blocking by the number of rows. 100 × 2^-24, rounded up.
SAME = 1e-5


class ShuffledPool(BlockPool):
    """Hands blocks out in a random order."""

    def __init__(self, n_blocks: int, seed: int) -> None:
        super().__init__(n_blocks)
        self._random = random.Random(seed)

    def allocate(self, n: int) -> list[int]:
        taken = super().allocate(self.n_free)  # all, then back what is not wanted
        self._random.shuffle(taken)
        for block in taken[n:]:
            self.release(block)
        return taken[:n]


def small_cache(n_blocks: int, block_size: int = 4) -> KVCache:
    return KVCache(zeros_of(np.float16), 2, 3, 5, n_ctx=64, n_blocks=n_blocks, block_size=block_size)


def test_lowest_free_block_comes_first() -> None:
    pool = BlockPool(7)
    assert pool.allocate(5) == [0, 1, 2, 3, 4]
    for block in (1, 4, 0):
        pool.release(block)
    assert pool.allocate(4) == [0, 1, 4, 5]  # not the last released
    assert pool.n_free == 1


def test_a_block_is_free_when_its_last_reference_goes() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.retain(block)
    assert pool.references(block) == 2
    pool.release(block)
    assert (pool.references(block), pool.n_free) == (1, 2)
    pool.release(block)
    assert (pool.references(block), pool.n_free) == (0, 3)


def test_free_blocks_cannot_be_released_or_retained() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    for misuse in (pool.release, pool.retain):
        with pytest.raises(AssertionError, match="block 1 is free"):
            misuse(1)
    assert pool.n_free == 1


def test_refused_allocation_takes_nothing() -> None:
    pool = BlockPool(5)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks, match="4 blocks needed, 3 of 5 free"):
        pool.allocate(4)
    assert pool.n_free == 3
    assert [pool.references(b) for b in range(5)] == [1, 1, 0, 0, 0]
    assert pool.allocate(3) == [2, 3, 4]


def test_pool_agrees_with_a_plain_count_over_random_operations() -> None:
    rng = random.Random(11)
    pool, counts = BlockPool(13), [0] * 13
    for _ in range(3000):
        used = [b for b, n in enumerate(counts) if n]
        action = rng.choice(("allocate", "retain", "release"))
        if action == "allocate":
            wanted = rng.randrange(6)
            free = [b for b, n in enumerate(counts) if not n]
            if wanted > len(free):
                with pytest.raises(OutOfBlocks):
                    pool.allocate(wanted)
            else:
                assert pool.allocate(wanted) == free[:wanted]
                for block in free[:wanted]:
                    counts[block] = 1
        elif used:
            block = rng.choice(used)
            getattr(pool, action)(block)
            counts[block] += 1 if action == "retain" else -1
        assert [pool.references(b) for b in range(13)] == counts
        assert pool.n_free == counts.count(0)


def test_arrays_and_their_size() -> None:
    cache = small_cache(n_blocks=6)
    assert [a.shape for a in (*cache.k, *cache.v)] == [(6, 4, 3, 5)] * 4
    assert cache.n_bytes == 2 * 2 * 6 * 4 * 3 * 5 * 2  # K and V, layers, blocks, positions, heads, elements, bytes
    assert not any(a.any() for a in (*cache.k, *cache.v))


@pytest.mark.parametrize(("n", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for(n: int, blocks: int) -> None:
    assert KVCache.blocks_for(n, 4) == blocks


def test_batch_of_several_sequences_across_block_boundaries() -> None:
    cache = small_cache(n_blocks=9)
    a, b, c = CacheSequence(), CacheSequence(), CacheSequence()
    first = [(a, [50, 51, 52]), (b, [60, 61, 62, 63, 64])]
    batch = cache.batch(first)
    assert batch.ids.tolist() == [50, 51, 52, 60, 61, 62, 63, 64]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # blocks 0; 1 and 2
    assert [(s.start, s.stop, s.n_kv, s.block_table.tolist()) for s in batch.spans] == [
        (0, 3, 3, [0]),
        (3, 8, 5, [1, 2]),
    ]
    assert batch.rows.tolist() == list(range(8))
    cache.commit(first)
    assert (a.length, b.length) == (3, 5)

    second = [(b, [65]), (c, [70]), (a, [53, 54])]  # in another order; `a` steps over a boundary
    batch = cache.batch(second, rows=[3, 0])
    assert batch.positions.tolist() == [5, 0, 3, 4]
    assert batch.slots.tolist() == [2 * 4 + 1, 3 * 4, 3, 4 * 4]
    assert [(s.start, s.stop, s.n_kv, s.block_table.tolist()) for s in batch.spans] == [
        (0, 1, 6, [1, 2]),
        (1, 2, 1, [3]),
        (2, 4, 5, [0, 4]),
    ]
    assert batch.rows.tolist() == [3, 0]
    for array in (batch.ids, batch.positions, batch.slots, batch.rows):
        assert array.dtype == np.int64
    cache.commit(second)
    assert cache.pool.n_free == 9 - 5


def test_exactly_full_blocks_need_no_further_one() -> None:
    cache = small_cache(n_blocks=2)
    sequence = CacheSequence()
    parts = [(sequence, list(range(8)))]
    assert cache.batch(parts).slots.tolist() == list(range(8))
    cache.commit(parts)
    assert (sequence.block_table, cache.pool.n_free) == ([0, 1], 0)
    with pytest.raises(OutOfBlocks):
        cache.batch([(sequence, [8])])


def test_batch_that_does_not_fit_changes_nothing() -> None:
    cache = small_cache(n_blocks=4)
    a, b = CacheSequence(), CacheSequence()
    parts = [(a, [1, 2, 3])]
    cache.batch(parts)
    cache.commit(parts)
    for array in (*cache.k, *cache.v):
        array[:] = 7
    # Each alone would fit: `a` needs one more block, `b` three.
    with pytest.raises(OutOfBlocks, match="4 blocks needed, 3 of 4 free"):
        cache.batch([(a, [4, 5]), (b, list(range(12)))])
    assert (a.block_table, a.length, b.block_table, b.length) == ([0], 3, [], 0)
    assert cache.pool.n_free == 3
    assert all((array == 7).all() for array in (*cache.k, *cache.v))
    assert cache.batch([(b, list(range(12)))]).spans[0].block_table.tolist() == [1, 2, 3]


def test_batch_that_was_not_committed_can_be_repeated() -> None:
    cache = small_cache(n_blocks=3)
    sequence = CacheSequence()
    abandoned = cache.batch([(sequence, [1, 2, 3, 4, 5])])  # a forward pass that failed
    repeated = cache.batch([(sequence, [1, 2, 3, 4, 5])])
    assert repeated.slots.tolist() == abandoned.slots.tolist()
    shorter = cache.batch([(sequence, [1])])
    assert shorter.spans[0].block_table.tolist() == [0]
    assert cache.pool.n_free == 1


def test_free_returns_the_blocks_once() -> None:
    cache = small_cache(n_blocks=3)
    sequence, other = CacheSequence(), CacheSequence()
    for s in (sequence, other):
        cache.batch([(s, [1])])
        cache.commit([(s, [1])])
    cache.free(sequence)
    cache.free(sequence)
    assert (sequence.block_table, sequence.length, cache.pool.n_free) == ([], 0, 2)
    assert cache.pool.references(1) == 1, "the other sequence keeps its block"


def test_shared_block_outlives_one_of_its_owners() -> None:
    cache = small_cache(n_blocks=3)
    owner = CacheSequence()
    cache.batch([(owner, [1, 2, 3, 4])])
    cache.commit([(owner, [1, 2, 3, 4])])
    cache.pool.retain(0)
    sharer = CacheSequence(block_table=[0], length=4)
    assert cache.batch([(sharer, [5])]).slots.tolist() == [4]
    cache.free(owner)
    assert (cache.pool.references(0), cache.pool.n_free) == (1, 1)
    cache.free(sharer)
    assert cache.pool.n_free == 3


# ---- with a model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Two layers, so that a wrong row read in the first one reaches the second's keys."""
    folder = tmp_path_factory.mktemp("kv")
    for arch in BY_ARCHITECTURE:
        write_model(folder / f"{arch}.gguf", arch, "F32", n_layer=2)
    return {arch: load(folder / f"{arch}.gguf") for arch in BY_ARCHITECTURE}


def cache_for(model: Model, n_blocks: int, shuffle_seed: int | None = None) -> KVCache:
    """Blocks of 5 positions, so that even short prompts take several."""
    cfg = model.config
    cache = KVCache(
        zeros_of(np.float32), cfg.n_layer, cfg.n_head_kv, cfg.head_dim, n_ctx=64, n_blocks=n_blocks, block_size=5
    )
    if shuffle_seed is not None:
        cache.pool = ShuffledPool(n_blocks, shuffle_seed)
    return cache


def prompt(n: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 300, size=n)]


def feed(model: Model, cache: KVCache, parts: list[tuple[CacheSequence, Sequence[int]]]) -> np.ndarray:
    return np.array(model.step(parts, cache))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
def test_shuffled_blocks_give_the_same_logits(models: dict[str, Model], arch: str) -> None:
    model = models[arch]
    ids = prompt(23, seed=1)
    plain_cache, shuffled_cache, plain, shuffled = (
        cache_for(model, 9),
        cache_for(model, 9, 2),
        CacheSequence(),
        CacheSequence(),
    )
    for start, stop in ((0, 17), (17, 23)):
        expected = feed(model, plain_cache, [(plain, ids[start:stop])])
        found = feed(model, shuffled_cache, [(shuffled, ids[start:stop])])
        np.testing.assert_array_equal(found, expected)  # the same numbers gathered from elsewhere: the same bits
    assert plain.block_table == [0, 1, 2, 3, 4]
    assert sorted(shuffled.block_table) != shuffled.block_table, "the control below needs a shuffled table"

    # Control: one wrong entry is seen. (Not two entries exchanged: keys carry their positions, and a sum over the past
    # has no order.)
    shuffled.block_table[1] = (set(range(9)) - set(shuffled.block_table)).pop()
    right = feed(model, plain_cache, [(plain, [7])])
    wrong = feed(model, shuffled_cache, [(shuffled, [7])])
    assert difference(wrong, right) > 100 * SAME


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
def test_sequences_in_one_batch_equal_each_alone(models: dict[str, Model], arch: str) -> None:
    model = models[arch]
    pieces = {"a": (prompt(7, 3), prompt(1, 4)), "b": (prompt(12, 5), prompt(3, 6))}
    alone = {}
    for name, (first, second) in pieces.items():
        sequence, cache = CacheSequence(), cache_for(model, 4)
        alone[name] = (feed(model, cache, [(sequence, first)]), feed(model, cache, [(sequence, second)]))

    cache, a, b = cache_for(model, 8, shuffle_seed=7), CacheSequence(), CacheSequence()
    together = feed(model, cache, [(a, pieces["a"][0]), (b, pieces["b"][0])])
    assert difference(together[:7], alone["a"][0]) <= SAME
    assert difference(together[7:], alone["b"][0]) <= SAME
    later = feed(model, cache, [(b, pieces["b"][1]), (a, pieces["a"][1])])
    assert difference(later[:3], alone["b"][1]) <= SAME
    assert difference(later[3:], alone["a"][1]) <= SAME

    # Control: with the other one's history the same token has other logits.
    a.block_table, b.block_table, a.length, b.length = b.block_table, a.block_table, b.length, a.length
    swapped = feed(model, cache, [(a, pieces["a"][1])])
    assert difference(swapped, alone["a"][1]) > 100 * SAME


def test_rows_select_the_logits(models: dict[str, Model]) -> None:
    model = models["llama"]
    ids = prompt(11, seed=8)
    every = feed(model, cache_for(model, 3), [(CacheSequence(), ids)])
    some = np.array(model.step([(CacheSequence(), ids)], cache_for(model, 3), rows=[10, 2]))
    assert difference(some, every[[10, 2]]) <= SAME
