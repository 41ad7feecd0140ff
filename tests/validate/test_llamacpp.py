"""llama.cpp, live, judged on every small model: no error of its own in any tensor."""

import numpy as np
import pytest

import refengine
from refengine.model import PACKAGED_MODEL
from refengine.validate.capture import LOGITS
from refengine.validate.judge import judge
from tests.model_files import ModelFiles
from tools.make_model import IN_LLAMACPP, TINY

pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
pytestmark = pytest.mark.llamacpp


@pytest.mark.parametrize("name", [*IN_LLAMACPP, "packaged"])
def test_llamacpp_has_no_error_of_its_own(name: str, tiny_model: ModelFiles) -> None:
    from refengine.validate.llamacpp import capture_llamacpp

    path = PACKAGED_MODEL if name == "packaged" else tiny_model(name)
    kv_type = "f32" if name != "packaged" and TINY[name].type == "F32" else "f16"
    model = refengine.load(path, numerics="llamacpp", kv_type=kv_type)
    ids = np.random.default_rng(11).integers(0, model.config.n_vocab, 40).tolist()  # past every sliding window
    capture = capture_llamacpp(path, ids, kv_type=kv_type, n_threads=1)
    verdict = judge(model, capture)
    assert verdict, verdict.first_own_error
    assert LOGITS in {t.name for t in verdict.tensors}
    assert verdict.logits is not None
    # What llama.cpp leaves without a name, or makes as a view only, is covered by the tensor that follows it.
    judged = {t.name for t in verdict.tensors}
    for il in range(model.config.n_layer):
        assert {f"{t}-{il}" for t in ("attn_norm", "kq", "kq_soft_max", "kqv", "kqv_out", "l_out")} <= judged
