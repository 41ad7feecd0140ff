"""The fused decode step is the model file bit for bit, at every l_out and the logits, and draws what sampling draws."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import refengine
from refengine.cache.paged import CacheSequence, KVCache
from refengine.cuda.decode import step
from refengine.cuda.decode.step import DecodeRow, DecodeStep, NoFusedStep, StepPlan, _Copy, kernels_of_steps
from refengine.cuda.kernels import router
from refengine.cuda.kernels.few_rows import FEW_ROWS, can_prepare, plan_of
from refengine.cuda.kernels.quantize_rows import Converted, Rows
from refengine.cuda.layout import PackedMatrix
from refengine.cuda.runtime.launch import ForPlans, Needed, NoLaunches
from refengine.cuda.upload import Described
from refengine.engine.kernel_runner import KernelRunner
from refengine.engine.sampling import SamplingParams, sample
from refengine.errors import KernelError
from refengine.gguf.file import GGUFFile
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE, llama
from refengine.ops.decode import DecodeOps
from refengine.trace import to_numpy
from refengine.weights import load_weights
from tests.kernels.test_models import ids_for, loaded
from tests.levels import ci_only, mostly_in_ci
from tests.model_files import ModelFiles
from tools.make_model import ONE_EACH

WITH_DECODE = {arch: name for arch, name in ONE_EACH.items() if hasattr(BY_ARCHITECTURE[arch], "decode")}
# Ways in which files are mixed that those do not have: floats, heads that share K or do not, frequency factors, ties.
MORE = (
    "llama-bf16",
    "llama-f32-wide-heads",
    "llama-q8_0-896",
    "phi3-q4_0-gqa",
    "phi3-f32-longrope",
    "gpt-oss-f32-three-of-five",
    "gpt2-f32-untied",
)
DAILY = ("llama-f32-wide-heads", "phi3-q4_0-gqa", "gpt-oss-f32-three-of-five")
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, top_p=0.7),
    SamplingParams(temperature=0.0, repetition_penalty=1.7),
    SamplingParams(),
)


class Decoding:
    """Sequences of one cache, decoded by the fused step; each step is compared with the model file and the host's draw.

    The model file runs after the fused step on the same sequences, and writes the same places of the cache.
    """

    def __init__(self, model: Model, max_batch: int, n_tokens: int = 80, shuffle: int | None = None) -> None:
        self.model = model
        self.cache: KVCache = model.new_cache(n_tokens, max_batch)
        if shuffle is not None:
            take = iter(np.random.default_rng(shuffle).permutation(self.cache.pool.n_blocks).tolist())
            self.cache.pool.allocate = lambda n: [next(take) for _ in range(n)]  # type: ignore[method-assign]
        given = (model.ops, model.config, model.decode, model.weights, self.cache)
        self.fused = DecodeStep(*given, max_batch=max_batch)
        self.fused.warm_up()
        self.sequences: list[CacheSequence] = []
        self.histories: list[list[int]] = []
        self.params: list[SamplingParams] = []

    def join(self, ids: Sequence[int], params: SamplingParams = PARAMS[0], at: int | None = None) -> None:
        """A sequence with a prompt: all of it but the last id is in the cache."""
        sequence = CacheSequence()
        if len(ids) > 1:
            self.model.step([(sequence, ids[:-1])], self.cache, rows=[])
        where = len(self.sequences) if at is None else at
        self.sequences.insert(where, sequence)
        self.histories.insert(where, list(ids))
        self.params.insert(where, params)

    def leave(self, i: int) -> None:
        for of_rows in (self.sequences, self.histories, self.params):
            del of_rows[i]

    def rows(self, ahead: bool = False) -> list[DecodeRow]:
        self.cache.reserve([(s, s.length + 1 + ahead) for s in self.sequences])
        return [
            DecodeRow(id(s), h[-1], s.length, s.block_table, p, h[0], len(h), h)
            for s, h, p in zip(self.sequences, self.histories, self.params, strict=True)
        ]

    def contents(self) -> list[np.ndarray]:
        return [to_numpy(part).copy() for kv in (*self.cache.k, *self.cache.v) for part in (kv.values, kv.exponents)]

    def step(self, traced: bool = True, ahead: bool = False) -> int:
        """One token for each. traced: layers are compared (without a graph). Returns the number of uploads."""
        layers: dict[int, np.ndarray] = {}
        rows, before = self.rows(ahead), self.fused.state.n_uploads
        trace = (lambda name, il, x: layers.__setitem__(il, to_numpy(x).copy())) if traced else None
        drawn, on_device = self.fused.run(rows, trace, ahead)
        logits, written = None if on_device is None else to_numpy(on_device).copy(), self.contents()
        expected: dict[int | None, np.ndarray] = {}

        def seen(name: str, il: int | None, x: Any, occurrence: int | None = None) -> Any:
            if name == "l_out":
                expected[il] = to_numpy(x)
            return x

        parts = [(s, h[-1:]) for s, h in zip(self.sequences, self.histories, strict=True)]
        wanted = to_numpy(self.model.step(parts, self.cache, trace=seen))
        for il in range(self.model.config.n_layer if traced else 0):
            np.testing.assert_array_equal(layers[il][: len(rows)], expected[il], err_msg=f"l_out-{il}")
        if logits is not None:
            np.testing.assert_array_equal(logits, wanted)
        for fused, reference in zip(written, self.contents(), strict=True):
            np.testing.assert_array_equal(fused.view(np.uint8), reference.view(np.uint8))
        for i, row in enumerate(rows):
            assert drawn[i].tolist() == [sample(wanted[i], row.params, row.history, row.seed, row.index), 0, 0]
            self.histories[i].append(int(drawn[i, 0]))
        return self.fused.state.n_uploads - before


def prompts(model: Model, n: int, seed: int) -> list[list[int]]:
    lengths = np.random.default_rng(seed).integers(2, 14, n)
    return [ids_for(model, int(length), seed=seed + i) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module", params=mostly_in_ci(WITH_DECODE))
def model(request: pytest.FixtureRequest, place: str, tiny_model: ModelFiles) -> Model:
    return loaded(tiny_model(request.param), place)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_steps_are_the_model_files_bit_for_bit(n: int, model: Model) -> None:
    decoding = Decoding(model, max_batch=n, shuffle=n)
    for i, ids in enumerate(prompts(model, n, seed=n)):
        decoding.join(ids, PARAMS[i % len(PARAMS)])
    decoding.step()
    # The device has what it needs for the next: nothing is uploaded while the same sequences go on.
    assert decoding.step(traced=False) == 0
    if n == 1:
        assert decoding.step() == 0


def test_a_window_slides_over_more_than_it_holds(model: Model) -> None:
    """Positions around the end of a block and beyond the window of gpt-oss's sliding layers (16)."""
    decoding = Decoding(model, max_batch=1, shuffle=3)
    decoding.join(ids_for(model, 64))
    uploads = [decoding.step(traced=i % 2 == 0) for i in range(3)]
    assert uploads[1:] == [1, 0]  # the block table, when the sequence gets its second block


def test_a_step_launched_ahead_is_the_same_step(model: Model) -> None:
    """Of the same rows, of some of them, and of others; its cache, logits and tokens are compared when it is used."""
    decoding = Decoding(model, max_batch=4, shuffle=5)
    for i, ids in enumerate(prompts(model, 3, seed=60)):
        decoding.join(ids, PARAMS[i + 1])
    used = []
    for ahead in (True, True, False, True):
        uploads = decoding.step(traced=False, ahead=ahead)
        used.append(decoding.fused.n_ahead)
    assert (used, uploads) == ([0, 1, 2, 2], 0)
    decoding.leave(1)
    decoding.step(traced=False, ahead=True)  # the two that are left were in the step; no other is launched
    assert decoding.fused.n_ahead == 3
    decoding.step(traced=False, ahead=True)
    assert decoding.fused.n_ahead == 3
    decoding.join(prompts(model, 1, seed=70)[0], PARAMS[1], at=1)
    decoding.step(traced=False, ahead=True)  # the step is dropped
    assert decoding.fused.n_ahead == 3
    decoding.step()  # a trace wants a step of its own
    assert decoding.fused.n_ahead == 3
    assert decoding.step(traced=False) == 0


def test_a_step_ahead_that_is_not_wanted_leaves_nothing(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("llama-q4_0"), place)
    decoding = Decoding(model, max_batch=2, n_tokens=192)
    decoding.join(ids_for(model, 62), PARAMS[1])
    uploads = [decoding.step(traced=False, ahead=True) for _ in range(4)]
    assert uploads[1:] == [0, 1, 0]  # the second block, a step before its first position
    assert decoding.fused.n_ahead == 3
    (row,) = decoding.rows()
    wrong = (
        replace(row, token=(row.token + 1) % model.config.n_vocab),
        replace(row, position=row.position - 1),
        replace(row, index=row.index + 1),
        replace(row, seed=row.seed + 1),
        replace(row, params=PARAMS[2]),
        replace(row, history=row.history[1:]),
        replace(row, key="another"),
        replace(row, block_table=row.block_table[::-1]),
    )
    for other in wrong:
        assert decoding.fused.state.places([other]) is None
    assert decoding.fused.state.places([row]) == [0]
    decoding.fused.run([wrong[-2]])
    assert decoding.fused.n_ahead == 3
    decoding.step(traced=False, ahead=True)  # as if the step of another sequence had not been in between
    decoding.fused.wait()
    decoding.step(traced=False, ahead=True)
    assert decoding.fused.n_ahead == 3
    decoding.step(traced=False)
    assert decoding.fused.n_ahead == 4


def test_after_a_failure_all_is_uploaded(place: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device has is not known, if a step or the one launched ahead has failed."""
    model = loaded(tiny_model("llama-q4_0"), place)
    for n_good in (0, 1):
        decoding = Decoding(model, max_batch=2)
        decoding.join(ids_for(model, 9), PARAMS[1])
        decoding.step(traced=False)
        rows, launched, n = decoding.rows(ahead=True), decoding.fused._launched, iter(range(2))

        def failing(*given: Any, launched: Any = launched, n: Any = n, n_good: int = n_good) -> Any:
            step = launched(*given)
            if next(n) == n_good:
                raise RuntimeError("the device has failed")
            return step

        monkeypatch.setattr(decoding.fused, "_launched", failing)
        with pytest.raises(RuntimeError, match="the device has failed"):
            decoding.fused.run(rows, ahead=True)
        monkeypatch.undo()
        decoding.step(traced=False, ahead=True)
        decoding.step(traced=False)


def test_on_a_gpu_a_result_is_read_when_its_copy_is_there() -> None:
    """The copy goes to page-locked memory, and nothing waits for it but the one who reads it."""
    queued: list[Any] = []

    class Event:
        def __init__(self, disable_timing: bool) -> None:
            assert disable_timing

        def record(self) -> None:
            queued.append(self)

        def synchronize(self) -> None:
            while self in queued:
                work = queued.pop(0)
                if work is not self:
                    work()

    class OnDevice:
        def get(self, out: np.ndarray, blocking: bool) -> None:
            assert not blocking
            queued.append(lambda: out.__setitem__(..., [[1, 0, 0], [2, 0, 0]]))

    cuda = SimpleNamespace(PinnedMemory=bytearray, PinnedMemoryPointer=lambda memory, at: memory, Event=Event)
    copy = _Copy(SimpleNamespace(cuda=cuda), 2)
    copy.queue(OnDevice())
    assert len(queued) == 2
    assert copy.wait(1).tolist() == [[1, 0, 0]]
    assert copy.wait(2).tolist() == [[1, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize("name", ci_only(MORE, set(MORE) - set(DAILY)))
def test_other_files_bit_for_bit(name: str, place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model(name), place)
    decoding = Decoding(model, max_batch=12, shuffle=1, n_tokens=30)
    for ids in prompts(model, 2, seed=5):
        decoding.join(ids)
    decoding.step()
    if name.startswith(("llama-q8_0", "gpt-oss", "phi3-q4")):  # more rows than the kernels for few take
        for ids in prompts(model, 7, seed=9):
            decoding.join(ids[:1], PARAMS[1])
        decoding.step()


def test_experts_of_more_rows_than_the_router_takes(
    place: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "MOST_PAIRS", 0)
    model = loaded(tiny_model("gpt-oss-mxfp4_moe"), place)
    decoding = Decoding(model, max_batch=3)
    for ids in prompts(model, 2, seed=60):
        decoding.join(ids)
    decoding.step()


@pytest.mark.parametrize("name", ["llama3-q4_k_m", "gpt-oss-mxfp4_moe"])
def test_rows_too_wide_for_a_product_to_prepare(
    name: str, place: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refengine.cuda.decode.ops.can_prepare", lambda *_, **__: False)
    model = loaded(tiny_model(name), place)
    decoding = Decoding(model, max_batch=2)
    for ids in prompts(model, 2, seed=61):
        decoding.join(ids)
        decoding.step()


@pytest.mark.parametrize("shared_limit", [99 << 10, 227 << 10])
@pytest.mark.parametrize(("kind", "n_in", "most"), [("Q4_K", 16384, 1), ("Q6_K", 14336, 2), ("F16", 16384, 1)])
def test_a_step_of_any_rows_of_a_wide_matrix_fits_every_device(
    kind: str, n_in: int, most: int, shared_limit: int
) -> None:
    """most: the most rows that the product prepares itself."""
    w = PackedMatrix("ffn_down", GGMLQuantizationType[kind], (8192, n_in), np.empty(0, np.uint8))
    kernels = NoLaunches("cuda")
    kernels.shared_limit = shared_limit
    assert [can_prepare([w], n) for n in (1, 2)] == [most >= 1, most >= 2]
    for n in range(1, FEW_ROWS + 1):
        x = np.zeros((n, n_in), np.float32)
        rows = Rows(n, x) if n <= most else Rows(n, None, Converted.empty(np, n, n_in, halves=kind == "F16"))
        assert plan_of(kernels, rows, [w]).shared_bytes <= shared_limit


@pytest.mark.parametrize("name", ["llama3-q4_k_m", "gpt-oss-mxfp4_moe"])
def test_long_sequences_of_several_splits(name: str, place: str, tiny_model: ModelFiles) -> None:
    """The cache is filled at random: what matters is which of it is read, and in which order it is added up."""
    model = refengine.load(loaded(tiny_model(name), place).gguf.path, "host" if place == "host" else "cuda", n_ctx=2048)
    decoding = Decoding(model, max_batch=3, n_tokens=1664, shuffle=2)
    rng = np.random.default_rng(3)
    for kv in (*decoding.cache.k, *decoding.cache.v):
        xp = model.ops.xp
        kv.values[...] = xp.asarray(rng.standard_normal(kv.values.shape).astype(np.float16))
        kv.exponents[...] = xp.asarray(rng.integers(125, 129, kv.exponents.shape).astype(np.uint8))
    for length in (511, 1535, 1027):
        decoding.join(ids_for(model, 1))
        sequence = decoding.sequences[-1]
        decoding.cache.batch([(sequence, [0] * length)])
        sequence.length = length
    decoding.step()
    decoding.step(traced=False)


def test_seventeen_sequences_and_what_joins_and_leaves(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("llama-q4_0"), place)
    decoding = Decoding(model, max_batch=17, shuffle=4)
    assert decoding.fused.buckets == (1, 2, 4, 8, 16, 17)
    given = prompts(model, 20, seed=30)
    for i in range(17):
        decoding.join(given[i], PARAMS[i % len(PARAMS)])
    decoding.step()
    for _ in range(13):
        decoding.leave(2)
    assert decoding.step(traced=False) > 0
    assert decoding.step() == 0
    decoding.join(given[17], PARAMS[1], at=1)
    decoding.step()
    decoding.leave(4)
    decoding.leave(0)
    decoding.step(traced=False)
    decoding.join(given[18], PARAMS[3])
    decoding.step()


def test_rows_that_are_not_there_change_nothing(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("gpt-oss-mxfp4_moe"), place)
    decoding = Decoding(model, max_batch=4)
    for ids in prompts(model, 3, seed=40):
        decoding.join(ids)
    before = decoding.contents()
    decoding.fused.warm_up()
    for was, now in zip(before, decoding.contents(), strict=True):
        np.testing.assert_array_equal(was.view(np.uint8), now.view(np.uint8))
    rows = decoding.rows()
    decoding.fused.run(rows)
    block_size = decoding.cache.block_size
    slots = {(r.block_table[r.position // block_size], r.position % block_size) for r in rows}
    for was, now in zip(before, decoding.contents(), strict=True):
        block, _, offset = np.nonzero((was != now).reshape(*was.shape[:3], -1).any(axis=3))
        assert set(zip(block.tolist(), offset.tolist(), strict=True)) <= slots


@pytest.mark.parametrize("name", ["llama3-q4_k_m", "gpt-oss-mxfp4_moe"])
def test_kernels_for_one_plan_give_the_same_step(
    name: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where steps of few rows are captured as graphs."""
    model = loaded(tiny_model(name), "host")
    decoding = Decoding(model, max_batch=1)
    decoding.join(prompts(model, 1, seed=70)[0])
    needed = Needed(model.ops.kernels)
    monkeypatch.setattr(decoding.fused, "_kernels_of", lambda bucket: needed)
    decoding.fused.warm_up()
    assert {file for file, _ in needed.parts} == {"one_row", "attention_step"}
    assert 5 <= len(needed.parts) <= 9
    with GGUFFile(model.gguf.path) as gguf:  # what `refengine compile --model` finds without a device
        cfg, module = model.config, BY_ARCHITECTURE[model.config.arch]
        described = load_weights(gguf, module.tensors(cfg), cfg.n_layer, Described())
        found = kernels_of_steps(module.decode, cfg, described, model.ops.kernels, 1, cfg.n_ctx_train)
    assert found == needed.parts
    monkeypatch.setattr(decoding.fused, "_kernels_of", lambda bucket: ForPlans(model.ops.kernels))
    for _ in range(2):
        decoding.step(traced=False)


@pytest.mark.gpu
def test_kernels_that_cannot_be_stored_are_not_compiled(
    tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoding = Decoding(loaded(tiny_model("llama3-q4_k_m"), "cuda"), max_batch=2)
    monkeypatch.setattr(step, "missing", lambda arch, parts: parts)
    monkeypatch.setattr(step, "can_store", lambda: False)
    decoding.fused.warm_up()
    assert "decode steps use slower kernels" in caplog.text
    assert "set REFENGINE_CACHE" in caplog.text
    assert "refengine compile --model" in caplog.text
    for ids in prompts(decoding.model, 2, seed=71):
        decoding.join(ids)
    decoding.step()


def test_nothing_is_allocated_after_the_warm_up(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("llama-q4_0"), place)
    progress: list[tuple[int, int]] = []
    started = model.ops.memory.accounted()["workspace"]
    decoding = Decoding(model, max_batch=3)
    sizes = {"n_positions": decoding.fused.n_positions, "block_size": decoding.cache.block_size, "n_ctx": model.n_ctx}
    with GGUFFile(model.gguf.path) as gguf:  # what is asked before the weights are loaded
        described = load_weights(gguf, llama.tensors(model.config), model.config.n_layer, Described())
    taken = StepPlan.of(llama.decode, model.config, described, NoLaunches(place), max_batch=3, **sizes).total_bytes
    if place == "host":  # of a GPU, what the prompts' passes keep is accounted for as well
        assert model.ops.memory.accounted()["workspace"] == started + taken
    decoding.fused.warm_up(lambda done, total: progress.append((done, total)))
    assert progress == [(i + 1, len(progress)) for i in range(len(progress))]
    if place == "host":
        assert progress == []  # nothing is compiled for one plan
    for ids in prompts(model, 2, seed=50):
        decoding.join(ids)
    memory, xp = model.ops.memory, model.ops.xp
    before = memory.accounted(), 0 if xp is np else xp.get_default_memory_pool().total_bytes()
    decoding.fused.run(decoding.rows())
    assert (memory.accounted(), 0 if xp is np else xp.get_default_memory_pool().total_bytes()) == before


# Launches a layer: of one row, of up to 8 rows, of more.
LAUNCHES = {
    "llama3-q4_k_m": (5, 9, 13),
    "qwen2-q4_k_m": (5, 9, 13),
    "qwen3-q4_k_m": (5, 9, 13),
    "phi3-mostly_q4_0": (5, 9, 11),
    "gpt-oss-mxfp4_moe": (7, 11, 13),
    "gpt2-q5_1": (7, 9, 10),
}


@pytest.mark.parametrize("name", mostly_in_ci(WITH_DECODE))
def test_a_layer_is_few_launches(
    name: str, place: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tiny_model(name), place)
    decoding = Decoding(model, max_batch=9, n_tokens=64)
    n_launches, ends, overlap = 0, [], []
    launch = model.ops.kernels.launch

    def counted(*given: Any, **named: Any) -> None:
        nonlocal n_launches
        n_launches += 1
        overlap.append(named.get("overlap", False))
        launch(*given, **named)

    monkeypatch.setattr(model.ops.kernels, "launch", counted)
    for bucket in (1, 8, 9):
        decoding.fused._launch(bucket, lambda name, il, x: ends.append(n_launches))
    each = np.diff(np.array(ends).reshape(3, -1), axis=1)  # of the layers after the first
    counted_now = tuple(each.max(axis=1).tolist())
    assert name in LAUNCHES, f"add {name} to LAUNCHES in {__file__}: a layer is {counted_now} launches now"
    assert counted_now == LAUNCHES[name]
    assert not overlap[0]  # attention reads what the last step wrote before the kernels in front of it have ended


def test_the_reason_for_no_fused_step_is_told(tiny_model: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(tiny_model("llama-q4_0"), "host")
    cache = model.new_cache(64)
    layer = model.weights.layers[0]

    def softmax_of_logits(cfg: Any, w: Any, ops: DecodeOps, trace: Any) -> Any:
        return ops.row_soft_max(ops.linear(ops.embedding(w.token_embd), w.output))

    def scaled_keys(cfg: Any, w: Any, ops: DecodeOps, trace: Any) -> Any:
        x = ops.embedding(w.token_embd)
        q, k, v = (ops.linear(x, w) for w in (layer.attn_q, layer.attn_k, layer.attn_v))
        heads = [ops.heads(x, n) for x, n in zip((q, k, v), (cfg.n_head, cfg.n_head_kv, cfg.n_head_kv), strict=True)]
        return ops.attention(0, heads[0], ops.scale(heads[1], 2.0), heads[2], scale=1.0)

    cases: list[tuple[Any, Any, str]] = [
        (None, model.config, r"the model file of llama has no decode\(\)"),
        (llama.decode, replace(model.config, head_dim=20), "heads of 20 elements; kernels take multiples of 8 up to"),
        (llama.decode, replace(model.config, n_expert_used=99), "99 experts a token; kernels take up to"),
        (softmax_of_logits, model.config, "row_soft_max supports only the chosen experts' scores"),
        (scaled_keys, model.config, "no factor of K"),
    ]
    for decode, config, reason in cases:
        with pytest.raises(NoFusedStep, match=reason):
            DecodeStep(model.ops, config, decode, model.weights, cache, max_batch=2)
    model.decode = None
    KernelRunner(model, cache, 2, graphs=False)
    assert "llama go through forward(), without a fused step: the model file of llama has no" in caplog.text


def test_rows_are_scaled(tiny_model: ModelFiles) -> None:
    """A logit scale, as several architectures have it."""
    model = loaded(tiny_model("llama-q4_0"), "host")
    factor = 0.3  # rounds

    def scaled(cfg: Any, w: Any, ops: DecodeOps, trace: Any) -> Any:
        return ops.scale(llama.decode(cfg, w, ops, trace), factor)

    rows = [DecodeRow("a", 5, 0, [0], PARAMS[0], 1, 0, [5])]
    logits = []
    for decode in (llama.decode, scaled):
        step = DecodeStep(model.ops, model.config, decode, model.weights, model.new_cache(64), max_batch=1)
        _, on_device = step.run(rows)
        assert on_device is not None
        logits.append(to_numpy(on_device).copy())
    np.testing.assert_array_equal(logits[1], logits[0] * np.float32(factor))


def test_what_does_not_fit_is_refused(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("llama-q4_0"), place)
    decoding = Decoding(model, max_batch=2)
    decoding.join(ids_for(model, 4))
    (row,) = decoding.rows()
    for wrong, message in (
        ({"token": model.config.n_vocab}, "outside the vocabulary"),
        ({"position": 64}, "position 64, and a block table of 64 positions"),
        ({"position": 256}, "position 256, 4 ids; 256 positions fit"),
        ({"params": PARAMS[1], "history": [1, -1]}, "ids -1 to 1 in its history"),
    ):
        with pytest.raises(KernelError, match=message):
            decoding.fused.run([replace(row, **wrong)])
    with pytest.raises(KernelError, match="position 64, and a block table of 64 positions"):
        decoding.fused.run([replace(row, position=63)], ahead=True)
    with pytest.raises(KernelError, match="decode: 3 rows, allowed 1 to 2"):
        decoding.fused.run([row] * 3)
    decoding.step()
