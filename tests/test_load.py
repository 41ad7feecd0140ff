"""`refengine.load` on the CPU: the weights are dequantised at load, within the cache's bytes, and with progress."""

import re

import numpy as np
import pytest

import refengine
from refengine.ops import dequant
from tests.cli_runner import cli
from tests.model_files import ModelFiles


@pytest.mark.parametrize("numerics", ["exact", "exact64", "llamacpp"])
@pytest.mark.parametrize("name", ["qwen2-q5_0", "gpt-oss-mxfp4"])
def test_nothing_is_dequantised_after_load(
    name: str, numerics: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    path = tiny_model(name)
    model = refengine.load(path, numerics=numerics, progress=lambda *step: steps.append(step))
    uncached = refengine.load(path, numerics=numerics, cpu_cache_mb=0)
    assert model.dequantized is not None
    assert model.dequantized.n_weights > 0
    assert model.dequantized.n_bytes == model.ops.cache.n_bytes
    assert uncached.dequantized is None
    assert steps[-1] == (2 * model.weights.n_bytes, 2 * model.weights.n_bytes)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    expected = uncached.forward([1, 2, 3])
    monkeypatch.setattr(dequant, "float_rows", None)  # what a first use would call
    np.testing.assert_array_equal(model.forward([1, 2, 3]), expected)


def test_a_cache_that_is_too_small_is_filled_as_far_as_it_goes(tiny_model: ModelFiles) -> None:
    path = tiny_model("llama-q4_0")
    whole = refengine.load(path).ops.cache.n_bytes
    budget = 1 << 20
    assert whole > budget, "control: not all of it fits into 1 MiB"
    model = refengine.load(path, cpu_cache_mb=1)
    assert 0 < model.ops.cache.n_bytes <= budget
    np.testing.assert_allclose(model.forward([1, 2, 3]), refengine.load(path).forward([1, 2, 3]), rtol=0, atol=1e-5)


def test_the_line_about_loading_says_where_the_time_went() -> None:
    kept = cli("generate", "Hi", "--max-tokens", 1)
    assert kept.code == 0
    assert re.search(r"loaded in (\d+\.\d\d) s, of which \d+\.\d\d s dequantising [\d.]+ M weights\n", kept.err)
    assert "dequantising" not in cli("generate", "Hi", "--max-tokens", 1, "--cpu-cache-mb", 0).err
