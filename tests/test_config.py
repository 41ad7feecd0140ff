"""`ModelConfig`: every key is checked and named in its error; defaults are llama.cpp's.

Files hold metadata only; the rows of `token_embd` matter in one test.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refengine.config import ModelConfig, Number, RopeConfig, Traits
from refengine.errors import GGUFError, ModelError
from refengine.gguf.file import GGUFFile
from refengine.models import BY_ARCHITECTURE, read_config
from tests.gguf_builder import ARRAY, BOOL, F32, F64, I32, STRING, U32, U64, GGUFBuilder
from tests.model_files import Pair, add_pair

# Small, odd and mutually distinct where they may be. Every key here is required.
COMMON: dict[str, Pair] = {
    "block_count": (U32, 5),
    "embedding_length": (U32, 84),
    "attention.head_count": (U32, 6),
    "context_length": (U32, 77),
    "vocab_size": (U32, 31),
}
DENSE: dict[str, Pair] = {"feed_forward_length": (U32, 43)}
EXPERTS: dict[str, Pair] = {
    "expert_count": (U32, 9),
    "expert_used_count": (U32, 4),
    "expert_feed_forward_length": (U32, 37),
}
WINDOW: dict[str, Pair] = {"attention.sliding_window": (U32, 13)}
RMS: dict[str, Pair] = {"attention.layer_norm_rms_epsilon": (F32, 2.0**-17)}
REQUIRED: dict[str, dict[str, Pair]] = {
    **{arch: COMMON | DENSE | RMS for arch in ("llama", "qwen2", "qwen3", "phi3")},
    "gpt2": COMMON | DENSE | {"attention.layer_norm_epsilon": (F32, 2.0**-17)},
    "gpt-oss": COMMON | RMS | EXPERTS | WINDOW,
}


def required(traits: Traits) -> dict[str, Pair]:
    """The required keys of an architecture that the table does not list."""
    keys = COMMON | ({"attention.layer_norm_epsilon": (F32, 2.0**-17)} if traits.layer_norm else RMS)
    keys |= EXPERTS if traits.experts else DENSE
    keys |= WINDOW if traits.sliding_window else {}
    return keys | {name: (F32, number.high) for name, number in traits.numbers.items() if number.default is None}


for _arch, _module in BY_ARCHITECTURE.items():
    REQUIRED.setdefault(_arch, required(_module.TRAITS))
REQUIRED_KEYS = [(arch, key) for arch, keys in REQUIRED.items() for key in keys]
OPTIONAL_SIZES = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.original_context_length",
)
OPTIONAL_FLOATS = (
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
)


def read(path: Path, arch: str, changes: dict[str, Pair | None] | None = None) -> ModelConfig:
    """The configuration of a file with the required keys of `arch` and these changes (None: without the key)."""
    builder = GGUFBuilder().pair("general.architecture", STRING, arch)
    for key, pair in (REQUIRED[arch] | (changes or {})).items():
        if pair is not None:
            add_pair(builder, f"{arch}.{key}", pair)
    return read_built(path, builder)


def read_built(path: Path, builder: GGUFBuilder) -> ModelConfig:
    with GGUFFile(builder.write(path / "model.gguf")) as gguf:
        return read_config(gguf)


def refused(path: Path, arch: str, key: str, pair: Pair | None, **others: Pair | None) -> str:
    """The message of the error that reading the file with this change raises; it must name the key and the file."""
    changes = {key: pair} | {name.replace("__", "."): value for name, value in others.items()}
    with pytest.raises((GGUFError, ModelError)) as caught:
        read(path, arch, changes)
    message = str(caught.value)
    assert f"{arch}.{key}" in message
    assert "model.gguf" in message
    assert "\n" not in message
    return message


def test_the_table_is_what_the_traits_ask_for() -> None:
    assert {arch: required(module.TRAITS) for arch, module in BY_ARCHITECTURE.items()} == REQUIRED


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3"])
def test_defaults_are_those_of_llamacpp(tmp_path: Path, arch: str) -> None:
    # llama-model.cpp, llama_model_base::load_hparams: n_head_kv = n_head, heads and rotation of n_embd / n_head,
    # base 10000, no scaling, original context = context, attention factor 1; llama-hparams.h: YaRN corners 32 and 1.
    assert read(tmp_path, arch) == ModelConfig(
        arch=arch,
        name="model",
        n_vocab=31,
        n_ctx_train=77,
        n_layer=5,
        n_embd=84,
        n_head=6,
        n_head_kv=6,
        head_dim=14,
        n_ff=43,
        norm_eps=2.0**-17,
        rope=RopeConfig(
            n_rot=14,
            freq_base=10000.0,
            freq_scale=1.0,
            n_ctx_orig=77,
            ext_factor=0.0,
            attn_factor=1.0,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
    )


def test_gpt2_has_no_rotation(tmp_path: Path) -> None:
    config = read(tmp_path, "gpt2")
    assert config.rope is None
    assert (config.n_embd_q, config.n_embd_kv, config.norm_eps) == (84, 84, 2.0**-17)


def test_gpt_oss_slides_on_even_layers_by_default(tmp_path: Path) -> None:
    config = read(tmp_path, "gpt-oss")
    assert (config.n_expert, config.n_expert_used, config.n_ff_exp, config.n_ff) == (9, 4, 37, 0)
    assert config.swa_layers == (True, False, True, False, True)  # openai-moe.cpp: a period of 2
    assert [config.swa_window(il) for il in range(5)] == [13, 0, 13, 0, 13]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ((U32, 3), (True, True, False, True, True)),
        ((U32, 1), (False,) * 5),
        ((U32, 0), (True,) * 5),  # llama_hparams::set_swa_pattern: 0 slides everywhere
        ((ARRAY, (BOOL, [0, 1, 1, 0, 1])), (False, True, True, False, True)),
        ((ARRAY, (I32, [0, 1, 1, 0, 1, 1])), (False, True, True, False, True)),
    ],
)
def test_sliding_pattern_is_a_period_or_a_list(tmp_path: Path, pattern: Pair, expected: tuple[bool, ...]) -> None:
    config = read(tmp_path, "gpt-oss", {"attention.sliding_window_pattern": pattern})
    assert config.swa_layers == expected


@pytest.mark.parametrize(
    "pattern",
    [
        (ARRAY, (BOOL, [1, 0, 1, 0])),  # one short
        (F32, 2.0),
        (STRING, "abcde"),
        (BOOL, 1),
        (ARRAY, (F32, [1.0] * 5)),
        (ARRAY, (STRING, ["1"] * 5)),
        (I32, -1),
    ],
)
def test_bad_sliding_pattern_is_refused(tmp_path: Path, pattern: Pair) -> None:
    refused(tmp_path, "gpt-oss", "attention.sliding_window_pattern", pattern)


def test_phi3_window_is_ignored_as_in_llamacpp(tmp_path: Path) -> None:
    config = read(tmp_path, "phi3", {"attention.sliding_window": (U32, 13)})
    assert config.n_swa == 0
    assert config.swa_window(0) == 0


@pytest.mark.parametrize(("arch", "key"), REQUIRED_KEYS)
def test_missing_key_is_named(tmp_path: Path, arch: str, key: str) -> None:
    refused(tmp_path, arch, key, None)


@pytest.mark.parametrize(("arch", "key"), REQUIRED_KEYS)
def test_ill_typed_key_is_named(tmp_path: Path, arch: str, key: str) -> None:
    is_float = REQUIRED[arch][key][0] == F32
    wrong: list[Pair] = [(STRING, "7"), (BOOL, 1), (U32, 1) if is_float else (F32, 7.0), (ARRAY, (STRING, ["7"] * 5))]
    for pair in wrong:
        assert "expected" in refused(tmp_path, arch, key, pair)


@pytest.mark.parametrize(("arch", "key"), [(a, k) for a, k in REQUIRED_KEYS if REQUIRED[a][k][0] != F32])
@pytest.mark.parametrize("pair", [(U32, 0), (I32, -1), (U64, 2**31), (U64, 2**64 - 1)], ids=["0", "-1", "2^31", "2^64"])
def test_size_out_of_range_is_named(tmp_path: Path, arch: str, key: str, pair: Pair) -> None:
    refused(tmp_path, arch, key, pair)


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
@pytest.mark.parametrize("eps", [float("nan"), float("inf"), float("-inf"), -1e-5, 1.0])
def test_epsilon_out_of_range_is_named(tmp_path: Path, arch: str, eps: float) -> None:
    (key,) = (key for key in REQUIRED[arch] if key.endswith("epsilon"))
    refused(tmp_path, arch, key, (F32, eps))


NUMBERS = Traits(rope="norm", numbers={"logit_scale": Number(1e-3, 8.0), "cap": Number(0.0, 1e9, default=30.0)})


def read_numbers(path: Path, changes: dict[str, Pair | None]) -> ModelConfig:
    """As `read`, of a llama with constants of its own."""
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama")
    for key, pair in (COMMON | DENSE | RMS | changes).items():
        if pair is not None:
            add_pair(builder, f"llama.{key}", pair)
    with GGUFFile(builder.write(path / "model.gguf")) as gguf:
        return ModelConfig.from_gguf(gguf, NUMBERS)


def test_constants_of_one_architecture_are_read_and_checked(tmp_path: Path) -> None:
    assert read_numbers(tmp_path, {"logit_scale": (F32, 0.375)}).numbers == {"logit_scale": 0.375, "cap": 30.0}
    assert read_numbers(tmp_path, {"logit_scale": (F32, 8.0), "cap": (F32, 50.0)}).numbers["cap"] == 50.0
    assert read(tmp_path, "llama", {"logit_scale": (F32, 0.375)}).numbers == {}
    wrong: list[tuple[Pair | None, str]] = [
        (None, "required key 'llama.logit_scale' is missing"),
        ((U32, 1), "expected"),
        ((F32, 9.0), "llama.logit_scale: value 9.0 is outside 0.001..8"),
        ((F32, float("nan")), "value nan is outside"),
    ]
    for pair, message in wrong:
        with pytest.raises((GGUFError, ModelError), match=message):
            read_numbers(tmp_path, {"logit_scale": pair})


def test_huge_layer_count_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    refused(tmp_path, "llama", "block_count", (U32, 2**31))
    refused(tmp_path, "llama", "block_count", (U32, 10_001))


@pytest.mark.parametrize("key", OPTIONAL_SIZES)
def test_optional_size_is_checked(tmp_path: Path, key: str) -> None:
    wrong: list[Pair] = [(U32, 0), (I32, -2), (U64, 2**40), (F32, 2.0), (STRING, "2"), (BOOL, 1)]
    for pair in wrong:
        refused(tmp_path, "qwen3", key, pair)


@pytest.mark.parametrize("key", OPTIONAL_FLOATS)
def test_optional_float_is_checked(tmp_path: Path, key: str) -> None:
    wrong: list[Pair] = [(F32, float("nan")), (F32, float("inf")), (F64, -1e300), (U32, 2), (STRING, "2")]
    for pair in wrong:
        refused(tmp_path, "llama", key, pair)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.freq_base", 0.0),
        ("rope.freq_base", -10.0),
        ("rope.freq_base", 1.0),  # all frequencies equal: YaRN's corners would divide by log(1)
        ("rope.freq_base", 1e-300),  # zero in float32
        ("rope.freq_base", 1e300),  # infinite in float32
        ("rope.scaling.factor", -2.0),
        ("rope.scaling.factor", 1e-310),  # its inverse is infinite
        ("rope.scaling.factor", 1e300),
        ("rope.scale_linear", -2.0),
    ],
)
def test_rope_number_out_of_range_is_named(tmp_path: Path, key: str, value: float) -> None:
    refused(tmp_path, "llama", key, (F64, value), rope__scaling__type=(STRING, "yarn"))


def test_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    builder = GGUFBuilder().pair("general.architecture", STRING, "mamba")
    with pytest.raises(ModelError, match="'mamba' is not supported") as caught:
        read_built(tmp_path, builder)
    assert all(arch in str(caught.value) for arch in BY_ARCHITECTURE)


def test_long_architecture_is_cut_in_the_message(tmp_path: Path) -> None:
    builder = GGUFBuilder().pair("general.architecture", STRING, "x" * 100_000)
    with pytest.raises(ModelError, match="not supported") as caught:
        read_built(tmp_path, builder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("pair", [None, (U32, 1), (ARRAY, (STRING, ["llama"]))])
def test_architecture_must_be_a_string(tmp_path: Path, pair: Pair | None) -> None:
    builder = GGUFBuilder()
    if pair is not None:
        add_pair(builder, "general.architecture", pair)
    with pytest.raises(GGUFError, match=r"general\.architecture"):
        read_built(tmp_path, builder)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_per_layer_values_that_agree_are_taken(tmp_path: Path, key: str) -> None:
    config = read(tmp_path, "llama", {key: (ARRAY, (I32, [3] * 5))})
    field = {"attention.head_count": "n_head", "attention.head_count_kv": "n_head_kv", "feed_forward_length": "n_ff"}
    assert getattr(config, field[key]) == 3


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_per_layer_values_that_differ_are_refused(tmp_path: Path, key: str) -> None:
    wrong: list[tuple[int, list[Any]]] = [
        (I32, [3, 3, 3, 3, 2]),
        (I32, [3, 3, 3, 3]),  # one layer short
        (I32, []),
        (I32, [0] * 5),
        (I32, [-3] * 5),
        (F32, [3.0] * 5),
        (BOOL, [1] * 5),
    ]
    for values in wrong:
        refused(tmp_path, "llama", key, (ARRAY, values))


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length", "vocab_size"])
def test_array_where_there_is_one_value_is_refused(tmp_path: Path, key: str) -> None:
    refused(tmp_path, "llama", key, (ARRAY, (U32, [5] * 5)))


@pytest.mark.parametrize("n_head_kv", [4, 5, 7, 12])
def test_uneven_head_ratio_is_refused(tmp_path: Path, n_head_kv: int) -> None:
    message = refused(tmp_path, "llama", "attention.head_count_kv", (U32, n_head_kv))
    assert f"6 heads cannot share {n_head_kv} kv heads" in message


@pytest.mark.parametrize("n_head_kv", [1, 2, 3, 6])
def test_even_head_ratio_is_taken(tmp_path: Path, n_head_kv: int) -> None:
    config = read(tmp_path, "llama", {"attention.head_count_kv": (U32, n_head_kv)})
    assert (config.n_head_kv, config.n_embd_kv) == (n_head_kv, n_head_kv * 14)


def test_heads_must_divide_the_embedding_unless_their_length_is_given(tmp_path: Path) -> None:
    assert "does not divide" in refused(tmp_path, "llama", "attention.head_count", (U32, 5))
    assert "do not fit" in refused(tmp_path, "llama", "attention.head_count", (U32, 85))
    lengths: dict[str, Pair | None] = {"attention.key_length": (U32, 22), "attention.value_length": (U32, 22)}
    assert read(tmp_path, "llama", {"attention.head_count": (U32, 5), **lengths}).head_dim == 22


def test_k_and_v_heads_must_have_one_length(tmp_path: Path) -> None:
    message = refused(tmp_path, "llama", "attention.value_length", (U32, 12), attention__key_length=(U32, 14))
    assert "K (14) and V (12)" in message


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "qwen3"])
def test_rotation_beyond_the_head_or_odd_is_refused(tmp_path: Path, arch: str) -> None:
    assert "cannot rotate 16 of 14" in refused(tmp_path, arch, "rope.dimension_count", (U32, 16))
    assert "cannot rotate 7 of 14" in refused(tmp_path, arch, "rope.dimension_count", (U32, 7))


def test_llama_must_rotate_whole_heads(tmp_path: Path) -> None:
    # llama-model.cpp: "invalid n_rot", for llama only of the architectures here; phi3 may rotate a part.
    assert "expected the whole head" in refused(tmp_path, "llama", "rope.dimension_count", (U32, 8))
    config = read(tmp_path, "phi3", {"rope.dimension_count": (U32, 8)})
    assert config.rope is not None
    assert config.rope.n_rot == 8


def rope_of(path: Path, changes: dict[str, Pair | None]) -> RopeConfig:
    rope = read(path, "llama", changes).rope
    assert rope is not None
    return rope


def test_scaling_factor_is_inverted_and_has_an_old_name(tmp_path: Path) -> None:
    plain = rope_of(tmp_path, {})
    assert rope_of(tmp_path, {"rope.scaling.factor": (F32, 4.0)}) == replace(plain, freq_scale=0.25)
    assert rope_of(tmp_path, {"rope.scale_linear": (F32, 8.0)}) == replace(plain, freq_scale=0.125)
    both: dict[str, Pair | None] = {"rope.scale_linear": (F32, 8.0), "rope.scaling.factor": (F32, 4.0)}
    assert rope_of(tmp_path, both) == replace(plain, freq_scale=0.25)
    assert rope_of(tmp_path, {"rope.scaling.factor": (F32, 0.0)}) == plain


def test_scaling_types(tmp_path: Path) -> None:
    factor: dict[str, Pair | None] = {"rope.scaling.factor": (F32, 4.0)}
    none = rope_of(tmp_path, factor | {"rope.scaling.type": (STRING, "none")})
    assert (none.freq_scale, none.ext_factor) == (1.0, 0.0)
    yarn = rope_of(
        tmp_path,
        factor | {"rope.scaling.type": (STRING, "yarn"), "rope.scaling.original_context_length": (U32, 19)},
    )
    assert (yarn.freq_scale, yarn.ext_factor, yarn.n_ctx_orig) == (0.25, 1.0, 19)
    longrope = rope_of(tmp_path, {"rope.scaling.type": (STRING, "longrope"), "rope.scaling.attn_factor": (F32, 1.25)})
    assert (longrope.freq_scale, longrope.ext_factor, longrope.attn_factor) == (1.0, 0.0, 1.25)
    message = refused(tmp_path, "llama", "rope.scaling.type", (STRING, "ntk" * 1000))
    assert "known: none, linear, yarn, longrope" in message
    assert len(message) < 1000


def test_other_base_on_sliding_layers_is_refused(tmp_path: Path) -> None:
    assert read(tmp_path, "gpt-oss", {"rope.freq_base_swa": (F32, 10000.0)}).rope is not None
    refused(tmp_path, "gpt-oss", "rope.freq_base_swa", (F32, 5000.0))


def test_experts_only_where_the_architecture_has_them(tmp_path: Path) -> None:
    assert "not supported" in refused(tmp_path, "llama", "expert_count", (U32, 8))
    assert read(tmp_path, "llama", {"expert_count": (U32, 0)}).n_expert == 0
    assert "10 experts used, but there are only 9" in refused(tmp_path, "gpt-oss", "expert_used_count", (U32, 10))
    assert read(tmp_path, "gpt-oss", {"expert_used_count": (U32, 9)}).n_expert_used == 9


def test_vocabulary_gives_its_own_size(tmp_path: Path) -> None:
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama")
    for key, pair in REQUIRED["llama"].items():
        add_pair(builder, f"llama.{key}", pair)
    builder.array("tokenizer.ggml.tokens", STRING, ["a", "b", "c"])
    assert read_built(tmp_path, builder).n_vocab == 3


def test_file_without_vocabulary_or_size_takes_the_embedding_rows(tmp_path: Path) -> None:
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama").tensor("token_embd.weight", [17, 84])
    for key, pair in REQUIRED["llama"].items():
        if key != "vocab_size":
            add_pair(builder, f"llama.{key}", pair)
    assert read_built(tmp_path, builder).n_vocab == 17


def test_ill_typed_vocabulary_is_named(tmp_path: Path) -> None:
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama")
    for key, pair in REQUIRED["llama"].items():
        add_pair(builder, f"llama.{key}", pair)
    builder.array("tokenizer.ggml.tokens", I32, [1, 2, 3])
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.tokens"):
        read_built(tmp_path, builder)


def test_name_is_the_files_or_its_stem(tmp_path: Path) -> None:
    assert read(tmp_path, "llama").name == "model"
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama").pair("general.name", STRING, "Tiny")
    for key, pair in REQUIRED["llama"].items():
        add_pair(builder, f"llama.{key}", pair)
    assert read_built(tmp_path, builder).name == "Tiny"
