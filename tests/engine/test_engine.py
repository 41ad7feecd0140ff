"""The engine: order of service, budgets, shortage, cancellation, forks, prefixes, hooks; on NumPy."""

from typing import Any

import numpy as np
import pytest

from refengine.cache.paged import OutOfBlocks
from refengine.engine.engine import Engine, EngineOptions, single_sequence
from refengine.engine.generation import Generation, Token
from refengine.engine.hooks import MetricsHook, StepStats
from refengine.engine.sampling import SamplingParams, logprobs
from refengine.engine.scheduler import affordable
from refengine.errors import RefengineError, RequestError
from tests.engine.models import SmallBlocks, one_layer, random_ids
from tests.levels import in_ci

BLOCK = 4
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallBlocks:
    return SmallBlocks(one_layer(tmp_path_factory.mktemp("engine"), "cpu"), BLOCK)


def prompt(n: int, seed: int = 0) -> list[int]:
    return random_ids(np.random.default_rng(seed), n)


def engine_with(model: Any, **options: Any) -> Engine:
    return Engine(model, EngineOptions(**{"cache_tokens": 256, "max_batch": 4, "max_step_tokens": 16, **options}))


def run_all(engine: Engine) -> int:
    n = 0
    while not engine.idle:
        engine.step()
        n += 1
    return n


def ids_alone(model: Any, ids: list[int], params: SamplingParams) -> list[int]:
    engine, generation = single_sequence(model, ids, params)
    return [token.id for token in engine.tokens(generation)]


def greedy(n: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=n)


def test_next_token_advances_all_and_loses_none(model: SmallBlocks) -> None:
    engine = engine_with(model)
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=6 + i) for i in range(3)]
    running = [engine.start(prompt(5 + i, i), p) for i, p in enumerate(params)]
    last = [token.id for token in engine.tokens(running[2])]  # the others run along
    assert len(last) == 8
    assert [len(g.pending) for g in running] == [6, 7, 0]
    for i, g in enumerate(running):
        tokens = list(engine.tokens(g))
        assert [t.id for t in tokens] == ([] if i == 2 else ids_alone(model, prompt(5 + i, i), params[i]))
        assert g.ids[g.n_prompt :] == ids_alone(model, prompt(5 + i, i), params[i])
        assert g.end == "length"
    with pytest.raises(RequestError, match="this sequence has ended \\(length\\)"):
        engine.next_token(running[0])


def test_a_long_prompt_holds_no_stream_up_for_more_than_a_budget(model: SmallBlocks) -> None:
    steps: list[StepStats] = []

    class Watching(MetricsHook):
        def on_step(self, f: StepStats) -> None:
            steps.append(f)

    engine = Engine(model, EngineOptions(max_batch=4, max_step_tokens=16, cache_tokens=512), Watching())
    streams = [engine.start(prompt(3, i), greedy(40)) for i in range(2)]
    engine.step()
    long = engine.start(prompt(200, 9), greedy(2))
    while long.n_generated == 0:
        before = [g.n_generated for g in streams]
        engine.step()
        assert [g.n_generated for g in streams] == [n + 1 for n in before]
    assert max(f.prefill_tokens for f in steps) == 14  # 16, less one for each stream
    assert sum(f.prefill_tokens for f in steps) == 3 + 3 + 200


def test_prompts_go_on_however_many_decode(model: SmallBlocks) -> None:
    engine = engine_with(model, max_batch=4, max_step_tokens=2)
    streams = [engine.start(prompt(1, i), greedy(30)) for i in range(3)]
    late = engine.start(prompt(5, 9), greedy(1))
    while late.end is None:
        engine.step()
    assert all(g.end is None for g in streams)


def test_without_batching_one_runs_after_the_other(model: SmallBlocks) -> None:
    engine = engine_with(model, batching=False)
    first, second = (engine.start(prompt(3, i), greedy(4)) for i in range(2))
    while first.end is None:
        assert second.n_generated == 0
        engine.step()
    run_all(engine)
    assert second.end == "length"


def test_the_youngest_makes_way_and_comes_to_the_same_tokens(model: SmallBlocks) -> None:
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=20) for i in range(3)]
    engine = engine_with(model, cache_tokens=40, prefix_cache=False)
    running = [engine.start(prompt(6, i), p) for i, p in enumerate(params)]
    run_all(engine)
    assert engine.scheduler.preemptions > 0
    assert running[0].progress.preemptions == 0
    for i, g in enumerate(running):
        assert g.ids[6:] == ids_alone(model, prompt(6, i), params[i])
    assert engine.cache.pool.n_free == 10


def test_or_whoever_finds_no_block_fails(model: SmallBlocks) -> None:
    engine = engine_with(model, cache_tokens=40, prefix_cache=False, on_shortage="fail")
    running = [engine.start(prompt(6, i), greedy(20)) for i in range(3)]
    run_all(engine)
    failed = [g for g in running if g.end == "error"]
    assert failed
    assert {g.end for g in running} == {"error", "length"}
    for g in failed:
        g.pending.clear()
        with pytest.raises(OutOfBlocks, match="KV cache is full"):
            engine.next_token(g)
    assert engine.cache.pool.n_free == 10


def test_what_can_never_fit_is_refused_at_once(model: SmallBlocks) -> None:
    engine = engine_with(model, cache_tokens=40)
    with pytest.raises(RequestError, match="30 prompt tokens and 12 more need 11 blocks of 4, but the KV cache has 10"):
        engine.start(prompt(30), greedy(12))
    assert engine.idle


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode", "ended"])
def test_cancelling_frees_everything_at_once(when: str, model: SmallBlocks) -> None:
    ended: list[str] = []

    class Ends(MetricsHook):
        def on_end(self, generation: Generation, reason: str) -> None:
            ended.append(reason)

    engine = Engine(model, EngineOptions(max_batch=1, max_step_tokens=4, cache_tokens=64, prefix_cache=False), Ends())
    other = engine.start(prompt(3, 1), greedy(3)) if when == "waiting" else None
    g = engine.start(prompt(11), greedy(2))
    n_steps = {"waiting": 1, "prefill": 1, "decode": 3, "ended": 9}[when]
    for _ in range(n_steps):
        engine.step()
    states = {"waiting": (0, None), "prefill": (0, None), "decode": (1, None), "ended": (2, "length")}
    assert (g.n_generated, g.end) == states[when]
    engine.cancel(g)
    engine.cancel(g)
    if other is None:
        assert engine.cache.pool.n_free == 16
        assert engine.idle
    else:
        assert run_all(engine)
        assert other.end == "length"
    assert ended.count("cancelled") == (when != "ended")
    engine.free(g)
    assert list(engine.tokens(g)) == []


def test_forks_share_blocks_until_they_write(model: SmallBlocks) -> None:
    engine = engine_with(model, prefix_cache=False)
    params = SamplingParams(temperature=2, seed=1, max_tokens=12)
    first = engine.start(prompt(6), params)
    for _ in range(4):
        engine.step()
    used = engine.cache.pool.n_blocks - engine.cache.pool.n_free
    second = engine.fork(first, SamplingParams(temperature=2, seed=2, max_tokens=12))
    same = engine.fork(first)
    assert engine.cache.pool.n_blocks - engine.cache.pool.n_free == used
    run_all(engine)
    assert first.ids == [*prompt(6), *ids_alone(model, prompt(6), params)]
    assert same.ids == first.ids
    assert second.ids[:10] == first.ids[:10]
    assert second.ids != first.ids
    assert engine.cache.pool.n_free == engine.cache.pool.n_blocks
    with pytest.raises(RequestError, match="ended \\(length\\) cannot be forked"):
        engine.fork(first)


def test_a_fork_beyond_the_batch_waits(model: SmallBlocks) -> None:
    engine = engine_with(model, max_batch=1)
    first = engine.start(prompt(6), greedy(6))
    engine.step()
    engine.step()
    second = engine.fork(first)
    assert list(engine.scheduler.waiting) == [second]
    run_all(engine)
    assert second.ids == first.ids


def test_text_goes_on_in_both_forks(model: SmallBlocks) -> None:
    """A fork in the middle of a character, and of what may become a stop string."""
    tokenizer = model.tokenizer
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    script = [by_byte[bytes([b])] for b in "a√b".encode()]
    engine = engine_with(model)
    first = engine.start(prompt(3), SamplingParams(temperature=0, max_tokens=8, stop=("√b",)))
    texts = []
    for i, token in enumerate(script):
        if i == 2:
            second = first.forked(first.params)
            for rest in script[2:]:
                texts.append(second.accept(rest).text)
            assert second.end == "stop"
        first.accept(token)
    assert "".join(t.text for t in first.pending) == "a"
    assert first.end == "stop"
    assert "".join(texts) == ""


def test_a_common_beginning_is_computed_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """1,000 tokens of system prompt, 32 requests: at most a twentieth of the prefill."""
    small = SmallBlocks(one_layer(tmp_path_factory.mktemp("prefix"), "cpu", n_ctx=2048), 64)
    system = prompt(1000, 50)
    fed = {}
    answers = {}
    for prefix_cache in (True, False):
        options = EngineOptions(max_batch=8, max_step_tokens=256, cache_tokens=12800, prefix_cache=prefix_cache)
        engine = Engine(small, options)
        engine.start(system, greedy(1))
        run_all(engine)
        small.n_fed = 0
        requests = [engine.start(system + prompt(5, i), greedy(3)) for i in range(32)]
        run_all(engine)
        fed[prefix_cache] = small.n_fed - 32 * 2  # less what was decoded
        answers[prefix_cache] = [g.ids[g.n_prompt :] for g in requests]
        if prefix_cache:
            assert [g.progress.prefix_tokens for g in requests] == [960] * 32
    assert answers[True] == answers[False]
    assert fed[False] == 32 * 1005
    assert fed[True] == 32 * 45
    assert fed[True] <= fed[False] / 20


def test_many_requests_go_through_a_small_cache(model: SmallBlocks) -> None:
    engine = engine_with(model, cache_tokens=240, max_batch=8, max_step_tokens=32)
    rng = np.random.default_rng(3)
    requests = []
    for i in range(in_ci(1000, 200)):
        n, m = int(rng.integers(1, 60)), int(rng.integers(1, 40))
        requests.append(engine.start(prompt(n, i % 50), SamplingParams(temperature=0.7, seed=i, max_tokens=m)))
    run_all(engine)
    assert {g.end for g in requests} <= {"length", "eos"}
    assert engine.scheduler.preemptions > 0
    assert engine.prefix is not None
    assert engine.prefix.stats.evictions > 0
    for g in requests[::100]:
        assert g.ids[g.n_prompt :] == ids_alone(model, g.ids[: g.n_prompt], g.params)
    engine.prefix.clear()
    assert engine.cache.pool.n_free == engine.cache.pool.n_blocks


def test_hooks_hear_of_everything(model: SmallBlocks) -> None:
    class Recording(MetricsHook):
        def __init__(self) -> None:
            self.events: list[tuple[str, Any]] = []
            self.steps: list[StepStats] = []

        def on_start(self, generation: Generation) -> None:
            self.events.append(("start", generation.n_prompt))

        def on_first_token(self, generation: Generation, seconds: float) -> None:
            assert generation.first_token_s is not None
            assert seconds == generation.first_token_s > 0
            self.events.append(("first", generation.n_generated))

        def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
            assert seconds > 0
            self.events.append(("token", token.id))

        def on_end(self, generation: Generation, reason: str) -> None:
            self.events.append(("end", reason))

        def on_step(self, stats: StepStats) -> None:
            assert stats.engine.blocks_used + stats.engine.blocks_cached + stats.engine.blocks_free == 16
            self.steps.append(stats)

    hook = Recording()
    engine = Engine(model, EngineOptions(max_batch=2, cache_tokens=64), hook)
    g = engine.start(prompt(9), greedy(3))
    run_all(engine)
    names = [name for name, _ in hook.events]
    assert names == ["start", "first", "token", "token", "token", "end"]
    assert [value for name, value in hook.events if name == "token"] == g.ids[9:]
    assert [f.prefill_tokens for f in hook.steps] == [9, 0, 0]
    assert hook.steps[0].engine.prefix_misses == 2
    assert hook.steps[-1].engine.blocks_cached == 2
    again = engine.start(prompt(9), greedy(1))
    run_all(engine)
    assert again.progress.prefix_tokens == 8
    assert hook.steps[-1].engine.prefix_hits == 2


def test_log_probabilities_are_reported_where_asked_for(model: SmallBlocks) -> None:
    engine = engine_with(model)
    g = engine.start(prompt(4), SamplingParams(temperature=0, max_tokens=3, logprobs=5))
    tokens = list(engine.tokens(g))
    logits = model.forward(g.ids)
    for i, token in enumerate(tokens):
        row = logits[3 + i].astype(np.float64)
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert token.logprob == pytest.approx(expected[token.id], abs=1e-5)  # float32 logits, other chunks
        assert len(token.top) == 5
        assert token.top[0] == (token.id, token.logprob)
    assert engine.next_token(engine.start(prompt(4), greedy(1))).logprob is None
    with pytest.raises(RequestError, match="logprobs"):
        SamplingParams(logprobs=21)


def test_logits_that_cannot_be_used_end_one_sequence_only(model: SmallBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(model)
    bad, good = engine.start(prompt(3, 1), greedy(4)), engine.start(prompt(3, 2), greedy(4))
    engine.step()
    original = model._model.evaluate

    def spoilt(parts: Any, *rest: Any, **named: Any) -> Any:
        logits = original(parts, *rest, **named)
        for row, (sequence, _) in enumerate(parts):
            if sequence is bad.progress.cached:
                logits[row, 7] = np.nan
        return logits

    monkeypatch.setattr(model._model, "evaluate", spoilt)
    run_all(engine)
    assert (bad.end, good.end) == ("error", "length")
    assert engine.next_token(bad).id == bad.ids[3]
    with pytest.raises(RefengineError, match="logits\\[7\\] is NaN"):
        engine.next_token(bad)


def test_an_abort_ends_what_runs_and_the_engine_goes_on(model: SmallBlocks) -> None:
    engine = engine_with(model, max_batch=2)
    *running, waiting = [engine.start(prompt(9, i), GREEDY) for i in range(3)]
    engine.step()
    engine.step()
    error = RefengineError("the device is gone")
    assert engine.abort(error) == running
    assert engine.cache.pool.n_free == engine.cache.pool.n_blocks
    for g in running:
        g.pending.clear()
        with pytest.raises(RefengineError, match="the device is gone"):
            next(engine.tokens(g))
    assert [t.id for t in engine.tokens(waiting)] == ids_alone(model, prompt(9, 2), GREEDY)
    assert engine.idle


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_batch", 0, "max_batch: given 0, allowed 1 to 1024"),
        ("max_step_tokens", 0, "max_step_tokens: given 0"),
        ("cache_tokens", 0, "cache_tokens: given 0"),
        ("on_shortage", "wait", "on_shortage: given 'wait', allowed preempt or fail"),
    ],
)
def test_options_are_checked(option: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EngineOptions(**{option: value})


def test_scores_of_a_prompt(model: SmallBlocks) -> None:
    ids = prompt(21)
    logits = model.forward(ids)
    ways: list[dict[str, Any]] = [{}, {"max_step_tokens": 5}, {"max_batch": 2, "cache_tokens": 32}]
    for options in ways:
        engine = Engine(model, EngineOptions(**{"cache_tokens": 256, **options}))
        other = engine.start(prompt(9), greedy(12))  # with 32 positions one of the two is preempted
        g = engine.start(ids, SamplingParams(max_tokens=6, prompt_logprobs=3))
        run_all(engine)
        assert other.prompt_scores == []
        assert g.prompt_scores[0] is None
        for row, token, score in zip(logits, ids[1:], g.prompt_scores[1:], strict=False):
            own, top = logprobs(row, token, 3)
            assert score is not None
            assert score.logprob == pytest.approx(own, abs=1e-5)  # float32 logits, other chunks
            assert [i for i, _ in score.top] == [i for i, _ in top]


def test_a_prompt_that_is_scored_takes_nothing_from_the_prefix_cache(model: SmallBlocks) -> None:
    engine = engine_with(model)
    list(engine.tokens(engine.start(prompt(21), greedy(1))))
    g = engine.start(prompt(21), SamplingParams(max_tokens=1, prompt_logprobs=0))
    list(engine.tokens(g))
    assert g.progress.prefix_tokens == 0
    assert all(score is not None for score in g.prompt_scores[1:])
    again = engine.start(prompt(21), greedy(1))
    list(engine.tokens(again))
    assert again.progress.prefix_tokens > 0


def test_a_step_takes_fewer_ids_the_deeper_they_are() -> None:
    assert [affordable(512, start) for start in (0, 4095, 4096, 32768, 131072)] == [512, 512, 455, 256, 102]
    assert [affordable(1, start) for start in (0, 1 << 20)] == [1, 1]
    assert affordable(0, 0) == 0


def test_a_fork_may_want_scores_that_its_origin_did_not(model: SmallBlocks) -> None:
    engine = Engine(model, EngineOptions(cache_tokens=256, max_step_tokens=5))
    g = engine.start(prompt(21), greedy(2))
    engine.step()
    other = engine.fork(g, SamplingParams(max_tokens=2, prompt_logprobs=0))
    run_all(engine)
    assert g.prompt_scores == []
    assert [score is None for score in other.prompt_scores] == [True] * 6 + [False] * 15  # what was fed before is past


def test_a_prompt_is_scored_once(model: SmallBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its sequence is computed again after its first token."""
    engine = Engine(model, EngineOptions(max_batch=2, cache_tokens=32))
    n_scored = []
    run = engine.runner.run

    def spy(parts: Any, ahead: bool) -> Any:
        n_scored.append(sum(part.n_scored for part in parts if part.generation is g))
        return run(parts, ahead)

    monkeypatch.setattr(engine.runner, "run", spy)
    other = engine.start(prompt(9), greedy(12))
    g = engine.start(prompt(11), SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0))
    run_all(engine)
    assert other.n_generated == g.n_generated == 12
    assert g.progress.preemptions > 0
    assert sum(n_scored) == 10
