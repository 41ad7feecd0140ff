"""Grafting: one error's share of what goes wrong at the logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.validate.graft import graft
from refengine.validate.judge import judge
from tests.model_files import ModelFiles
from tests.validate.zoo import capture, layer, load, set_zero, swap

NAME = "qwen2-f32"


def broken_twice(path: Path) -> Any:
    model = load(path, NAME)
    layer(0, set_zero("attn_v_bias"))(model)
    layer(1, swap("ffn_gate", "ffn_up"))(model)
    return model


def test_a_graft_of_the_only_error_gives_the_broken_engines_logits(tiny_model: ModelFiles) -> None:
    path = tiny_model(NAME)
    broken, model = load(path, NAME), load(path, NAME)
    layer(0, set_zero("attn_v_bias"))(broken)
    seen = capture(broken)
    verdict = judge(model, seen)
    found = graft(model, verdict, "Vcur-0")
    assert verdict.logits is not None
    assert found.alone.kl_mean > 1e-6
    # float32 sums on the way: 1e-6 relative in the logits.
    np.testing.assert_allclose(found.alone.kl, verdict.logits.kl, rtol=1e-3, atol=1e-9)
    assert found.others.kl_max == 0.0  # nothing else was wrong


def test_with_two_errors_each_has_its_share(tiny_model: ModelFiles) -> None:
    path = tiny_model(NAME)
    model, seen = load(path, NAME), capture(broken_twice(path))
    verdict = judge(model, seen)
    found = graft(model, verdict, "Vcur-0")
    only_later = load(path, NAME)
    layer(1, swap("ffn_gate", "ffn_up"))(only_later)
    later = judge(model, capture(only_later)).logits
    assert later is not None
    # What is left is what an engine with the later fault alone has, up to the inputs its error was measured on.
    assert found.others.kl_mean == pytest.approx(later.kl_mean, rel=0.5)
    assert found.alone.kl_mean > 1e-6


def test_a_tensor_without_own_error_has_nothing_to_graft(tiny_model: ModelFiles) -> None:
    path = tiny_model(NAME)
    model, seen = load(path, NAME), capture(broken_twice(path))
    with pytest.raises(ValueError, match="result_output has no error"):
        graft(model, judge(model, seen), "result_output")
