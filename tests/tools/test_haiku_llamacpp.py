"""The haiku models in llama.cpp and here: the same greedy text, and every operation on trained weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import refengine
from refengine.cache.paged import CacheSequence, KVCache
from refengine.model import PACKAGED_MODEL
from refengine.validate.llamacpp import LlamaCpp, quantize
from refengine.validate.metrics import nmse
from refengine.validate.replay import replay
from tests.model_files import ModelFiles
from tools.haiku.corpus import Corpus, chat
from tools.haiku.export import FILES, export

pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
pytestmark = pytest.mark.llamacpp

PROMPTS, PER_TEST, TOKENS = 50, 10, 64
# Of one operation on llama.cpp's own inputs, as in test_parity_llamacpp.py; measured here: see the README.
OP_TOLERANCE = 1e-11


@pytest.fixture(scope="session")
def haiku_file(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A function from a name of tools.haiku.export.FILES to the path of that file, made when first wanted."""
    folder = tmp_path_factory.mktemp("haiku")

    def path(name: str) -> Path:
        file = folder / f"{name}.gguf"
        return file if file.exists() else export(name, folder)

    return path


def prompts() -> list[str]:
    requests = Corpus().held_out_requests
    return [requests[i * len(requests) // PROMPTS].prompt for i in range(PROMPTS)]


@pytest.mark.parametrize("group", range(PROMPTS // PER_TEST))
@pytest.mark.parametrize("name", ["haiku-f32", "haiku-experts-f32"])
def test_greedy_text_is_llamacpps(haiku_file: ModelFiles, name: str, group: int) -> None:
    """Sixty-four tokens, going on past the end of the answer, so that a second answer and its request follow."""
    path = haiku_file(name)
    model = refengine.load(path)
    with LlamaCpp(path, kv_type="f32", n_threads=1, capture=False) as peer:
        for prompt in prompts()[group * PER_TEST : (group + 1) * PER_TEST]:
            ids = model.tokenizer.encode(chat(prompt), add_special=False, parse_special=True)
            peer.reset()
            theirs = greedy(lambda new: peer.logits(new, last_only=True)[-1], ids)
            cache, sequence = model.new_cache(len(ids) + TOKENS), CacheSequence()

            def ours(new: list[int], cache: KVCache = cache, sequence: CacheSequence = sequence) -> np.ndarray:
                return model.step([(sequence, new)], cache)[-1]

            assert model.tokenizer.decode(greedy(ours, ids)) == model.tokenizer.decode(theirs), prompt


def greedy(logits_of: Callable[[list[int]], np.ndarray], ids: list[int]) -> list[int]:
    """TOKENS ids, each the likeliest after those before it, whatever it is."""
    made: list[int] = []
    new = ids
    for _ in range(TOKENS):
        new = [int(np.argmax(logits_of(new)))]
        made += new
    return made


@pytest.mark.parametrize("name", FILES)
def test_every_operation_on_trained_weights_is_llamacpps(haiku_file: ModelFiles, name: str) -> None:
    path = haiku_file(name)
    kv_type = "f32" if name.endswith("f32") else "f16"
    model = refengine.load(path, numerics="llamacpp", kv_type=kv_type)
    ids = model.tokenizer.encode(chat(prompts()[0]) + "the moon\n", add_special=False, parse_special=True)
    with LlamaCpp(path, kv_type=kv_type, n_threads=1) as peer:
        _, tensors = peer.tensors(ids)
    _, compared = replay(model, ids, tensors)
    assert len(compared) > 60
    worst = max(compared, key=lambda tensor: nmse(*compared[tensor]))
    assert nmse(*compared[worst]) <= OP_TOLERANCE, worst


def test_quantiser_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(refengine.RefengineError, match=r"text\.gguf: llama\.cpp cannot quantise"):
        quantize(tmp_path / "text.gguf", tmp_path / "out.gguf", FILES["haiku-q8_0"][1])


def test_export_reproduces_the_packaged_file(haiku_file: ModelFiles) -> None:
    """Its metadata, types and shapes; and its values, but for what another compiler's float32 may round otherwise."""
    made, packaged = (refengine.load(path) for path in (haiku_file("haiku-q4_k_m"), PACKAGED_MODEL))
    assert list(made.gguf.metadata) == list(packaged.gguf.metadata)
    assert {n: (t.type, t.shape) for n, t in made.gguf.tensors.items()} == {
        n: (t.type, t.shape) for n, t in packaged.gguf.tensors.items()
    }
    ids = made.tokenizer.encode(chat(prompts()[1]), add_special=False, parse_special=True)
    assert nmse(made.forward(ids), packaged.forward(ids)) < 1e-4  # far below quantisation's own 1e-2
