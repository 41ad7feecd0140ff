"""Decode steps that are launched ahead: nobody can tell but by the clock."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from refengine.engine.engine import Engine, EngineOptions, single_sequence
from refengine.engine.generation import Generation, Token
from refengine.engine.hooks import MetricsHook, StepStats
from refengine.engine.sampling import SamplingParams
from refengine.errors import DeviceError, RefengineError
from refengine.model import Model
from refengine.trace import to_numpy
from tests.engine.models import one_layer, random_ids

N_CTX = 256


@pytest.fixture(scope="module")
def model(place: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    try:
        return one_layer(tmp_path_factory.mktemp("ahead"), place, kind="Q4_0", n_ctx=N_CTX)
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")


def prompt(n: int, seed: int = 0) -> list[int]:
    return random_ids(np.random.default_rng(seed), n)


def ids_alone(model: Model, ids: list[int], params: SamplingParams) -> list[int]:
    engine, generation = single_sequence(model, ids, params, ahead=False)
    return [token.id for token in engine.tokens(generation)]


def fused(engine: Engine) -> Any:
    """The engine's fused decode step."""
    runner: Any = engine.runner
    return runner._step


@dataclass
class Seen(MetricsHook):
    """What an engine's hook is told, but for times and the number of blocks in use."""

    tokens: list[tuple[int, int, str | None]] = field(default_factory=list)  # number in its text, id, stop reason
    ends: list[str] = field(default_factory=list)
    steps: list[tuple[int, ...]] = field(default_factory=list)

    def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
        assert seconds > 0
        self.tokens.append((generation.n_generated, token.id, token.stop_reason))

    def on_end(self, generation: Generation, reason: str) -> None:
        self.ends.append(reason)

    def on_step(self, stats: StepStats) -> None:
        e = stats.engine
        counts = (e.running, e.waiting, e.prefix_hits, e.prefix_misses, e.preemptions)
        self.steps.append((stats.batch_size, stats.prefill_tokens, *counts))


def stop_within(model: Model, ids: list[int], params: SamplingParams, first: int) -> tuple[str, int]:
    """A stop string of the end of one token and the beginning of the next, and the number of tokens before its end."""
    engine, generation = single_sequence(model, ids, params, ahead=False)
    pieces = [token.text for token in engine.tokens(generation)]
    text = "".join(pieces)
    for i in range(first, len(pieces) - 1):
        stop, at = pieces[i][-1:] + pieces[i + 1][:1], sum(map(len, pieces[: i + 1])) - 1
        if len(stop) == 2 and text.find(stop) == at:
            return stop, i + 2
    raise AssertionError("no such place in the text")


STOPPED, CANCELLED = 3, 4


def served(
    model: Model, stop: str, ahead: bool, on_shortage: str, prepare: Callable[[Engine], Any] = lambda engine: None
) -> tuple[Any, ...]:
    """What several requests get that arrive one after another, and what is left in the cache behind them."""
    common = prompt(70, 1)
    requests = [
        (prompt(60, 2), SamplingParams(temperature=0, max_tokens=90, repetition_penalty=1.4)),
        (common + prompt(3, 3), SamplingParams(seed=1, max_tokens=75)),
        (
            common + prompt(9, 4),
            SamplingParams(0.8, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=2, max_tokens=40),
        ),
        (prompt(20, 5), SamplingParams(seed=3, max_tokens=60, repetition_penalty=1.3, stop=(stop,))),
        (prompt(63, 6), SamplingParams(seed=4, max_tokens=99)),
        (prompt(N_CTX - 9, 7), SamplingParams(seed=5)),  # to the context's end
        (prompt(1, 8), SamplingParams(seed=6, max_tokens=1)),
        (prompt(12, 9), SamplingParams(seed=7, max_tokens=20, logprobs=1)),
        (prompt(64, 10), SamplingParams(temperature=0, max_tokens=30)),
    ]
    hook = Seen()
    engine = Engine(model, EngineOptions(4, 80, 64 * 5, on_shortage=on_shortage, ahead=ahead), hook)
    prepare(engine)
    running: list[Generation] = []
    while len(running) < len(requests) or not engine.idle:
        if len(hook.steps) % 9 == 0 and len(running) < len(requests):
            running.append(engine.start(*requests[len(running)]))
        if len(running) > CANCELLED and running[CANCELLED].n_generated == 11:
            engine.cancel(running[CANCELLED])
        engine.step()
    assert (fused(engine).n_ahead > 40) == ahead
    engine.wait()
    prefix = engine.prefix
    assert prefix is not None
    kept = {
        key: [
            to_numpy(part[entry.block])
            for kv in (*engine.cache.k, *engine.cache.v)
            for part in (kv.values, kv.exponents)
        ]
        for key, entry in prefix._entries.items()
    }
    prefix.clear()
    assert engine.cache.pool.n_free == engine.cache.pool.n_blocks
    answers = [(g.ids, g.end, str(g.error), [(t.text, t.logprob) for t in g.pending]) for g in running]
    return answers, hook.tokens, hook.ends, hook.steps, kept


class LateDevice:
    """A device that does what it is told as late as it may: when its result is waited for, or before other work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self._queue: deque[tuple[Any, Callable[[], None]]] = deque()
        self._in_step = False
        step, model, state = fused(engine), engine.model, fused(engine).state
        self._launched, self._upload, self._launch = step._launched, state._upload, model.ops.kernels.launch
        monkeypatch.setattr(step, "_launched", self.launched)
        monkeypatch.setattr(state, "_upload", self.upload)
        monkeypatch.setattr(model.ops.kernels, "launch", self.launch)
        for copy in (next(step._copies), next(step._copies)):
            monkeypatch.setattr(copy, "wait", partial(self.wait, copy, copy.wait))
            monkeypatch.setattr(copy, "queue", partial(self.copy, copy, copy.queue))
        runner: Any = engine.runner
        monkeypatch.setattr(runner, "_logits", partial(self.other, runner._logits))
        copy_block: Any = engine.cache._copy_block
        monkeypatch.setattr(engine.cache, "_copy_block", partial(self.other, copy_block))

    def launched(self, n: int, trace: Any) -> Any:
        self._in_step = True
        try:
            return self._launched(n, trace)
        finally:
            self._in_step = False

    def launch(self, *given: Any, **named: Any) -> None:
        if self._in_step:
            self._queue.append((None, partial(self._launch, *given, **named)))
        else:
            self.other(self._launch, *given, **named)

    def upload(self, name: str, where: Any, values: np.ndarray) -> None:
        self._queue.append((None, partial(self._upload, name, where, values.copy())))

    def copy(self, copy: Any, queue: Callable[[Any], None], drawn: Any) -> None:
        self._queue.append((copy, partial(queue, drawn)))

    def wait(self, copy: Any, wait: Callable[[int], Any], n: int) -> Any:
        while any(of is copy for of, _ in self._queue):
            self._queue.popleft()[1]()
        return wait(n)

    def other(self, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
        while self._queue:
            self._queue.popleft()[1]()
        return work(*given, **named)


@pytest.mark.parametrize("on_shortage", ["preempt", "fail"])
def test_all_is_the_same_with_and_without(
    on_shortage: str, model: Model, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, texts and ends; what the hook is told of each step; and the cached blocks, bit for bit."""
    params = SamplingParams(seed=3, max_tokens=60, repetition_penalty=1.3)
    stop, n_stopped = stop_within(model, prompt(20, 5), params, 12)
    (*without, kept_without) = served(model, stop, False, on_shortage)
    with monkeypatch.context() as patch:
        late = partial(LateDevice, patch) if place == "host" else lambda engine: None
        (*with_, kept) = served(model, stop, True, on_shortage, late)
    for a, b in zip(with_, without, strict=True):
        assert a == b
    answers, _, ends, steps = with_
    assert (answers[STOPPED][1], len(answers[STOPPED][0]) - 20) == ("stop", n_stopped)
    assert (answers[CANCELLED][1], len(answers[CANCELLED][0])) == ("cancelled", 63 + 11)
    assert {"stop", "length", "cancelled"} <= set(ends)
    assert ("error" in ends, steps[-1][-1] > 0) == (on_shortage == "fail", on_shortage == "preempt")
    assert kept
    assert kept.keys() == kept_without.keys()
    for key, parts in kept.items():
        for part, part_without in zip(parts, kept_without[key], strict=True):
            np.testing.assert_array_equal(part.view(np.uint8), part_without.view(np.uint8))


def launches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each decode step that this engine launches from now on."""
    seen: list[int] = []
    launched = fused(engine)._launched

    def counted(n: int, trace: Any) -> Any:
        seen.append(n)
        return launched(n, trace)

    monkeypatch.setattr(fused(engine), "_launched", counted)
    return seen


def test_the_step_behind_a_stop_leaves_no_trace(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped whole, and others go on from where they are; nobody sees that its logits could not be used."""
    params = SamplingParams(seed=3, max_tokens=60, repetition_penalty=1.3)
    ids = prompt(20, 5)
    stop, n = stop_within(model, ids, params, 12)
    stopping = SamplingParams(seed=3, max_tokens=60, repetition_penalty=1.3, stop=(stop,))
    hook = Seen()
    engine = Engine(model, EngineOptions(2, 80, 512), hook)
    seen = launches(engine, monkeypatch)
    draw, n_spoilt = fused(engine)._sampler.draw, 0

    def spoilt(bucket: int, logits: Any, b: Any) -> None:
        """Behind the last token, the logits are NaN."""
        nonlocal n_spoilt
        if int(b["positions"][0]) == len(ids) + n - 1:
            n_spoilt += 1
            logits[0] = np.nan
        draw(bucket, logits, b)

    monkeypatch.setattr(fused(engine)._sampler, "draw", spoilt)
    for _ in range(2):
        generation = engine.start(ids, stopping)
        tokens = list(engine.tokens(generation))
        assert [token.id for token in tokens] == ids_alone(model, ids, params)[:n]
        assert (generation.end, generation.error, generation.n_generated) == ("stop", None, n)
    assert seen == [1] * 2 * n  # the first token is the prompt's, and one step is dropped
    assert (n_spoilt, fused(engine).n_ahead) == (2, 2 * (n - 2))
    assert len(hook.tokens) == 2 * n
    assert [batch_size for batch_size, *_ in hook.steps] == [1] * 2 * n
    after = SamplingParams(seed=5, max_tokens=9, repetition_penalty=1.3)
    assert [t.id for t in engine.tokens(engine.start(prompt(5, 3), after))] == ids_alone(model, prompt(5, 3), after)


def test_logits_that_cannot_be_used_end_one_sequence_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(seed=i, max_tokens=12, repetition_penalty=1.2) for i in range(2)]
    engine = Engine(model, EngineOptions(2, 80, 512))
    good, bad = (engine.start(prompt(8 + i, i), p) for i, p in enumerate(params))
    draw = fused(engine)._sampler.draw

    def spoilt(bucket: int, logits: Any, b: Any) -> None:
        if bucket == 2 and int(b["positions"][1]) == 14:
            logits[1, 7] = np.nan
        draw(bucket, logits, b)

    monkeypatch.setattr(fused(engine)._sampler, "draw", spoilt)
    while not engine.idle:
        engine.step()
    assert good.ids[8:] == ids_alone(model, prompt(8, 0), params[0])
    assert (good.end, bad.end) == ("length", "error")
    assert "logits[7] is NaN" in str(bad.error)
    assert bad.ids[9:] == ids_alone(model, prompt(9, 1), params[1])[: 14 - 9 + 1]


def test_who_ends_is_left_out_of_the_step_that_is_launched(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled sequence costs the others no step; one that joins does, where its first token is not a prompt's."""
    params = [SamplingParams(seed=i, max_tokens=30) for i in range(3)]
    engine = Engine(model, EngineOptions(3, 80, 1024))
    seen = launches(engine, monkeypatch)
    running = [engine.start(prompt(6, i), p) for i, p in enumerate(params)]
    for _ in range(5):
        engine.step()
    assert seen == [3] * 5  # one of them ahead
    engine.cancel(running[1])
    engine.step()
    assert seen == [3] * 5
    engine.step()
    assert seen == [3] * 5 + [2, 2]
    other = engine.fork(running[0], SamplingParams(seed=9, max_tokens=30))
    engine.step()
    assert seen == [3] * 5 + [2, 2] + [3, 3]  # the fork was not in the step ahead, which is dropped
    while not engine.idle:
        engine.step()
    for i in (0, 2):
        assert running[i].ids[6:] == ids_alone(model, prompt(6, i), params[i])
    assert running[1].ids[6:] == ids_alone(model, prompt(6, 1), params[1])[:5]
    assert other.ids[:13] == running[0].ids[:13]
    assert other.ids != running[0].ids


def test_a_prompt_that_arrives_costs_no_step(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, EngineOptions(2, 16, 1024))
    seen = launches(engine, monkeypatch)
    hook = engine.hook = Seen()
    params = SamplingParams(seed=1, max_tokens=20)
    first = engine.start(prompt(6), params)
    for _ in range(4):
        engine.step()
    second = engine.start(prompt(40, 1), params)
    while not engine.idle:
        engine.step()
    assert len(seen) == sum(1 for batch_size, *_ in hook.steps if batch_size) - 1  # the first prompt's was none
    assert [g.n_generated for g in (first, second)] == [20, 20]
    for g in (first, second):
        assert g.ids[g.n_prompt :] == ids_alone(model, g.ids[: g.n_prompt], params)


def test_no_step_is_launched_behind_the_last(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at max_tokens, nor at the context's end, nor where log-probabilities are wanted."""
    engine = Engine(model, EngineOptions(1, 80, 512))
    seen = launches(engine, monkeypatch)
    cases = (
        (prompt(9), SamplingParams(seed=1, max_tokens=5), 5, 3),
        (prompt(N_CTX - 4), SamplingParams(seed=1), 4, 2),
        (prompt(9), SamplingParams(seed=1, max_tokens=5, logprobs=2), 5, 0),
    )
    for ids, params, n, n_ahead in cases:
        seen.clear()
        before = fused(engine).n_ahead
        assert len(list(engine.tokens(engine.start(ids, params)))) == n
        assert (len(seen), fused(engine).n_ahead - before) == (n - 1, n_ahead)


def test_no_block_is_taken_ahead_that_another_needs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences come to the end of a block together, and there is one block more: the older one goes on."""
    params = [SamplingParams(seed=i, max_tokens=20) for i in range(2)]
    engine = Engine(model, EngineOptions(2, 200, 64 * 3, prefix_cache=False))
    seen = launches(engine, monkeypatch)
    running = [engine.start(prompt(60, i), p) for i, p in enumerate(params)]
    for _ in range(5):
        engine.step()
    assert seen == [2] * 4  # of positions 60 to 63
    assert engine.cache.pool.n_free == 1
    while not engine.idle:
        engine.step()
    assert [g.progress.preemptions for g in running] == [0, 1]
    for i, g in enumerate(running):
        assert g.ids[60:] == ids_alone(model, prompt(60, i), params[i])


def test_after_a_step_that_failed_the_same_request_gets_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(seed=1, max_tokens=8, repetition_penalty=1.2)
    expected = ids_alone(model, prompt(6), params)
    engine = Engine(model, EngineOptions(1, 80, 512))
    launched, n = fused(engine)._launched, 0

    def failing(*given: Any) -> Any:
        nonlocal n
        n += 1
        step = launched(*given)
        if n == 2:
            raise RuntimeError("the device has failed")
        return step

    monkeypatch.setattr(fused(engine), "_launched", failing)
    generation = engine.start(prompt(6), params)
    engine.step()
    with pytest.raises(RuntimeError, match="the device has failed"):
        engine.step()
    assert engine.abort(RefengineError("the device has failed")) == [generation]
    assert [token.id for token in engine.tokens(engine.start(prompt(6), params))] == expected


def test_who_waits_for_the_device_drops_the_step(model: Model) -> None:
    params = SamplingParams(seed=1, max_tokens=8)
    engine = Engine(model, EngineOptions(1, 80, 512))
    generation = engine.start(prompt(6), params)
    for _ in range(3):
        engine.step()
        engine.wait()
        engine.wait()
    list(engine.tokens(generation))
    assert generation.ids[6:] == ids_alone(model, prompt(6), params)
    assert fused(engine).n_ahead == 4  # of seven steps, all but the two behind a wait, and the one behind the prompt


def test_who_is_interrupted_while_waiting_can_go_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(seed=1, max_tokens=12, repetition_penalty=1.2)
    engine = Engine(model, EngineOptions(1, 80, 512))
    generation = engine.start(prompt(6), params)
    for _ in range(4):
        engine.step()

    def interrupted(n: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fused(engine)._ahead.copy, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.wait()
    list(engine.tokens(generation))
    assert generation.ids[6:] == ids_alone(model, prompt(6), params)
