"""Device memory: arenas, packing in slabs, what is refused before it is allocated."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import refengine
from refengine.cuda.layout import PackedMatrix, pack, packed_bytes
from refengine.cuda.memory import ALIGNMENT, Arena, DeviceMemory
from refengine.cuda.upload import Uploader, bytes_for
from refengine.errors import DeviceError, ModelError
from tests.kernels.matrices import TILED, random_matrix
from tests.model_files import ModelFiles
from tools.make_model import write_model


@pytest.mark.parametrize("kind", [*TILED, "F32", "BF16"])
def test_slabs_make_the_same_data_as_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refengine.cuda.upload.SLAB_BYTES", 5000)
    w = random_matrix(kind, (3, 83, 512), 1)
    arena = Arena(np, "weights", bytes_for([(w.type, w.shape)], []))
    done: list[int] = []
    packed = Uploader(np, arena).matrix(w, done.append)
    whole = pack(np, w)
    np.testing.assert_array_equal(packed.data, whole.data)
    assert packed.data.ctypes.data % ALIGNMENT == 0
    assert packed_bytes(w.type, w.shape) == whole.n_bytes
    assert arena.used == arena.n_bytes
    assert sum(done) == w.data.nbytes
    assert len(done) > 3


def test_an_arena_gives_what_it_has_and_no_more() -> None:
    memory = DeviceMemory(np)
    arena = memory.arena("kv", 1000)
    first, second = arena.take((3, 5), np.float16), arena.take((100,), np.float32)
    assert first.ctypes.data % ALIGNMENT == second.ctypes.data % ALIGNMENT == 0
    assert not np.shares_memory(first, second)
    with pytest.raises(DeviceError, match="kv arena of 1000 bytes has no room for 400 more at 768"):
        arena.take((100,), np.float32)
    assert memory.accounted() == {"weights": 0, "kv": 1000, "workspace": 0}
    del arena, first, second
    assert memory.accounted()["kv"] == 0


@pytest.mark.parametrize("name", ["gpt-oss-mxfp4_moe", "qwen2-q4_k_m"])
def test_weights_are_accounted_to_the_byte(name: str, tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model(name), "host")
    packed = [w for layer in model.weights.layers for w in vars(layer).values() if isinstance(w, PackedMatrix)]
    assert packed
    assert all(w.data.dtype == np.uint8 for w in packed)
    accounted = model.ops.memory.accounted()
    aligned_rest = ALIGNMENT * 4 * len(model.gguf.tensors)
    # Rows are filled up to whole tiles of 16 x 256: a quarter more in such small matrices.
    assert model.weights.n_bytes <= accounted["weights"] <= 1.3 * model.weights.n_bytes + aligned_rest
    cache = model.new_cache(100)
    assert model.ops.memory.accounted()["kv"] >= cache.n_bytes
    del cache
    assert model.ops.memory.accounted()["kv"] == 0


class OnDevice(np.ndarray):
    """An array of another place, into which bytes are copied with `set`."""

    copies: ClassVar[list[int]] = []

    def set(self, values: np.ndarray) -> None:
        self.copies.append(values.nbytes)
        self[...] = values


def test_copies_to_a_device_are_as_large_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    xp: Any = SimpleNamespace(empty=lambda shape, dtype: np.empty(shape, dtype).view(OnDevice))
    w = random_matrix("F32", (10, 70), 1)
    for chunk, expected in ((1000, [1000, 1000, 800]), (2800, [2800]), (1 << 20, [2800])):
        monkeypatch.setattr(OnDevice, "copies", [])
        packed = Uploader(xp, Arena(np, "weights", 4096), chunk).matrix(w)
        assert OnDevice.copies == expected
        np.testing.assert_array_equal(packed.data, w.data)


def test_the_size_of_copies_reaches_the_uploader(tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Seen(Uploader):
        def __init__(self, xp: Any, arena: Arena, chunk_bytes: int) -> None:
            sizes.append(chunk_bytes)
            super().__init__(xp, arena, chunk_bytes)

    monkeypatch.setattr("refengine.cuda.Uploader", Seen)
    refengine.load(tiny_model("llama-q4_0"), "host", copy_chunk_kb=64)
    refengine.load(tiny_model("llama-q4_0"), "host")
    assert sizes == [64 << 10, 1 << 20]


def test_progress_reaches_the_end(tiny_model: ModelFiles) -> None:
    seen: list[tuple[int, int]] = []
    model = refengine.load(tiny_model("llama-q4_0"), "host", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (model.weights.n_bytes, model.weights.n_bytes)


RESIDENT = """
import re, sys
import refengine
def of_files():
    return int(re.search(r"RssFile:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
seen = []
refengine.load(sys.argv[2], sys.argv[1], progress=lambda *_: None)  # libraries are mapped files too
before = of_files()
refengine.load(sys.argv[3], sys.argv[1], progress=lambda *_: seen.append(of_files()), copied=True)
print(max(seen) - before)
"""


@pytest.mark.parametrize("device", ["host", "cpu"])
def test_what_has_been_read_of_a_file_does_not_stay_in_memory(
    device: str, tmp_path: Path, tiny_model: ModelFiles
) -> None:
    large = tmp_path / "large.gguf"
    write_model(large, "qwen2", "Q8_0", n_layer=8, n_embd=512, n_head=8, head_dim=64, n_ff=6144)
    assert large.stat().st_size > 64 << 20
    line = [sys.executable, "-c", RESIDENT, device, str(tiny_model("qwen2-q8_0")), str(large)]
    grown = int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert grown < 12 << 20  # a matrix of 3 MB, and what the kernel reads ahead


def test_a_scale_beyond_all_reason_is_refused() -> None:
    w = random_matrix("MXFP4", (16, 64), 1)
    assert isinstance(w.data, np.ndarray)
    w.data.reshape(-1, 17)[5, 0] = 241
    with pytest.raises(ModelError, match=r"random MXFP4: a scale of 2\^114"):
        pack(np, w)


@pytest.mark.gpu
@pytest.mark.gpu_alone
def test_on_a_gpu_what_does_not_fit_is_refused_first_and_what_is_there_is_device_memory(tiny_model: ModelFiles) -> None:
    try:
        model = refengine.load(tiny_model("gpt-oss-mxfp4_moe"), "cuda", "fast")
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")
    model.forward([1, 2, 3])
    model.ops.memory.check_residency()
    cache = model.new_cache(100)
    model.ops.memory.check_residency()
    model.forward(list(range(60)))
    model.ops.memory.settle()  # after that nothing more is allocated
    model.ops.memory.check_residency()
    steady = model.ops.memory.accounted()
    for n in (60, 1, 33, 60, 7, 60):
        model.forward(list(range(n)))
    assert model.ops.memory.accounted()["workspace"] == steady["workspace"]
    with pytest.raises(DeviceError, match=r"has \d+ bytes free, kv needs \d+"):
        model.new_cache(1 << 20, n_sequences=1 << 20)
    del cache
