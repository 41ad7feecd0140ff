"""Generation: why it stops, what text comes out when, that memory comes back, and that chunks do not matter.

A model that says what the test wants stands in where only the loop is in question; its cache and tokenizer are real.
"""

from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refengine.api import generate, load
from refengine.cache.paged import KVCache
from refengine.engine.engine import single_sequence
from refengine.engine.generation import Token
from refengine.engine.sampling import SamplingParams, sample
from refengine.errors import RequestError
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE
from refengine.tokenizer import Tokenizer
from refengine.trace import Tracer, no_trace
from tests.model_files import zeros_of
from tools.make_model import write_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
PROMPT = [10, 11, 12]
EOS = -1  # in a script: the model's end token


class ScriptedModel:
    """Whatever it is fed, its arg-max follows the script. Remembers what it was fed."""

    def __init__(self, tokenizer: Tokenizer | None, script: SequenceOf[int], n_ctx: int = 64) -> None:
        self.vocabulary: Any = tokenizer
        self.config = SimpleNamespace(n_vocab=320)
        self.ops = self.make_runner = None
        self.n_ctx = n_ctx
        self.script = [self._end() if i == EOS else i for i in script]
        self.fed: list[list[int]] = []
        self.rows: list[list[int]] = []
        self.caches: list[KVCache] = []
        self.n_fed = 0
        self.n_prompt = len(PROMPT)

    def _end(self) -> int:
        assert self.vocabulary is not None
        return int(self.vocabulary.eos_id)

    def check_ids(self, ids: SequenceOf[int]) -> None:
        if not ids:
            raise RequestError("the prompt is empty")

    def check_trace(self, trace: Any) -> None:
        pass

    def new_cache(self, n_tokens: int, n_sequences: int = 1) -> KVCache:
        cache = KVCache(
            zeros_of(np.float32), 1, 1, 2, n_ctx=self.n_ctx, n_blocks=KVCache.blocks_for(n_tokens, 4), block_size=4
        )
        self.caches.append(cache)
        return cache

    def evaluate(self, parts: Any, cache: KVCache, rows: Any = None, trace: Tracer = no_trace) -> np.ndarray:
        batch = cache.batch(parts, rows)
        self.fed.append(batch.ids.tolist())
        self.rows.append(batch.rows.tolist())
        self.n_fed += len(batch.ids)
        trace("fed", None, batch.ids)
        logits = np.zeros((len(batch.rows), 320), np.float32)
        index = self.n_fed - self.n_prompt
        if 0 <= index < len(self.script):
            logits[:, self.script[index]] = 5.0
        return logits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("generation")
    for arch in BY_ARCHITECTURE:
        write_model(folder / f"{arch}.gguf", arch, "F32", n_layer=2)
    return {arch: load(folder / f"{arch}.gguf") for arch in BY_ARCHITECTURE}


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, Model]) -> Tokenizer:
    """Byte-level: a token for each byte, so that any code point can be cut anywhere."""
    found = models["qwen2"].tokenizer
    assert found is not None
    return found


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """One id for each byte of the text."""
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    return [by_byte[bytes([b])] for b in text.encode()]


def run(model: Any, params: SamplingParams = GREEDY, **arguments: Any) -> list[Token]:
    engine, generation = single_sequence(model, PROMPT, params, **arguments)
    return list(engine.tokens(generation))


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


# ---- why it stops -------------------------------------------------------------------------------------------------


def test_end_token_stops_and_is_not_printed(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(tokenizer, [*spell(tokenizer, "hi"), EOS, *spell(tokenizer, "never")])
    tokens = run(model)
    assert [token.stop_reason for token in tokens] == [None, None, "eos"]
    assert tokens[-1] == Token(tokenizer.eos_id or 0, "", "eos")
    assert text_of(tokens) == "hi"


def test_max_tokens_stops(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(tokenizer, spell(tokenizer, "abcdefgh"))
    tokens = run(model, SamplingParams(temperature=0, max_tokens=5))
    assert (text_of(tokens), [token.stop_reason for token in tokens]) == ("abcde", [None] * 4 + ["length"])
    assert sum(len(ids) for ids in model.fed) == len(PROMPT) + 4, "the last token needs no forward pass"


def test_end_of_the_context_stops(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(tokenizer, spell(tokenizer, "abcdefgh"), n_ctx=len(PROMPT) + 2)
    tokens = run(model)
    assert (text_of(tokens), tokens[-1].stop_reason) == ("ab", "length")


def test_prompt_that_fills_the_context_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="3 tokens and fills the context of 3"):
        run(ScriptedModel(tokenizer, [], n_ctx=3))


def test_end_token_on_the_last_place_counts_as_the_end(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(tokenizer, [*spell(tokenizer, "ab"), EOS])
    assert run(model, SamplingParams(temperature=0, max_tokens=3))[-1].stop_reason == "eos"


@pytest.mark.parametrize("stop", ["lo w", "o", "hello world", "d"])
def test_stop_string_across_tokens(tokenizer: Tokenizer, stop: str) -> None:
    text = "hello world"
    model = ScriptedModel(tokenizer, [*spell(tokenizer, text), *spell(tokenizer, " and more")])
    tokens = run(model, SamplingParams(temperature=0, stop=(stop,), max_tokens=40))
    assert text_of(tokens) == text[: text.index(stop)]
    assert tokens[-1].stop_reason == "stop"
    assert len(tokens) == text.index(stop) + len(stop), "it stops with the token that completes the string"


def test_text_that_only_began_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, stop=("lly",), max_tokens=4)
    assert text_of(run(ScriptedModel(tokenizer, spell(tokenizer, "hell")), params)) == "hell"
    ended = run(ScriptedModel(tokenizer, [*spell(tokenizer, "ll"), EOS]), params)
    assert [(token.text, token.stop_reason) for token in ended] == [("", None), ("", None), ("ll", "eos")]


def test_stop_string_completed_by_the_last_token_counts_as_stop(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, stop=("lo",), max_tokens=5)
    tokens = run(ScriptedModel(tokenizer, spell(tokenizer, "hello")), params)
    assert (text_of(tokens), tokens[-1].stop_reason) == ("hel", "stop")


def test_stop_string_completed_by_what_was_held_back(tokenizer: Tokenizer) -> None:
    # Half a code point at the end becomes U+FFFD, which completes the stop string only when all is flushed.
    params = SamplingParams(temperature=0, stop=("a\ufffd",), max_tokens=40)
    half = spell(tokenizer, "é")[:1]
    tokens = run(ScriptedModel(tokenizer, [*spell(tokenizer, "xa"), *half, EOS]), params)
    assert (text_of(tokens), tokens[-1].stop_reason) == ("x", "stop")


def test_nothing_comes_after_the_end(tokenizer: Tokenizer) -> None:
    engine, generation = single_sequence(ScriptedModel(tokenizer, [EOS]), PROMPT, GREEDY)
    tokens = engine.tokens(generation)
    assert next(tokens).stop_reason == "eos"
    for iterator in (tokens, engine.tokens(generation)):
        with pytest.raises(StopIteration):
            next(iterator)


# ---- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["né à", "語🦙!", "🦙"])
def test_only_whole_code_points_are_printed(tokenizer: Tokenizer, text: str) -> None:
    ids = spell(tokenizer, text)
    assert len(ids) > len(text)
    tokens = run(ScriptedModel(tokenizer, [*ids, EOS]))
    assert text_of(tokens) == text
    expected = []  # a character comes with the token of its last byte
    for character in text:
        expected += [""] * (len(character.encode()) - 1) + [character]
    assert [token.text for token in tokens[:-1]] == expected


def test_code_point_cut_by_the_end_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    ids = spell(tokenizer, "a🦙")[:3]
    tokens = run(ScriptedModel(tokenizer, [*ids, EOS]))
    assert [token.text for token in tokens] == ["a", "", "", "\ufffd"]
    by_length = run(ScriptedModel(tokenizer, ids), SamplingParams(temperature=0, max_tokens=3))
    assert [(token.text, token.stop_reason) for token in by_length] == [("a", None), ("", None), ("\ufffd", "length")]


def test_control_tokens_are_not_printed(tokenizer: Tokenizer) -> None:
    start = tokenizer.encode("<|im_start|>", parse_special=True)
    assert len(start) == 1
    tokens = run(ScriptedModel(tokenizer, [*spell(tokenizer, "a"), *start, *spell(tokenizer, "b"), EOS]))
    assert text_of(tokens) == "ab"


def test_without_a_vocabulary_there_are_ids_and_no_text() -> None:
    tokens = run(ScriptedModel(None, [7, 8, 9, 7, 7]), SamplingParams(temperature=0, max_tokens=3))
    assert [(token.id, token.text, token.stop_reason) for token in tokens] == [
        (7, "", None),
        (8, "", None),
        (9, "", "length"),
    ]
    with pytest.raises(RequestError, match="stop strings need a vocabulary"):
        run(ScriptedModel(None, []), SamplingParams(stop=("x",)))


# ---- feeding the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "expected"), [(512, [PROMPT]), (2, [[10, 11], [12]]), (1, [[10], [11], [12]])])
def test_prompt_goes_in_chunks_then_token_by_token(tokenizer: Tokenizer, chunk: int, expected: list[list[int]]) -> None:
    script = spell(tokenizer, "abc")
    model = ScriptedModel(tokenizer, [*script, EOS])
    run(model, chunk=chunk)
    assert model.fed == [*expected, *([i] for i in script)]
    inside = len(expected) - 1  # chunks of the prompt that another follows
    asked: list[list[int]] = [[]] * inside + [[len(ids) - 1] for ids in model.fed[inside:]]
    assert model.rows == asked, "only the last row's logits are asked for"


def test_trace_reaches_the_model(tokenizer: Tokenizer) -> None:
    seen: list[str] = []

    def trace(name: str, il: int | None, x: Any, occurrence: int | None = None) -> Any:
        seen.append(name)
        return x

    run(ScriptedModel(tokenizer, [EOS]), trace=trace)
    assert seen == ["fed"]


def test_repetition_penalty_sees_prompt_and_generated_tokens(tokenizer: Tokenizer) -> None:
    class Constant(ScriptedModel):
        def evaluate(self, parts: Any, cache: KVCache, rows: Any = None, trace: Tracer = no_trace) -> np.ndarray:
            super().evaluate(parts, cache, rows, trace)
            logits = np.zeros((1, 320), np.float32)
            logits[0, [10, 30, 31]] = 2.2, 2.0, 1.9  # 10 is in the prompt
            return logits

    params = SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=4)
    assert [token.id for token in run(Constant(tokenizer, []), params)] == [30, 31, 10, 10]


def test_unusable_requests_are_refused_before_the_model_runs(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(tokenizer, [])
    with pytest.raises(RequestError, match="empty"):
        single_sequence(model, [], GREEDY)
    with pytest.raises(RequestError, match="top_k"):
        single_sequence(model, PROMPT, SamplingParams(top_k=321))
    with pytest.raises(RequestError, match="stop"):
        single_sequence(model, PROMPT, SamplingParams(stop=("é" * 40,)))
    assert model.fed == []
    assert model.caches == []


# ---- memory -------------------------------------------------------------------------------------------------------


def test_cache_is_just_large_enough_and_its_blocks_return(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(tokenizer, spell(tokenizer, "abcdefgh"))
    engine, generation = single_sequence(model, PROMPT, SamplingParams(temperature=0, max_tokens=6))
    (cache,) = model.caches
    assert cache.pool.n_blocks == 3  # 3 + 6 positions in blocks of 4
    assert len(list(engine.tokens(generation))) == 6
    assert cache.pool.n_free == cache.pool.n_blocks  # the end gave them back
    engine.free(generation)
    engine.free(generation)
    assert cache.pool.n_free == cache.pool.n_blocks
    with pytest.raises(StopIteration):
        next(engine.tokens(generation))


def test_abandoned_generation_gives_its_blocks_back(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, caches = models["llama"], []
    original = model.new_cache

    def spy(n_tokens: int, n_sequences: int = 1) -> KVCache:
        caches.append(original(n_tokens, n_sequences))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", spy)
    tokens = generate(model, [5, 6, 7], GREEDY)
    next(iter(tokens))
    assert caches[0].pool.n_free < caches[0].pool.n_blocks
    tokens.close()  # type: ignore[attr-defined]  # it is a generator
    assert caches[0].pool.n_free == caches[0].pool.n_blocks


# ---- real models --------------------------------------------------------------------------------------------------


def prompt(n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(31).integers(3, 300, size=n)]


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
@pytest.mark.parametrize("chunk", [7, 1])
def test_chunks_give_the_logits_of_the_whole_prompt(models: dict[str, Model], arch: str, chunk: int) -> None:
    # 71 tokens: more than a cache block of 64, and not a multiple of 7. The bound is the issue's; float32 sums in
    # another order differ by some 1e-7 a layer.
    ids = prompt(71)
    whole = models[arch].forward(ids)
    pieces = models[arch].forward(ids, chunk=chunk)
    assert whole.shape == pieces.shape == (71, models[arch].config.n_vocab)
    assert whole.dtype == np.float32
    assert np.abs(pieces - whole).max() <= 1e-5 * np.abs(whole).max()
    other = models[arch].forward([*ids[:40], ids[40] + 1, *ids[41:]], chunk=chunk)  # control
    assert np.abs(other[:40] - whole[:40]).max() <= 1e-5 * np.abs(whole).max()
    assert (np.abs(other[40:] - whole[40:]).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
def test_generation_is_the_forward_pass_repeated(models: dict[str, Model], arch: str) -> None:
    model, ids = models[arch], prompt(11)
    tokens = list(generate(model, ids, SamplingParams(temperature=0, max_tokens=9)))
    history = list(ids)
    for token in tokens:
        assert token.id == int(model.forward(history)[-1].argmax())
        history.append(token.id)


def test_token_is_drawn_from_its_logits_seed_and_index(models: dict[str, Model]) -> None:
    model, history = models["llama"], prompt(5)
    params = SamplingParams(temperature=1.5, top_k=40, seed=77, max_tokens=9)
    for index, token in enumerate(generate(model, history, params)):
        assert token.id == sample(model.forward(history)[-1], params, history, 77, index)
        history = [*history, token.id]


def test_seed_decides_the_text(models: dict[str, Model]) -> None:
    model = models["qwen2"]

    def ids(seed: int, chunk: int = 512) -> list[int]:
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=24)
        engine, generation = single_sequence(model, prompt(5), params, chunk=chunk)
        return [token.id for token in engine.tokens(generation)]

    assert ids(1) == ids(1) == ids(1, chunk=2)
    assert ids(1) != ids(2)


def test_drawn_seed_is_reported_and_repeats_the_text(models: dict[str, Model]) -> None:
    model = models["qwen2"]
    engine, first = single_sequence(model, prompt(5), SamplingParams(temperature=1.5, max_tokens=12))
    ids = [token.id for token in engine.tokens(first)]
    engine, again = single_sequence(model, prompt(5), SamplingParams(temperature=1.5, max_tokens=12, seed=first.seed))
    assert [token.id for token in engine.tokens(again)] == ids
    _, other = single_sequence(model, prompt(5), SamplingParams())
    assert other.seed != first.seed


def test_forward_refuses_unusable_ids(models: dict[str, Model]) -> None:
    model = models["gpt2"]
    n_vocab = model.config.n_vocab
    for ids, message in (
        ([], "empty"),
        ([0, n_vocab], f"token id {n_vocab} is outside the vocabulary of {n_vocab}"),
        ([-1], "token id -1"),
        ([1] * (model.n_ctx + 1), "the context has 512"),
    ):
        with pytest.raises(RequestError, match=message):
            model.forward(ids)
        with pytest.raises(RequestError, match=message):
            next(iter(generate(model, ids)))
    with pytest.raises(RequestError, match="chunk 0"):
        model.forward([1], chunk=0)
    assert model.forward([0, n_vocab - 1]).shape == (2, n_vocab)
