"""What a start needs of a device's memory: reckoned before it is taken, right, and told where it lacks."""

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import refengine
from refengine.cache.paged import BLOCK_SIZE, CacheSequence, KVCache
from refengine.config import ModelConfig, RopeConfig
from refengine.cuda import weight_bytes
from refengine.cuda.layout import PACKING_BYTES, pack
from refengine.cuda.memory import settled
from refengine.cuda.upload import Described
from refengine.cuda.workspace import packing_bytes, prompt_bytes
from refengine.device import Device
from refengine.engine.capacity import Capacity
from refengine.engine.engine import Engine, EngineOptions
from refengine.gguf.file import GGUFFile
from refengine.model import PACKAGED_MODEL, Model
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.weights import Matrix, Weights, load_weights
from refengine.worker import startup
from refengine.worker.jobs.engine_thread import Started
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log
from tests.kernels.matrices import TILED, random_matrix
from tests.levels import mostly_in_ci
from tests.model_files import ModelFiles
from tests.worker.test_startup import UUID, error_of, failed
from tools.make_model import ONE_EACH, write_model

DEVICE = "cuda:3"
OPTIONS = WorkerOptions(UUID, PACKAGED_MODEL, DEVICE, 8080)
SEVEN_BILLION = ModelConfig(
    arch="llama",
    name="7B",
    n_vocab=32000,
    n_ctx_train=4096,
    n_layer=32,
    n_embd=4096,
    n_head=32,
    n_head_kv=32,
    head_dim=128,
    n_ff=11008,
    norm_eps=1e-5,
    rope=RopeConfig(128, 10000.0, 1.0, 4096, 0.0, 1.0),
)


def described(config: ModelConfig) -> Weights:
    """What `load_weights` with `Described` gives of a file whose matrices are all Q4_0."""
    placement = Described()
    tensors: dict[str, Any] = {}
    for name, spec in BY_ARCHITECTURE[config.arch].tensors(config).items():
        if spec.optional:
            tensors[name] = tensors[spec.same_as] if spec.same_as else None
        elif len(spec.shape) == 1:
            tensors[name] = placement.vector(np.zeros(spec.shape, np.float32))
        else:
            matrix = Matrix(name, GGMLQuantizationType.Q4_0, spec.shape, np.zeros(0, np.uint8))
            tensors[name] = placement.matrix(matrix, lambda n: None)
    return Weights(tensors, config.n_layer)


def packaged_capacity(options: WorkerOptions) -> Capacity:
    with GGUFFile(PACKAGED_MODEL) as gguf:
        config = read_config(gguf)
        shapes = load_weights(gguf, BY_ARCHITECTURE[config.arch].tensors(config), config.n_layer, Described())
    return startup.capacity_of(config, options, DEVICE, shapes)


SHAPES = described(SEVEN_BILLION)
CAPACITY = startup.capacity_of(SEVEN_BILLION, OPTIONS, DEVICE, SHAPES)


def peak_of(function: Callable[[], object]) -> int:
    """Bytes of arrays that are there at once, the second time."""
    function()
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", mostly_in_ci(ONE_EACH))
def test_what_is_reckoned_is_what_is_taken(name: str, tiny_model: ModelFiles) -> None:
    """The cache and the decode step's buffers to the byte."""
    model = refengine.load(tiny_model(name), "host")
    capacity = startup.capacity_of(model.config, replace(OPTIONS, max_batch=3), "host", model.weights)
    engine = Engine(model, EngineOptions(3, cache_tokens=5 * BLOCK_SIZE))
    assert engine.cache.pool.n_blocks == 5
    assert model.ops.memory.accounted() == {
        "weights": weight_bytes(model.gguf.tensors.values()),
        "kv": capacity.cache_bytes(5),
        "workspace": capacity.decode_bytes(5),
    }
    alone = startup.capacity_of(model.config, replace(OPTIONS, max_batch=3, batching=False), "host", model.weights)
    assert alone.decode_bytes(5) < capacity.decode_bytes(5)
    reference = startup.capacity_of(model.config, replace(OPTIONS, attention="reference"), "host", model.weights)
    assert reference.decode_bytes(5) == 0


def test_the_cache_of_the_cpu_is_reckoned_too() -> None:
    model = refengine.load()
    capacity = startup.capacity_of(model.config, OPTIONS, "cpu", None)
    assert capacity.cache_bytes(3) == model.new_cache(3 * BLOCK_SIZE).n_bytes


@pytest.mark.parametrize("name", mostly_in_ci(ONE_EACH))
def test_prompts_take_what_is_reckoned(name: str, tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model(name), "host")
    n_tokens = 2 * BLOCK_SIZE
    options = replace(OPTIONS, max_step_tokens=n_tokens)
    shapes = load_weights(
        model.gguf, BY_ARCHITECTURE[model.config.arch].tensors(model.config), model.config.n_layer, Described()
    )
    capacity = startup.capacity_of(model.config, options, "host", shapes)
    engine = Engine(model, capacity.engine_options(2))
    assert model.memory is not None
    before = model.memory.accounted()["workspace"]
    engine.warm_up()
    assert model.memory.accounted()["workspace"] - before == capacity.prompt_bytes(2)


@pytest.mark.parametrize("name", mostly_in_ci(ONE_EACH))
def test_forward_takes_what_is_reckoned_or_somewhat_more(name: str, tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model(name), "host")
    n_tokens = 2 * BLOCK_SIZE
    cache = model.new_cache(n_tokens)

    def prompt() -> None:
        sequence = CacheSequence()
        model.step([(sequence, [1] * n_tokens)], cache, [n_tokens - 1])
        cache.free(sequence)

    reckoned = prompt_bytes(model.config, n_tokens)
    assert 0.5 * settled(peak_of(prompt)) <= reckoned <= settled(peak_of(prompt))


@pytest.mark.parametrize("kind", TILED)
def test_packing_takes_what_is_reckoned_or_somewhat_more(kind: str) -> None:
    w = random_matrix(kind, (256, 4096), 1)
    info = SimpleNamespace(name="m.weight", type=w.type, shape=w.shape, n_bytes=int(w.data.nbytes))
    peak = w.data.nbytes + peak_of(lambda: pack(np, w))
    assert 0.8 * peak <= packing_bytes([info]) <= peak
    assert w.type in PACKING_BYTES
    many = SimpleNamespace(name="m.weight", type=w.type, shape=(9, *w.shape), n_bytes=9 * int(w.data.nbytes))
    assert packing_bytes([many, info]) == packing_bytes([info])  # one expert at a time


def test_the_cache_is_what_free_memory_allows() -> None:
    """Never more than there is; from the least start that works to what all sequences can use."""
    least, wanted = CAPACITY.needed_bytes(1), 8 * KVCache.blocks_for(SEVEN_BILLION.n_ctx_train)
    assert CAPACITY.blocks(least - 1) == 0
    assert CAPACITY.blocks(least) == 1
    found = {gib: CAPACITY.blocks(gib << 30) for gib in (1, 2, 4, 8, 16, 32)}
    for gib, n_blocks in found.items():
        free = gib << 30
        assert CAPACITY.needed_bytes(n_blocks) <= free
        decode, prompt = CAPACITY.decode_bytes(n_blocks), CAPACITY.prompt_bytes(n_blocks)
        assert CAPACITY.cache_bytes(n_blocks) <= 0.9 * (free - decode)  # prompts of later requests have a tenth
        assert n_blocks == wanted or CAPACITY.cache_bytes(n_blocks + 1) > 0.9 * free - decode - prompt
    assert list(found.values()) == sorted(set(found.values()))
    assert CAPACITY.blocks(1 << 40) == wanted
    alone = startup.capacity_of(SEVEN_BILLION, replace(OPTIONS, batching=False), DEVICE, SHAPES)
    assert alone.blocks(1 << 40) == wanted // 8


def test_a_cache_of_a_given_size_is_as_large_or_none() -> None:
    capacity = startup.capacity_of(SEVEN_BILLION, replace(OPTIONS, kv_cache_size_mb=1000), DEVICE, SHAPES)
    n_blocks = capacity.min_blocks
    assert capacity.cache_bytes(n_blocks) <= 1000 << 20 < capacity.cache_bytes(n_blocks + 1)
    assert capacity.blocks(capacity.needed_bytes(n_blocks)) == capacity.blocks(1 << 40) == n_blocks
    assert capacity.blocks(capacity.needed_bytes(n_blocks) - 1) == 0


@pytest.mark.parametrize("device", ["cpu", "host"])
def test_a_cache_of_less_than_a_block_is_refused_before_loading(device: str, tmp_path: Path) -> None:
    write_model(tmp_path / "deep.gguf", "llama", "Q4_0", n_layer=60, n_head=8, n_head_kv=8, head_dim=32)
    log = failed("--model", tmp_path / "deep.gguf", "--kv-cache-size-mb", 1, device=device)
    assert not [line for line in log if line["event"] in ("model_load_progress", "model_load_complete")]
    error = error_of(log)
    assert error["code"] == "INSUFFICIENT_VRAM"
    assert "--kv-cache-size-mb: given 1, but one block of 64 tokens takes" in error["message"]
    values = 2 * 60 * 64 * 8 * 32
    assert error["bytes_required"] == (4 * values if device == "cpu" else 2 * values + values // 32)
    assert error["bytes_available"] == 1 << 20


class Loaded(Exception):
    """The start has gone on to load the model."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device whose driver says that `free` bytes are free: a start does all but load the model."""
    found = SimpleNamespace(free=0)
    runtime = SimpleNamespace(memGetInfo=lambda: (found.free, 1 << 40))
    opened = Device(SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)), DEVICE, "for a test")
    monkeypatch.setattr(startup, "open_device", lambda spec: opened)
    monkeypatch.setattr(startup, "architecture", lambda xp: "sm_90a")
    monkeypatch.setattr(startup, "missing", lambda arch: [])

    def load(*arguments: object, **keywords: object) -> Model:
        raise Loaded

    monkeypatch.setattr(startup, "load", load)
    return found


def start(**changes: Any) -> Started:
    return startup.Startup(replace(OPTIONS, **changes), Log(UUID, "m", DEVICE))()


def needed(**changes: Any) -> int:
    capacity = packaged_capacity(replace(OPTIONS, **changes))
    with GGUFFile(PACKAGED_MODEL) as gguf:
        tensors = gguf.tensors.values()
        return weight_bytes(tensors) + max(capacity.needed_bytes(capacity.min_blocks), packing_bytes(tensors))


@pytest.mark.parametrize("changes", [{}, {"kv_cache_size_mb": 40}, {"max_batch": 64, "max_step_tokens": 4096}], ids=str)
def test_a_start_is_refused_for_want_of_a_byte(gpu: SimpleNamespace, changes: dict[str, Any]) -> None:
    """Weights, a block of the cache or what was asked for, the decode step, a prompt: no less, and no more."""
    gpu.free = needed(**changes)
    with pytest.raises(Loaded):
        start(**changes)
    gpu.free -= 1
    with pytest.raises(startup.StartFailed) as caught:
        start(**changes)
    error = caught.value
    assert (error.code, error.required, error.available) == ("INSUFFICIENT_VRAM", gpu.free + 1, gpu.free)
    assert DEVICE in error.message
    assert str(PACKAGED_MODEL) in error.message


def test_more_that_is_asked_for_needs_more() -> None:
    assert needed(kv_cache_size_mb=40) > needed() + (30 << 20)
    assert needed(kv_cache_size_mb=40, max_batch=64) > needed(kv_cache_size_mb=40)
    assert needed(kv_cache_size_mb=40, max_step_tokens=100) < needed(kv_cache_size_mb=40)


def test_the_engine_has_the_cache_that_there_is_room_for(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "load", lambda *a, **k: refengine.load(device="host"))
    monkeypatch.setattr(Engine, "warm_up", lambda engine, progress: None)
    capacity = packaged_capacity(OPTIONS)
    for free in (needed(), needed() + (4 << 20)):
        gpu.free = free
        found = start().engine
        assert 1 < found.cache.pool.n_blocks == capacity.blocks(free) < 64
        assert found.options.max_step_tokens == capacity.options.max_step_tokens


def test_memory_that_others_take_meanwhile(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **keywords: object) -> Model:
        gpu.free = 1000
        return refengine.load(device="host")

    monkeypatch.setattr(startup, "load", load)
    gpu.free = 1 << 30
    with pytest.raises(startup.StartFailed, match="the weights leave 1000 bytes") as caught:
        start()
    error = caught.value
    assert (error.code, error.available) == ("INSUFFICIENT_VRAM", 1000)
    assert error.required == packaged_capacity(OPTIONS).needed_bytes(1)


@pytest.mark.parametrize("device", [DEVICE, "cpu"])
@pytest.mark.parametrize("where", ["load", "Engine"])
def test_an_allocation_that_fails_is_told_with_bytes(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, where: str, device: str
) -> None:
    def fails(*arguments: object, **keywords: object) -> None:
        raise MemoryError("out of memory")

    if device == "cpu":
        monkeypatch.undo()
    gpu.free = 1 << 30
    monkeypatch.setattr(startup, "load", lambda *a, **k: refengine.load(device="cpu" if device == "cpu" else "host"))
    monkeypatch.setattr(startup, where, fails)
    with pytest.raises(startup.StartFailed, match="out of memory") as caught:
        start(device=device)
    error = caught.value
    assert error.code == "INSUFFICIENT_VRAM"
    assert error.available == (None if device == "cpu" else 1 << 30)
    assert error.required is not None
    assert error.required > 1 << 20
    if where == "load" and device == DEVICE:
        assert error.required == needed()
