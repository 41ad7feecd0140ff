"""Random requests, forks, cancellations and shortages: after every step the blocks are accounted for exactly.

On NumPy many steps; on kernels (their host build, a GPU) fewer, and there every sequence's tokens and logits are, bit
for bit, those of the sequence alone with all features off.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from refengine.engine.engine import Engine, EngineOptions
from refengine.engine.generation import Generation
from refengine.engine.kernel_runner import KernelRunner
from refengine.engine.sampling import SamplingParams, sample
from refengine.errors import DeviceError
from refengine.trace import to_numpy
from tests.engine.models import SmallBlocks, logits_alone, one_layer, random_ids
from tests.levels import in_ci

BLOCK, N_BLOCKS = 4, 24
TEXTS = [random_ids(np.random.default_rng(i), 40) for i in range(3)]  # prompts begin alike
STEPS = Counter[str]()


class EngineMachine(RuleBasedStateMachine):
    """Rules are what a caller may do, in any order."""

    model: Any

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.new_engine()
        self.live: list[Generation] = []
        self.done: list[Generation] = []

    def new_engine(self) -> Engine:
        options = EngineOptions(max_batch=5, max_step_tokens=12, cache_tokens=BLOCK * N_BLOCKS)
        return Engine(self.model, options)

    @rule(
        text=st.integers(0, len(TEXTS) - 1),
        n=st.integers(1, 36),
        max_tokens=st.integers(1, 30),
        seed=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def start(self, text: int, n: int, max_tokens: int, seed: int, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
        self.live.append(self.engine.start(TEXTS[text][:n], params))

    @rule(n=st.integers(1, 12))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()
            self.check()
            STEPS[type(self).__name__] += 1

    @precondition(lambda self: any(g.end is None for g in self.live))
    @rule(which=st.integers(0, 100), seed=st.integers(0, 9))
    def fork(self, which: int, seed: int) -> None:
        running = [g for g in self.live if g.end is None]
        g = running[which % len(running)]
        params = SamplingParams(temperature=1, seed=seed, max_tokens=g.params.max_tokens)
        self.live.append(self.engine.fork(g, params))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), free=st.booleans())
    def end(self, which: int, free: bool) -> None:
        g = self.live.pop(which % len(self.live))
        (self.engine.free if free else self.engine.cancel)(g)
        self.done.append(g)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def next_token(self, which: int) -> None:
        g = self.live[which % len(self.live)]
        if g.pending or g.end is None:
            n = len(g.pending)
            self.engine.next_token(g)
            assert n == 0 or len(g.pending) == n - 1

    @invariant()
    def check(self) -> None:
        engine, pool, prefix = self.engine, self.engine.cache.pool, self.engine.prefix
        assert prefix is not None
        for g in (*self.live, *self.done):
            assert g.end != "error", g.error
            if g not in engine.scheduler.running:
                assert not g.progress.cached.block_table
        for g in engine.scheduler.running:
            cached = g.progress.cached
            assert g.end is None
            assert cached.length < len(g.ids)
            assert len(cached.block_table) * engine.cache.block_size >= cached.length
        references: Counter[int] = Counter()
        content: dict[int, set[tuple[int, ...]]] = {}
        for g in engine.scheduler.running:
            cached, size = g.progress.cached, engine.cache.block_size
            assert len(set(cached.block_table)) == len(cached.block_table)
            for i, block in enumerate(cached.block_table):
                references[block] += 1
                content.setdefault(block, set()).add(tuple(g.ids[: min(cached.length, (i + 1) * size)]))
        for entry in prefix._entries.values():
            references[entry.block] += 1
        # Who shares a block has the same ids up to its end, and nobody wrote further into it than the others know.
        assert all(len(texts) == 1 for texts in content.values())
        assert {b: n for b in range(pool.n_blocks) if (n := pool.references(b))} == dict(references)
        assert pool.n_free == pool.n_blocks - len(references)
        assert pool.n_reclaimable == sum(pool.references(e.block) == 1 for e in prefix._entries.values())

    def teardown(self) -> None:
        while not self.engine.idle:
            self.engine.step()
            self.check()
            STEPS[type(self).__name__] += 1
        for g in self.live:
            assert g.end in ("length", "eos")
        self.compare()
        assert self.engine.prefix is not None
        self.engine.prefix.clear()
        assert self.engine.cache.pool.n_free == self.engine.cache.pool.n_blocks

    def compare(self) -> None:
        """On arrays sums depend on the batch: nothing to compare bit for bit."""


def test_blocks_are_accounted_for_at_every_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    class OnArrays(EngineMachine):
        model = SmallBlocks(one_layer(tmp_path_factory.mktemp("machine"), "cpu"), BLOCK)

    n = 0
    while STEPS["OnArrays"] < in_ci(20_000, 2_000):  # a handful of examples has some thousands
        run_state_machine_as_test(
            OnArrays,
            settings=settings(
                max_examples=in_ci(60, 10),
                stateful_step_count=60,
                deadline=None,
                derandomize=n == 0,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        n += 1
        assert n < 40


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[int, int], np.ndarray | None]:
    """Logits by sequence and number of the token, as the engine drew from them. None: a step ahead overwrote them."""
    return {}


def test_on_kernels_every_sequence_is_what_it_is_alone(
    place: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    drawn: dict[tuple[int, int], np.ndarray | None],
) -> None:
    try:
        alone = one_layer(tmp_path_factory.mktemp("machine"), place, kind="Q4_0", n_ctx=256)
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")
    original = KernelRunner._results

    def spy(parts: Any, tokens: Any, logits: Any) -> Any:
        drawing = [part for part in parts if part.draws]
        for part, row in zip(drawing, [None] * len(parts) if logits is None else logits, strict=True):
            copied = None if row is None else to_numpy(row).copy()
            drawn[id(part.generation), part.generation.n_generated] = copied
        return original(parts, tokens, logits)

    monkeypatch.setattr(KernelRunner, "_results", staticmethod(spy))

    class OnKernels(EngineMachine):
        model = alone

        def new_engine(self) -> Engine:
            # Blocks of 64 positions: texts are long enough to fill some, and five of them do not fit.
            return Engine(self.model, EngineOptions(max_batch=4, max_step_tokens=80, cache_tokens=64 * 7))

        def compare(self) -> None:
            for g in (*self.live, *self.done):
                if not g.n_generated:
                    continue
                for i, row in enumerate(logits_alone(alone, g)):
                    if (id(g), i) in drawn:  # a fork's first tokens were drawn before it was one
                        if drawn[id(g), i] is not None:
                            np.testing.assert_array_equal(drawn[id(g), i], row)
                        assert sample(row, g.params, g.ids[: g.n_prompt + i], g.seed, i) == g.ids[g.n_prompt + i]
            assert drawn or not any(g.n_generated for g in (*self.live, *self.done))
            drawn.clear()

        @rule(
            text=st.integers(0, 1),
            n=st.integers(60, 140),
            max_tokens=st.integers(1, 60),
            seed=st.integers(0, 3),
            penalty=st.sampled_from([1.0, 1.5]),
            logprobs=st.sampled_from([None, None, 0]),
        )
        def start_long(
            self, text: int, n: int, max_tokens: int, seed: int, penalty: float, logprobs: int | None
        ) -> None:
            """While one of them wants log-probabilities, no step is launched ahead."""
            ids = random_ids(np.random.default_rng(text), 140)[:n]
            params = SamplingParams(1, repetition_penalty=penalty, seed=seed, max_tokens=max_tokens, logprobs=logprobs)
            self.live.append(self.engine.start(ids, params))

        def teardown(self) -> None:
            super().teardown()
            runner: Any = self.engine.runner
            STEPS["ahead"] += runner._step.n_ahead

    STEPS["OnKernels"] = STEPS["ahead"] = 0
    while STEPS["OnKernels"] < in_ci(500, 150):
        run_state_machine_as_test(
            OnKernels,
            settings=settings(
                max_examples=4,
                stateful_step_count=12,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert STEPS["ahead"]
