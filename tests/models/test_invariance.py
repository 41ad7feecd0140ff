"""What must not change the logits: how the prompt is cut, and how much of the weights is cached."""

import numpy as np
import pytest

import refengine
from tests.model_files import ModelFiles
from tools.make_model import TINY


@pytest.mark.parametrize("name", [n for n in TINY if n.endswith(("-f32", "-q4_k_m", "_moe"))])
def test_chunks_give_the_same_logits(tiny_model: ModelFiles, name: str) -> None:
    """Whole, seven at a time, one at a time: float32 sums of other matrix shapes, 1e-7 relative each."""
    model = refengine.load(tiny_model(name))
    ids = np.random.default_rng(3).integers(0, model.config.n_vocab, 48).tolist()
    whole = model.forward(ids)
    for chunk in (7, 1):
        assert np.abs(model.forward(ids, chunk=chunk) - whole).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["llama-q4_k", "gpt-oss-mxfp4_moe", "qwen2-q5_1"])
@pytest.mark.parametrize("numerics", ["exact", "llamacpp"])
def test_weights_outside_the_cache_give_the_same_logits(tiny_model: ModelFiles, name: str, numerics: str) -> None:
    """With no room for dequantised weights they are dequantised in slices at every use."""
    cached = refengine.load(tiny_model(name), numerics=numerics)
    uncached = refengine.load(tiny_model(name), numerics=numerics, cpu_cache_mb=0)
    ids = list(range(3, 20))
    expected = cached.forward(ids)
    assert np.abs(uncached.forward(ids) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert len(uncached.ops.cache) == 0
    assert len(cached.ops.cache) > 0
