"""tools/make_model: reproducible to the byte, of the promised types and scales, and accepted by llama.cpp."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType

from refengine.gguf.file import GGUFFile
from refengine.models import BY_ARCHITECTURE
from refengine.quants import SUPPORTED, dequantize
from refengine.validate.llamacpp import LlamaCpp
from tools import model_vocab
from tools.make_model import FULL, IN_LLAMACPP, TINY, main, tiny, write_model, write_spec
from tools.model_specs import PURE, tensors, use_more_bits
from tools.model_weights import CHUNK_BYTES, random_stream, random_tensor

T = GGMLQuantizationType
BLOCK_TYPES = [t for t, f in SUPPORTED.items() if f.block_size > 1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def types_of(path: Path) -> dict[str, T]:
    with GGUFFile(path) as gguf:
        return {name: info.type for name, info in gguf.tensors.items()}


@pytest.mark.parametrize("name", ["llama-f32", "qwen2-q4_k_m", "phi3-q4_k_m", "gpt-oss-mxfp4_moe", "gpt2-bf16"])
def test_same_seed_gives_same_file_and_another_seed_does_not(tmp_path: Path, name: str) -> None:
    first, again, other = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"
    write_spec(first, TINY[name], seed=3)
    write_spec(again, TINY[name], seed=3)
    write_spec(other, TINY[name], seed=4)
    assert sha256(first) == sha256(again)
    assert sha256(first) != sha256(other)
    assert first.stat().st_size == other.stat().st_size


def test_tensor_bytes_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    """Not on the tensors before it: the tied model lacks output.weight, and has another embedding."""
    write_spec(tmp_path / "untied.gguf", TINY["llama-f32"])
    write_spec(tmp_path / "tied.gguf", TINY["llama-f32-tied"])
    with GGUFFile(tmp_path / "untied.gguf") as untied, GGUFFile(tmp_path / "tied.gguf") as tied:
        assert set(untied.tensors) - set(tied.tensors) == {"output.weight"}
        np.testing.assert_array_equal(untied.data("blk.1.ffn_up.weight"), tied.data("blk.1.ffn_up.weight"))
        assert (untied.data("blk.1.ffn_up.weight") != untied.data("blk.2.ffn_up.weight")).any()


# First 8 bytes of the SHA-256 of 512 elements. They may never change: golden files hold the results of these models.
PINNED = {
    "F32": "f2f48726b78d6850",
    "F16": "89557b556ed4ad2b",
    "BF16": "1aa247f8df5a1a89",
    "Q4_0": "47193ce3c78068f4",
    "Q4_1": "2c6c3a87bd2f7e6a",
    "Q5_0": "35f2d173eb025bf9",
    "Q5_1": "f829db1ba25daded",
    "Q8_0": "eeed12a8418b629b",
    "Q4_K": "32d39b2c184fb887",
    "Q5_K": "a81f7c18923d5d84",
    "Q6_K": "e1ecc9e6937cc303",
    "MXFP4": "6720c1c4f3de090b",
}


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_random_tensor_bytes_are_pinned(type_: T) -> None:
    data = b"".join(p.tobytes() for p in random_tensor(random_stream(7, "blk.0.x.weight"), type_, 512, 0.05))
    assert hashlib.sha256(data).hexdigest()[:16] == PINNED[type_.name]


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
@pytest.mark.parametrize("std", [1.0, 0.02])
def test_random_tensor_has_the_wanted_scale_and_no_mean(type_: T, std: float) -> None:
    n = 256 * 1024
    pieces = [p.copy() for p in random_tensor(random_stream(1, "w"), type_, n, std)]
    values = dequantize(np, np.concatenate(pieces), type_, (n,)).astype(np.float64)
    # the sampling error of 2^18 values is 0.2 %; exponents of MXFP4 are mixed to 1/256, scales of Q6_K may be denormal
    assert values.std() == pytest.approx(std, rel=0.02)
    assert abs(values.mean()) < 0.03 * std
    assert len(np.unique(values)) > (18 if type_ == T.MXFP4 else 100)


def test_random_tensor_of_floats_takes_a_mean() -> None:
    (piece,) = random_tensor(random_stream(1, "norm"), T.F32, 4096, 0.1, mean=1.0)
    assert piece.view(np.float32).mean() == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="zero mean"):
        next(random_tensor(random_stream(1, "norm"), T.Q8_0, 64, 0.1, mean=1.0))


@pytest.mark.parametrize("type_", SUPPORTED, ids=lambda t: t.name)
def test_random_tensor_comes_in_small_pieces(type_: T) -> None:
    fmt = SUPPORTED[type_]
    n = 3 * CHUNK_BYTES // fmt.block_bytes // 2 * fmt.block_size
    sizes = [p.size for p in random_tensor(random_stream(1, "w"), type_, n, 1.0)]
    assert max(sizes) <= CHUNK_BYTES
    assert len(sizes) > 1
    assert sum(sizes) == n // fmt.block_size * fmt.block_bytes


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_is_small_and_holds_what_its_name_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    spec = write_spec(path, TINY[name])
    assert path.stat().st_size < 4e6
    with GGUFFile(path) as gguf:
        found = {n: (i.type, i.shape) for n, i in gguf.tensors.items()}
        assert gguf.metadata["general.architecture"] == spec.arch
        assert gguf.metadata["general.file_type"] == spec.file_type
        if spec.vocab != "none":
            assert len(set(gguf.get("tokenizer.ggml.tokens", "strs"))) == spec.n_vocab
    assert found == {t.name: (t.type, t.shape) for t in tensors(spec)}
    kept = ("ffn_gate_inp", "position_embd")
    matrices = {n: t for n, (t, shape) in found.items() if len(shape) > 1 and n.endswith("weight")}
    if spec.type in PURE:
        assert {t.name for n, t in matrices.items() if not any(k in n for k in kept)} == {spec.type}
    others = {t for n, (t, _) in found.items() if n not in matrices or any(k in n for k in kept)}
    assert others == {T.F32}


def test_every_architecture_and_type_has_a_tiny_model() -> None:
    for arch in BY_ARCHITECTURE:
        assert {TINY[f"{arch}-{f.name.lower()}"].type for f in SUPPORTED.values()} == {
            f.name for f in SUPPORTED.values()
        }


def test_qwen2_q4_k_m_is_the_mixture_of_the_real_file(tmp_path: Path) -> None:
    write_spec(tmp_path / "m.gguf", TINY["qwen2-q4_k_m"])
    types = types_of(tmp_path / "m.gguf")
    for layer, more in enumerate([False, False, True]):
        found = {r: types[f"blk.{layer}.{r}.weight"].name for r in ("attn_q", "attn_k", "attn_v", "attn_output")}
        assert found == {
            "attn_q": "Q5_0", "attn_k": "Q5_0", "attn_v": "Q8_0" if more else "Q5_0", "attn_output": "Q5_0"
        }  # fmt: skip
        assert types[f"blk.{layer}.ffn_gate.weight"] == types[f"blk.{layer}.ffn_up.weight"] == T.Q5_0
        assert types[f"blk.{layer}.ffn_down.weight"] == (T.Q6_K if more else T.Q4_K)
    assert types["token_embd.weight"] == T.Q8_0
    assert "output.weight" not in types


def test_phi3_q4_k_m_is_the_mixture_of_the_real_file(tmp_path: Path) -> None:
    write_spec(tmp_path / "m.gguf", TINY["phi3-q4_k_m"])
    types = types_of(tmp_path / "m.gguf")
    assert types["blk.0.attn_qkv.weight"] == T.Q5_K
    assert {types[n] for n in ("blk.0.ffn_up.weight", "blk.0.attn_output.weight", "token_embd.weight")} == {T.Q4_K}
    assert [types[f"blk.{i}.ffn_down.weight"] for i in range(3)] == [T.Q4_K, T.Q4_K, T.Q6_K]
    assert types["output.weight"] == T.Q6_K


def test_gpt_oss_mxfp4_moe_is_the_mixture_of_the_real_file(tmp_path: Path) -> None:
    write_spec(tmp_path / "m.gguf", TINY["gpt-oss-mxfp4_moe"])
    by_type: dict[T, set[str]] = {}
    for name, type_ in types_of(tmp_path / "m.gguf").items():
        by_type.setdefault(type_, set()).add(".".join(name.split(".")[-2:]))
    assert by_type[T.MXFP4] == {"ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"}
    attention = {f"attn_{r}.weight" for r in ("q", "k", "v", "output")}
    assert by_type[T.Q8_0] == {*attention, "token_embd.weight", "output.weight"}
    assert {"ffn_gate_inp.weight", "attn_sinks.weight", "attn_norm.weight", "ffn_down_exps.bias"} <= by_type[T.F32]


def test_mostly_q4_0_head_is_q6_k_or_q8_0(tmp_path: Path) -> None:
    write_spec(tmp_path / "phi3.gguf", TINY["phi3-mostly_q4_0"])
    write_spec(tmp_path / "qwen2.gguf", TINY["qwen2-mostly_q4_0"])
    phi3, qwen2 = types_of(tmp_path / "phi3.gguf"), types_of(tmp_path / "qwen2.gguf")
    assert (phi3["output.weight"], phi3["token_embd.weight"]) == (T.Q6_K, T.Q4_0)
    assert qwen2["token_embd.weight"] == T.Q8_0
    assert phi3["blk.0.attn_qkv.weight"] == qwen2["blk.0.attn_v.weight"] == T.Q4_0


def test_use_more_bits_in_24_layers() -> None:
    assert [i for i in range(24) if use_more_bits(i, 24)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("name", "n_parameters", "file_type"),
    [
        ("qwen2.5-0.5b", 494_032_768, LlamaFileType.MOSTLY_Q4_K_M),
        ("phi-3-mini", 3_821_079_552, LlamaFileType.MOSTLY_Q4_K_M),
        ("phi-3-mini-q4_0", 3_821_079_552, LlamaFileType.MOSTLY_Q4_0),
        ("gpt-oss-20b", 20_914_757_184, LlamaFileType.MOSTLY_MXFP4_MOE),
    ],
)
def test_full_size_models_have_the_published_parameter_counts(
    name: str, n_parameters: int, file_type: LlamaFileType
) -> None:
    assert sum(t.n_elements for t in tensors(FULL[name])) == n_parameters
    assert FULL[name].file_type == file_type


def test_full_size_qwen2_types_by_bytes() -> None:
    by_type = Counter[str]()
    for t in tensors(FULL["qwen2.5-0.5b"]):
        by_type[t.type.name] += t.n_bytes
    assert set(by_type) == {"Q5_0", "Q8_0", "Q4_K", "Q6_K", "F32"}
    assert sum(by_type.values()) == pytest.approx(392e6, rel=0.01)  # the real file has 398 MB with its vocabulary


def test_write_model_takes_overrides(tmp_path: Path) -> None:
    spec = write_model(tmp_path / "m.gguf", "qwen3", "Q5_1", seed=2, n_layer=1, n_ff=64)
    assert (spec.n_layer, spec.n_ff) == (1, 64)
    with GGUFFile(tmp_path / "m.gguf") as gguf:
        assert gguf.tensors["blk.0.ffn_gate.weight"].shape == (64, 96)
        assert "blk.1.ffn_gate.weight" not in gguf.tensors


@pytest.mark.parametrize(
    ("arch", "type_", "overrides", "message"),
    [
        ("bert", "F32", {}, "unknown architecture 'bert'"),
        ("llama", "IQ2_XXS", {}, "unknown type 'IQ2_XXS'"),
        ("llama", "F32", {"n_heads": 4}, "unknown fields"),
        ("llama", "F32", {"n_head": 4}, "4 heads over 3"),
        ("qwen2", "F32", {"head_dim": 32}, "must make n_embd"),
        ("llama", "F32", {"n_expert": 4, "n_expert_used": 2}, "gpt-oss, and only it"),
        ("gpt-oss", "F32", {"n_swa": 0}, "needs a sliding window"),
        ("llama", "F32", {"n_vocab": 100}, "too few"),
        ("llama", "F32", {"vocab": "bert", "n_vocab": 400}, "unknown vocabulary"),
        ("llama", "Q8_0", {"n_ff": 48}, "ffn_down: rows of 48 are no multiple of Q8_0's 32"),
    ],
)
def test_impossible_models_are_refused(
    tmp_path: Path, arch: str, type_: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "m.gguf", arch, type_, **overrides)
    assert not (tmp_path / "m.gguf").exists()


def test_copied_vocabulary_is_the_source_padded(tmp_path: Path) -> None:
    write_spec(tmp_path / "small.gguf", TINY["phi3-f32"])
    spec = tiny("phi3", "Q8_0", n_vocab=450)
    write_spec(tmp_path / "large.gguf", spec, vocab_file=tmp_path / "small.gguf")
    with GGUFFile(tmp_path / "small.gguf") as small, GGUFFile(tmp_path / "large.gguf") as large:
        assert [k for k in small.metadata if k.startswith("tokenizer")] == [
            k for k in large.metadata if k.startswith("tokenizer")
        ]
        old, new = small.get("tokenizer.ggml.tokens", "strs"), large.get("tokenizer.ggml.tokens", "strs")
        assert new == [*old, *(f"[PAD{i}]" for i in range(len(old), 450))]
        for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            assert len(large.metadata[key]) == 450
            assert large.type_name(key) == small.type_name(key)
        assert large.get("tokenizer.ggml.add_bos_token", bool) is True
    with pytest.raises(ValueError, match="416 tokens, more than the model's 415"):
        model_vocab.copied(tmp_path / "small.gguf", 415)


def test_command_writes_a_named_model_with_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    assert main(["gpt2-q8_0", str(path), "--seed", "5", "--set", "n_layer=1", "--set", "tied=false"]) == 0
    assert "m.gguf" in capsys.readouterr().err
    with GGUFFile(path) as gguf:
        assert gguf.metadata["gpt2.block_count"] == 1
        assert "output.weight" in gguf.tensors


def test_command_takes_architecture_and_type(tmp_path: Path) -> None:
    assert main(["llama", "Q5_1", str(tmp_path / "m.gguf")]) == 0
    assert types_of(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == T.Q5_1


def test_command_lists_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FULL, *TINY]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model", "OUT"], "unknown model 'no-such-model'"),
        (["llama", "Q4_K", "OUT", "--set", "n_embd=96"], "no multiple of Q4_K's 256"),
        (["llama-f32", "OUT", "--vocab", "OUT"], "OUT"),
    ],
)
def test_command_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = str(tmp_path / "OUT")
    assert main([out if a == "OUT" else a for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("arguments", [[], ["llama"], ["a", "b", "c", "d"], ["llama-f32", "x", "--set", "n_layers=2"]])
def test_command_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", IN_LLAMACPP)
def test_llama_cpp_evaluates_every_tiny_model(tmp_path: Path, name: str) -> None:
    pytest.importorskip("llama_cpp")
    path = tmp_path / "model.gguf"
    spec = write_spec(path, TINY[name], seed=1)
    ids = np.random.default_rng(0).integers(0, spec.n_vocab, 24).tolist()
    with LlamaCpp(path, n_threads=1) as peer:  # weights as stored, because repacked ones crash some builds
        logits = peer.logits(ids)
    assert logits.shape == (len(ids), spec.n_vocab)
    assert np.isfinite(logits).all()
    assert 2 < logits.std(axis=-1).mean() < 5  # spread as a real model's, and no saturation
    assert len(set(logits.argmax(axis=-1))) > 10  # positions differ


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["llama-f32", "phi3-f32", "llama3-f32", "qwen2-f32", "gpt2-f32", "gpt-oss-f32"])
def test_llama_cpp_tokenizes_with_synthetic_vocabularies(tmp_path: Path, name: str) -> None:
    """Merges really apply, and bytes outside them still round-trip."""
    llama_cpp = pytest.importorskip("llama_cpp")
    write_spec(tmp_path / "model.gguf", TINY[name])
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, vocab_only=True, verbose=False)
    text = "the man and the other one in 1984: naïve ☃".encode()
    try:
        ids = llama.tokenize(text, add_bos=False)
        assert len(ids) < len(text) * 0.8
        assert llama.detokenize(ids).strip() == text
    finally:
        llama.close()
