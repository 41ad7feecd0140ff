"""A pass over prompts with `decode()` is the model file bit for bit: the logits and what is in the cache."""

from collections.abc import Sequence

import numpy as np
import pytest

from refengine.cache.paged import CacheSequence
from refengine.cuda.decode.prompt import MOST_PROGRAMS, PromptOps, PromptPass, bucket_of
from refengine.cuda.decode.step import DecodeStep
from refengine.errors import KernelError
from refengine.model import Model
from refengine.trace import to_numpy
from tests.kernels.test_decode import DAILY, MORE, WITH_DECODE
from tests.kernels.test_models import cuts, ids_for, loaded
from tests.levels import ci_only, mostly_in_ci
from tests.model_files import ModelFiles

N_TOKENS = 70


class Prompts:
    """Sequences that are fed to two caches: to one by the pass, to the other by the model file."""

    def __init__(self, model: Model, n_sequences: int = 1, shuffle: int | None = None, prepared: bool = True) -> None:
        self.model = model
        self.caches = [model.new_cache(N_TOKENS, n_sequences + 1) for _ in range(2)]
        for cache in self.caches if shuffle is not None else []:
            take = iter(np.random.default_rng(shuffle).permutation(cache.pool.n_blocks).tolist())
            cache.pool.allocate = lambda n, take=take: [next(take) for _ in range(n)]  # type: ignore[method-assign,misc]
        assert model.decode is not None
        given = (model.ops, model.config, model.decode, model.weights, self.caches[0])
        step = DecodeStep(*given, max_batch=1)
        self.prompts = PromptPass(*given, step.n_positions, step.angles, prepared=prepared)
        self.sequences = [(CacheSequence(), CacheSequence()) for _ in range(n_sequences)]

    def feed(self, ids: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> np.ndarray:
        """Feed ids to each sequence. Returns the logits, which are the same both ways."""
        parts, expected = ([(pair[i], new) for pair, new in zip(self.sequences, ids, strict=True)] for i in range(2))
        logits = to_numpy(self.prompts.run(self.caches[0].batch(parts, rows)))
        self.caches[0].commit(parts)
        np.testing.assert_array_equal(logits, to_numpy(self.model.step(expected, self.caches[1], rows)))
        for ours, theirs in zip(*([*cache.k, *cache.v] for cache in self.caches), strict=True):
            np.testing.assert_array_equal(
                to_numpy(ours.values).view(np.uint16), to_numpy(theirs.values).view(np.uint16)
            )
            np.testing.assert_array_equal(to_numpy(ours.exponents), to_numpy(theirs.exponents))
        return logits


@pytest.fixture(scope="module", params=mostly_in_ci(WITH_DECODE))
def model(request: pytest.FixtureRequest, place: str, tiny_model: ModelFiles) -> Model:
    return loaded(tiny_model(request.param), place)


@pytest.mark.parametrize("size", [N_TOKENS, 1, 9, "random"])
def test_a_prompt_at_once_and_in_chunks(size: int | str, model: Model) -> None:
    prompts, ids = Prompts(model), ids_for(model, N_TOKENS)
    for part in cuts(N_TOKENS, np.random.default_rng(2) if isinstance(size, str) else size):
        prompts.feed([ids[part]])


@pytest.mark.parametrize("n", [2, 5])
def test_prompts_of_several_sequences_in_shuffled_blocks(n: int, model: Model) -> None:
    prompts = Prompts(model, n, shuffle=n)
    rng = np.random.default_rng(n)
    for turn in range(2):
        lengths = rng.integers(1, 30, n).tolist()
        prompts.feed([ids_for(model, length, seed=10 * turn + i) for i, length in enumerate(lengths)])


@pytest.mark.parametrize("rows", [[], [11], [3, 4, 5], [0, 7, 2]])
def test_only_the_wanted_rows_have_logits(rows: list[int], model: Model) -> None:
    prompts = Prompts(model, prepared=len(rows) != 1)
    assert prompts.feed([ids_for(model, 12)], rows).shape == (len(rows), model.config.n_vocab)


@pytest.mark.parametrize("name", ci_only(MORE, set(MORE) - set(DAILY)))
def test_other_mixtures(name: str, place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model(name), place)
    prompts = Prompts(model, 2)
    prompts.feed([ids_for(model, 40, seed=1), ids_for(model, 3, seed=2)])
    prompts.feed([ids_for(model, 2, seed=3), ids_for(model, 9, seed=4)])


@pytest.mark.parametrize("size", [8, 64])
def test_experts_in_groups_of_two_sizes(
    size: int, place: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a file whose experts have matrices of several types. Those of few rows come from the router."""
    monkeypatch.setattr(PromptOps, "_group_size", lambda _, product: size if "down" in product.w.name else 72 - size)
    model = loaded(tiny_model("gpt-oss-mxfp4_moe"), place)
    Prompts(model).feed([ids_for(model, 20)])


def test_what_would_be_out_of_bounds_is_refused(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("llama-q4_0"), place)
    prompts = Prompts(model)
    with pytest.raises(KernelError, match=rf"prompt: ids 0 to {model.config.n_vocab}, allowed 0 to"):
        prompts.feed([[0, model.config.n_vocab]])
    with pytest.raises(KernelError, match="prompt: rows 2 to 2, allowed 0 to 1"):
        prompts.feed([[0, 1]], [2])


def test_rows_are_rounded_up_by_an_eighth_at_most() -> None:
    assert [bucket_of(n) for n in (1, 8, 9, 33, 64, 65, 512, 1000, 1025, 2048)] == [
        *(8, 8, 16, 64, 64, 128, 512, 1024, 1152, 2048)
    ]
    for n in range(512, 20000, 7):
        assert n <= bucket_of(n) <= n * 9 // 8
    assert len({bucket_of(n) for n in range(1, 4097)}) < MOST_PROGRAMS


def test_no_memory_is_allocated_after_the_preparation(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("llama-q4_0"), place)
    prompts = Prompts(model, 1)
    prompts.prompts.prepare(N_TOKENS, 4)
    before = model.ops.memory.accounted()["workspace"]
    for n in (3, 40, 3, 24):
        prompts.feed([ids_for(model, n)], [n - 1])
        if place == "host":  # on a GPU, the model file takes memory from the pool
            assert model.ops.memory.accounted()["workspace"] == before
