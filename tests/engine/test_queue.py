"""The engine's queue: who is served when, and what a request is told of its place; on NumPy."""

import pytest

from tests.engine.models import SmallBlocks, one_layer
from tests.engine.test_engine import BLOCK, engine_with, greedy, prompt, run_all


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallBlocks:
    return SmallBlocks(one_layer(tmp_path_factory.mktemp("queue"), "cpu"), BLOCK)


def test_service_is_first_come_first_served(model: SmallBlocks) -> None:
    engine = engine_with(model, max_batch=2)
    order: list[int] = []
    started = [engine.start(prompt(3, i), greedy(3)) for i in range(6)]
    while not engine.idle:
        for g in engine.step():
            if g.n_generated == 1:
                order.append(started.index(g))
    assert order == list(range(6))


def test_a_large_request_is_not_overtaken(model: SmallBlocks) -> None:
    """The second needs more blocks than are free: the third, which would fit, waits behind it."""
    engine = engine_with(model, cache_tokens=40, prefix_cache=False)
    first, second, third = (engine.start(prompt(n, n), greedy(4)) for n in (24, 30, 3))
    engine.step()
    engine.step()
    assert engine.scheduler.running == [first]
    assert list(engine.scheduler.waiting) == [second, third]
    run_all(engine)
    assert {g.end for g in (first, second, third)} == {"length"}


def test_queue_positions_are_those_of_the_next_step(model: SmallBlocks) -> None:
    engine = engine_with(model, max_batch=2)
    given = [engine.start(prompt(9, i), greedy(8)) for i in range(4)]
    assert [engine.queue_position(g) for g in given] == [0, 0, 1, 2]
    engine.step()
    assert [engine.queue_position(g) for g in given] == [0, 0, 1, 2]
    engine.free(given[0])
    assert [engine.queue_position(g) for g in given] == [0, 0, 0, 1]


def test_who_waits_for_blocks_is_in_the_queue_too(model: SmallBlocks) -> None:
    engine = engine_with(model, max_batch=4, cache_tokens=4 * BLOCK, prefix_cache=False)
    long, short = 3 * BLOCK - 1, BLOCK + 1  # of four blocks they take three and two
    first, second, third = (engine.start(prompt(n), greedy(1)) for n in (long, short, 1))
    assert [engine.queue_position(g) for g in (first, second, third)] == [0, 1, 2]  # none goes past another
    while engine.queue_position(second):
        engine.step()
    assert first.end == "length"
