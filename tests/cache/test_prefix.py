"""The prefix cache: what is found, what is verified, who goes first."""

import pytest

from refengine.cache.paged import BlockPool, OutOfBlocks
from refengine.cache.prefix import PrefixCache

SIZE = 4


def ids(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(6)


@pytest.fixture
def prefix(pool: BlockPool) -> PrefixCache:
    return PrefixCache(pool, SIZE, "a model")


def keep(prefix: PrefixCache, pool: BlockPool, text: list[int]) -> list[int]:
    """Blocks of a sequence that ran and ended."""
    blocks = pool.allocate(-(-len(text) // SIZE))
    prefix.register(text, blocks, [])
    for block in blocks:
        pool.release(block)
    return blocks


def test_only_full_blocks_are_kept_and_one_id_is_always_left_to_compute(prefix: PrefixCache, pool: BlockPool) -> None:
    blocks = keep(prefix, pool, ids(10))
    assert (len(prefix), pool.n_free) == (2, 4)
    assert prefix.match(ids(10)) == blocks[:2]
    assert prefix.match(ids(8)) == blocks[:1]  # the logits after the eighth are wanted
    assert prefix.match(ids(4)) == []
    assert [pool.references(block) for block in blocks[:2]] == [3, 2]
    stats = prefix.stats
    assert (stats.hits, stats.misses, stats.tokens_reused) == (3, 0, 12)


def test_a_block_belongs_to_all_that_is_before_it(prefix: PrefixCache, pool: BlockPool) -> None:
    keep(prefix, pool, [*ids(4), *ids(4, 100)])
    assert prefix.match([*ids(4, 50), *ids(4, 100), 1]) == []
    assert len(prefix.match([*ids(4), *ids(4, 200), 1])) == 1
    assert (prefix.stats.hits, prefix.stats.misses) == (1, 3)


def test_a_hash_is_not_believed(prefix: PrefixCache, pool: BlockPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "_key", staticmethod(lambda parent, ids: b"all alike"))
    keep(prefix, pool, ids(4))
    assert prefix.match(ids(5, 1)) == []
    assert len(prefix.match(ids(5))) == 1


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end(prefix: PrefixCache, pool: BlockPool) -> None:
    old, new = keep(prefix, pool, ids(8)), keep(prefix, pool, ids(8, 100))
    for block in prefix.match(ids(9)):
        pool.release(block)  # used once more: now the second text is the older
    assert pool.n_free == 2
    assert set(pool.allocate(3)) & set(new) == {new[1]}
    assert set(pool.allocate(1)) == {new[0]}
    assert pool.allocate(1) == [old[1]]
    assert prefix.stats.evictions == 3


def test_blocks_in_use_are_not_given_away(prefix: PrefixCache, pool: BlockPool) -> None:
    keep(prefix, pool, ids(8))
    used = prefix.match(ids(9))
    assert pool.can_allocate(4)
    assert not pool.can_allocate(5)
    with pytest.raises(OutOfBlocks, match="5 blocks needed, 4 of 6 free"):
        pool.allocate(5)
    for block in used:
        pool.release(block)
    assert pool.can_allocate(6)


def test_what_came_to_nothing_is_taken_back(prefix: PrefixCache, pool: BlockPool) -> None:
    keep(prefix, pool, ids(8))
    text = ids(13)
    found = prefix.match(text)
    prefix.unmatch(found, len(text))
    assert prefix.stats == type(prefix.stats)()
    assert pool.n_reclaimable == 2
    prefix.clear()
    assert (len(prefix), pool.n_free) == (0, 6)


def test_the_first_of_two_alike_stays(prefix: PrefixCache, pool: BlockPool) -> None:
    first = keep(prefix, pool, ids(4))
    keep(prefix, pool, ids(4))
    assert len(prefix) == 1
    assert prefix.match(ids(5)) == first
