"""Layouts of other engines are recognised by their shapes and, where those leave it open, by their values."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from refengine.errors import TraceError
from refengine.validate.alignment import align, part_of, put_into
from refengine.validate.capture import LOGITS
from refengine.validate.judge import AGREES, DIVERGES, judge
from tests.model_files import ModelFiles
from tests.validate.zoo import N_TOKENS, capture, config, load


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "as it is": (lambda x: x, ""),
    "heads merged": (lambda x: x.reshape(len(x), -1), ""),
    "flat": (lambda x: x.ravel(), ""),
    "leading axis of 1": (lambda x: x[None], ""),
    "heads first": (lambda x: x.transpose(1, 0, 2), "axes in the order (1, 0, 2)"),
    "all reversed": (lambda x: x.T, "axes in the order (2, 1, 0)"),
    "columns first, heads merged": (lambda x: x.reshape(len(x), -1).T, "axes in the order (1, 2, 0)"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 4, 6), (4, 4, 4), (7, 4, 4), (1, 4, 6)])
def test_every_layout_of_the_same_values_is_read(layout: str, shape: tuple[int, ...]) -> None:
    ours = values(*shape)
    change, note = LAYOUTS[layout]
    noise = 1 + 1e-3 * np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    theirs, found = align("Qcur-0", change(ours * noise), ours)
    np.testing.assert_array_equal(theirs, ours * noise)
    if shape[0] > 1:  # with one row, several orders are the same
        assert found == note


def test_wrong_values_are_left_in_the_plain_order() -> None:
    """Nothing near in any order: the shape decides, and the judge will speak."""
    theirs = np.random.default_rng(9).standard_normal((4, 4)).astype(np.float32)
    found, note = align("attn_out-0", theirs, values(4, 4))
    np.testing.assert_array_equal(found, theirs)
    assert note == ""


def test_scores_are_cut_to_the_prompt() -> None:
    ours = values(4, 7, 7)
    padded = np.concatenate([ours, np.full((4, 7, 25), 9, np.float32)], axis=2)
    np.testing.assert_array_equal(align("kq-0", padded, ours)[0], ours)


def test_cut_rows_are_the_last_ones_where_rows_may_be_cut() -> None:
    ours = values(7, 12)
    theirs, note = align("ffn_out-1", ours[-2:], ours, rows_cut=True)
    np.testing.assert_array_equal(theirs, ours[-2:])
    assert note == "the last 2 of 7 rows"
    np.testing.assert_array_equal(part_of("ffn_out-1", ours, theirs), ours[-2:])
    np.testing.assert_array_equal(put_into("ffn_out-1", ours * 2, theirs), np.concatenate([ours[:-2] * 2, theirs]))
    scores = values(3, 7, 7)
    assert align("kq-1", scores[:, -1:], scores, rows_cut=True)[0].shape == (3, 1, 7)
    with pytest.raises(TraceError, match="ffn_out-1"):
        align("ffn_out-1", ours[-2:], ours)


CUT = ("attn_out", "ffn_inp", "ffn_norm", "ffn_up", "ffn_gate", "ffn_swiglu", "ffn_out", "l_out")


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_an_engine_that_makes_only_the_last_logits_is_judged(eps: float, tiny_model: ModelFiles) -> None:
    name = "qwen2-q8_0"
    engine, model = load(tiny_model(name), name), load(tiny_model(name), name)
    config(norm_eps=eps)(engine)
    whole, last = capture(engine), model.config.n_layer - 1
    names = {*(f"{n}-{last}" for n in CUT), "result_norm", LOGITS}
    cut = replace(whole, tensors={n: v[-1:] if n in names else v for n, v in whole.tensors.items()})
    verdict = judge(model, cut)
    assert verdict.exit_code == (AGREES if eps == 1e-6 else DIVERGES)
    assert verdict.logits is not None
    assert (len(verdict.logits.kl), verdict.logits.first_position) == (1, N_TOKENS - 1)
    layouts = {t.name: t.layout for t in verdict.tensors}
    assert all(layouts[n] == f"the last 1 of {N_TOKENS} rows" for n in names)
    assert {n for n, layout in layouts.items() if layout} == names
    if eps != 1e-6:
        late = next(t for t in verdict.tensors if t.name == f"ffn_norm-{last}")
        assert late.own_error
        assert late.local.worst[0] == N_TOKENS - 1  # counted in the prompt


def test_heads_first_q_and_transposed_v_agree(tiny_model: ModelFiles) -> None:
    name = "llama-q4_0"
    whole = capture(load(tiny_model(name), name))
    moved = dict(whole.tensors)
    moved["Qcur-0"] = moved["Qcur-0"].transpose(1, 0, 2)
    moved["Vcur-1"] = moved["Vcur-1"].T
    verdict = judge(load(tiny_model(name), name), replace(whole, tensors=moved))
    assert verdict
    assert {t.name: t.layout for t in verdict.tensors if t.layout} == {
        "Qcur-0": "axes in the order (1, 0, 2)",
        "Vcur-1": "axes in the order (1, 0)",
    }


def test_a_flip_between_equals_is_a_tie_and_another_is_not(tiny_model: ModelFiles) -> None:
    """The head has one row twice: which of the two tokens is likeliest is decided by rounding alone."""
    name = "qwen3-f32"
    engine, model = load(tiny_model(name), name), load(tiny_model(name), name)
    likeliest = capture(engine).tensors[LOGITS].argmax(axis=1)
    token, twin = int(likeliest[3]), int(likeliest[3]) + 1
    for loaded in (engine, model):
        data = np.array(loaded.weights.output.data).view(np.float32).reshape(loaded.config.n_vocab, -1)
        data[twin] = data[token]
        loaded.weights.output = replace(loaded.weights.output, data=data.view(np.uint8).reshape(-1))
        loaded.ops.cache = type(loaded.ops.cache)(0)
    whole = capture(engine)
    logits = whole.tensors[LOGITS].copy()
    logits[3, twin] = np.nextafter(logits[3, token], np.float32(np.inf))
    third = int(np.argsort(logits[9])[-3])
    margin = float(logits[9].max() - logits[9, third])
    logits[9, third] = logits[9].max() + 1
    verdict = judge(model, replace(whole, tensors={**whole.tensors, LOGITS: logits}))
    assert verdict.logits is not None
    tie, wrong = verdict.logits.flips
    assert (tie.position, tie.token, tie.reference_token, tie.margin) == (3, twin, token, 0.0)
    assert tie.is_tie
    assert (wrong.position, wrong.token) == (9, third)
    assert wrong.margin == pytest.approx(margin, rel=1e-6)
    assert 0 < wrong.bound < 1e-4  # float32: a millionth of logits that are below 10
    assert not wrong.is_tie
