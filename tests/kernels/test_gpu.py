"""The same array code on CuPy. Runs where there is a CUDA device: `pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import refengine
from refengine.engine.sampling import SamplingParams
from refengine.validate.metrics import nmse
from tests.model_files import ModelFiles
from tools.make_model import TINY

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed (extras `cuda13`, `cuda12`)")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        pytest.skip(f"no CUDA device: {e}")


def pair(path: Path, numerics: str) -> tuple[refengine.Model, refengine.Model]:
    return refengine.load(path, "cpu", numerics), refengine.load(path, "cuda", numerics)


@pytest.mark.parametrize("name", list(TINY))
def test_cupy_logits_equal_numpy(
    tiny_model: ModelFiles, name: str, record_property: Callable[[str, object], None]
) -> None:
    cpu, gpu = pair(tiny_model(name), "exact")
    ids = np.random.default_rng(1).integers(0, cpu.config.n_vocab, 56).tolist()
    error = nmse(gpu.forward(ids), cpu.forward(ids))
    record_property("nmse", error)
    # float32 sums in another order: 1e-7 relative a product, as between NumPy and llama.cpp (1e-13 to 1e-12 NMSE).
    assert error <= 1e-11


@pytest.mark.parametrize("name", [n for n in TINY if TINY[n].arch in ("llama", "gpt-oss")])
def test_cupy_rounds_activations_as_numpy(tiny_model: ModelFiles, name: str) -> None:
    """Every operation on NumPy's own inputs: rounding to blocks, float16 attention and the experts' selection agree."""
    from refengine.validate.replay import replay

    cpu, gpu = pair(tiny_model(name), "llamacpp")
    ids = np.random.default_rng(2).integers(0, cpu.config.n_vocab, 48).tolist()
    trace = refengine.Trace("")
    cpu.forward(ids, trace=trace)
    _, compared = replay(gpu, ids, trace.result())
    assert compared
    for tensor, (ours, theirs) in compared.items():
        assert nmse(ours, theirs) <= 1e-11, tensor


def test_cupy_float64_equals_numpy(tiny_model: ModelFiles) -> None:
    cpu, gpu = pair(tiny_model("qwen2-q4_k_m"), "exact64")
    ids = np.random.default_rng(3).integers(0, cpu.config.n_vocab, 48).tolist()
    assert nmse(gpu.forward(ids), cpu.forward(ids)) <= 1e-28  # 1e-16 relative a product, over three layers


@pytest.mark.parametrize("chunk", [1, 7])
def test_cupy_chunks_give_the_same_logits(tiny_model: ModelFiles, chunk: int) -> None:
    _, gpu = pair(tiny_model("gpt-oss-mxfp4_moe"), "exact")
    ids = np.random.default_rng(4).integers(0, gpu.config.n_vocab, 40).tolist()
    whole = gpu.forward(ids)
    assert np.abs(gpu.forward(ids, chunk=chunk) - whole).max() <= 1e-5 * np.abs(whole).max()


def test_cupy_generates_the_same_greedy_tokens(tiny_model: ModelFiles) -> None:
    cpu, gpu = pair(tiny_model("qwen2-q4_k_m"), "exact")
    params = SamplingParams(temperature=0, max_tokens=24)
    on_gpu, on_cpu = (list(refengine.generate(model, [5, 6, 7], params)) for model in (gpu, cpu))
    assert [t.id for t in on_gpu] == [t.id for t in on_cpu]


def test_two_modules_of_a_file_do_not_lower_each_others_shared_memory() -> None:
    """CuPy gives both the same function: the second one, which needs less, does not take from the first."""
    import cupy

    from refengine.cuda.runtime.nvrtc import DeviceModule
    from refengine.cuda.runtime.source import read_source

    first, second = (DeviceModule(read_source("norm")) for _ in range(2))
    x, weight = cupy.ones((1, 64), cupy.float32), cupy.ones(64, cupy.float32)

    def launch(module: DeviceModule, shared_bytes: int) -> None:
        y = cupy.zeros_like(x)
        module.launch("rms_norm_f32", (1,), (256,), [x, weight, y, 64, 0.0], shared_bytes)
        assert (y == 1).all()

    launch(first, 90 << 10)
    launch(second, 60 << 10)
    launch(first, 90 << 10)
