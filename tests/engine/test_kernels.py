"""The engine on raw kernels: each feature switched off gives the same tokens and logits, bit for bit."""

from typing import Any

import numpy as np
import pytest

import refengine
from refengine.cuda import upload
from refengine.cuda.decode import prompt
from refengine.cuda.memory import aligned
from refengine.engine.engine import Engine, EngineOptions, single_sequence
from refengine.engine.generation import Generation
from refengine.engine.kernel_runner import KernelRunner
from refengine.engine.sampling import SamplingParams, logprobs, sample
from refengine.errors import DeviceError, RequestError
from refengine.model import Model
from refengine.trace import to_numpy
from tests.engine.models import logits_alone, random_ids
from tests.levels import in_ci, mostly_in_ci
from tests.model_files import ModelFiles
from tools.make_model import ONE_EACH


def loaded(path: Any, place: str, **options: Any) -> Model:
    try:
        return refengine.load(path, place, "fast", **options)
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")


# A dense model runs in tests/engine/test_machine.py.
@pytest.fixture(scope="module", params=mostly_in_ci(ONE_EACH, "qwen2"))
def model(request: pytest.FixtureRequest, place: str, tiny_model: ModelFiles) -> Model:
    return loaded(tiny_model(request.param), place)


def requests(model: Model) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and not, with penalties and without, two that begin alike, one of more than a block."""
    rng = np.random.default_rng(5)
    n_vocab = model.config.n_vocab
    common = rng.integers(0, n_vocab, 70).tolist()
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.3},
        {"temperature": 0, "repetition_penalty": 1.2},
        {"temperature": 1.0},
    ]
    lengths = [5, 71, 75, 1, 20]
    return [
        (
            (common if n > 70 else []) + rng.integers(0, n_vocab, n - 70 if n > 70 else n).tolist(),
            SamplingParams(**setting, seed=i, max_tokens=3 + i),
        )
        for i, (n, setting) in enumerate(zip(lengths, settings, strict=True))
    ]


class Recorded:
    """Logits that tokens were drawn from, by sequence; None where a step launched ahead has overwritten them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[int, list[np.ndarray | None]] = {}
        original = KernelRunner._results

        def spy(parts: Any, tokens: Any, logits: Any) -> Any:
            drawing = [part for part in parts if part.draws]
            for part, row in zip(drawing, [None] * len(parts) if logits is None else logits, strict=True):
                copied = None if row is None else to_numpy(row).copy()
                self.rows.setdefault(id(part.generation), []).append(copied)
            return original(parts, tokens, logits)

        monkeypatch.setattr(KernelRunner, "_results", staticmethod(spy))


OPTIONS: dict[str, dict[str, Any]] = {
    "all on": {},
    "no graphs": {"graphs": False},
    "no step ahead": {"ahead": False},
    "no prefix cache": {"prefix_cache": False},
    "no batching": {"batching": False},
    "all off, in chunks of 7": {
        **{"graphs": False, "ahead": False, "prefix_cache": False, "batching": False},
        "max_step_tokens": 7,
    },
}
# Whether one of them alone changes a bit is asked in CI.
SWITCHES = in_ci(list(OPTIONS.items()), [item for item in OPTIONS.items() if item[0].startswith("all")])


def test_scores_of_a_prompt_are_those_of_its_logits_whatever_runs_beside_it(model: Model) -> None:
    ids = np.random.default_rng(3).integers(0, model.config.n_vocab, 100).tolist()
    logits = model.forward(ids)
    expected = [logprobs(row, token, 2) for row, token in zip(logits, ids[1:], strict=False)]
    for name, options in SWITCHES:
        engine = Engine(model, EngineOptions(**{"max_batch": 3, "max_step_tokens": 80, "cache_tokens": 640, **options}))
        list(engine.tokens(engine.start(ids[:80], SamplingParams(max_tokens=2))))  # fills the prefix cache
        running = [
            engine.start(ids, SamplingParams(max_tokens=1, prompt_logprobs=2)),
            engine.start(ids[:70], SamplingParams(max_tokens=3, seed=1)),
            engine.start(ids[:70], SamplingParams(max_tokens=3, prompt_logprobs=0, logprobs=1)),
        ]
        for g in running:
            list(engine.tokens(g))
        whole, _, without_top = (g.prompt_scores for g in running)
        assert running[1].prompt_scores == []
        assert whole[0] is without_top[0] is None
        assert [(s.logprob, list(s.top)) for s in whole[1:] if s] == expected, name
        assert [s.logprob for s in without_top[1:] if s] == [own for own, _ in expected[:69]], name


def test_switches_change_no_bit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    expected: list[np.ndarray] = []
    for name, options in SWITCHES:
        engine = Engine(model, EngineOptions(**{"max_batch": 3, "max_step_tokens": 80, "cache_tokens": 640, **options}))
        assert isinstance(engine.runner, KernelRunner)
        if not expected:
            engine.warm_up()
        given = requests(model)
        running: list[Generation] = []
        while given or not engine.idle:
            if given:
                running.append(engine.start(*given.pop(0)))  # they join one after another
            engine.step()
        if not expected:
            expected = [logits_alone(model, g) for g in running]
            assert sum(g.progress.prefix_tokens for g in running) == 64
        n_unread = 0
        for g, rows in zip(running, expected, strict=True):
            for i, (row, alone) in enumerate(zip(recorded.rows[id(g)], rows, strict=True)):
                n_unread += row is None
                if row is not None:
                    np.testing.assert_array_equal(row, alone, err_msg=name)
                history = g.ids[: g.n_prompt + i]
                assert sample(alone, g.params, history, g.seed, i) == g.ids[g.n_prompt + i], name
        assert (n_unread > 0) == options.get("ahead", True)
        recorded.rows.clear()


def test_reference_attention_is_as_near_but_not_the_same(place: str, tiny_model: ModelFiles) -> None:
    path = tiny_model("gpt-oss-mxfp4_moe")
    flash, reference = loaded(path, place), loaded(path, place, attention="reference")
    ids = random_ids(np.random.default_rng(1), 70)
    exact = refengine.load(path).forward(ids)
    a, b = flash.forward(ids), reference.forward(ids)
    assert (a != b).any()
    for logits in (a, b):
        # As tests/kernels/test_models.py: rounding of 2^-11 over three layers.
        assert ((logits - exact) ** 2).mean() / (exact**2).mean() < 1e-5
    params = SamplingParams(temperature=0, max_tokens=4)
    assert len(list(refengine.generate(reference, ids, params))) == 4
    with pytest.raises(RequestError, match="attention 'tiled': choose flash or reference"):
        refengine.load(path, attention="tiled")


def test_draws_are_those_of_the_host(model: Model) -> None:
    for ids, params in requests(model)[1:3]:
        engine, generation = single_sequence(model, ids, params)
        list(engine.tokens(generation))
        for i, row in enumerate(logits_alone(model, generation)):
            history = generation.ids[: generation.n_prompt + i]
            assert sample(row, params, history, generation.seed, i) == generation.ids[generation.n_prompt + i]


def test_nothing_is_allocated_after_warm_up(place: str, tiny_model: ModelFiles) -> None:
    model = loaded(tiny_model("qwen2-q4_k_m"), place)
    engine = Engine(model, EngineOptions(max_batch=4, max_step_tokens=64, cache_tokens=640))
    engine.warm_up()
    accounted, free = model.ops.memory.accounted(), engine.cache.pool.n_free
    for round_ in range(3):
        running = [engine.start(ids, params) for ids, params in requests(model)]
        engine.free(running[round_])
        while not engine.idle:
            engine.step()
    assert engine.prefix is not None
    engine.prefix.clear()
    assert model.ops.memory.accounted() == accounted
    assert engine.cache.pool.n_free == free


def test_the_warm_up_takes_room_for_the_inputs_of_any_prompts(
    place: str, tiny_model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loaded(tiny_model("qwen2-q4_k_m"), place), EngineOptions(4, max_step_tokens=64, cache_tokens=640))
    engine.warm_up()
    copied: list[int] = []

    def together(xp: Any, arrays: list[np.ndarray]) -> Any:
        found = upload.together(xp, arrays)
        copied.append(sum(aligned(4 * array.size) for array in arrays))
        return found

    monkeypatch.setattr(prompt, "together", together)
    running = [engine.start(ids, params) for ids, params in requests(engine.model)]
    while not engine.idle:
        engine.step()
    assert all(generation.n_generated for generation in running)
    assert isinstance(engine.runner, KernelRunner)
    assert engine.runner._prompts is not None
    assert max(copied) <= engine.runner._prompts.most_inputs(64, 4).nbytes
