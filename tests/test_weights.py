"""Weights: a tensor that is missing, extra, wrongly shaped or of an unsupported type is named; what loads is exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import refengine
from refengine.errors import ModelError
from refengine.gguf.file import GGUFFile
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.ops import linear
from refengine.weights import ArrayPlacement, Matrix, TensorSpec, Weights, check_tensors, load_weights, quant_kind
from tests.gguf_builder import STRING, TENSOR_F16, TENSOR_F32, TENSOR_MXFP4, TENSOR_Q8_0, U32, GGUFBuilder
from tests.model_files import float_bytes, read_floats, rewrite
from tools.make_model import write_model

T = GGMLQuantizationType


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A one-layer F32 model of every architecture."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {arch: folder / f"{arch}.gguf" for arch in BY_ARCHITECTURE}
    for arch, path in paths.items():
        write_model(path, arch, "F32", n_layer=1)
    return paths


def load_file(path: Path) -> Weights:
    with GGUFFile(path) as gguf:
        config = read_config(gguf)
        return load_weights(gguf, BY_ARCHITECTURE[config.arch].tensors(config), config.n_layer, ArrayPlacement(np))


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_file(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
def test_each_missing_tensor_is_named(models: dict[str, Path], tmp_path: Path, arch: str) -> None:
    with GGUFFile(models[arch]) as gguf:
        specs = BY_ARCHITECTURE[arch].tensors(read_config(gguf))
        names = list(gguf.tensors)
    optional = [name for name in names if specs[name].optional]
    assert set(optional) <= {"output.weight"}, "the control below expects only a tied output to be optional here"
    for name in names:
        path = rewrite(models[arch], tmp_path / "cut.gguf", tensors={name: None})
        if name in optional:
            load_file(path)
        else:
            assert f"missing {name}" in refused(path)


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
def test_each_wrong_shape_is_named_with_both_shapes(models: dict[str, Path], tmp_path: Path, arch: str) -> None:
    with GGUFFile(models[arch]) as gguf:
        infos = list(gguf.tensors.values())
    for info in infos:
        # One element more along the first axis; of a square matrix, the transpose would not be noticed by shape.
        shape = (info.shape[0] + 1, *info.shape[1:])
        data = float_bytes(np.zeros(shape))
        path = rewrite(models[arch], tmp_path / "odd.gguf", tensors={info.name: (shape, TENSOR_F32, data)})
        found, wanted = ("x".join(map(str, s)) for s in (shape, info.shape))
        assert f"wrongly shaped {info.name}: shape {found}, expected {wanted}" in refused(path)


def test_transposed_matrix_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    up = read_floats(models["llama"], "blk.0.ffn_up.weight")
    tensor = (up.T.shape, TENSOR_F32, float_bytes(up.T))
    path = rewrite(models["llama"], tmp_path / "t.gguf", tensors={"blk.0.ffn_up.weight": tensor})
    assert "blk.0.ffn_up.weight: shape 96x224, expected 224x96" in refused(path)


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.0.attn_norm.scale", "surprise", "output.bias"])
def test_unexpected_tensor_is_named(models: dict[str, Path], tmp_path: Path, arch: str, name: str) -> None:
    tensor = ((3,), TENSOR_F32, float_bytes([1, 2, 3]))
    path = rewrite(models[arch], tmp_path / "extra.gguf", tensors={name: tensor})
    assert f"unexpected {name}" in refused(path)


def test_all_kinds_of_problems_come_in_one_message(models: dict[str, Path], tmp_path: Path) -> None:
    path = rewrite(
        models["qwen2"],
        tmp_path / "many.gguf",
        tensors={
            "blk.0.attn_q.bias": None,
            "odd": ((1,), TENSOR_F32, float_bytes([0])),
            "output_norm.weight": ((2,), TENSOR_F32, float_bytes([0, 0])),
            **{f"extra.{i}": ((1,), TENSOR_F32, float_bytes([0])) for i in range(7)},
        },
    )
    message = refused(path)
    assert "missing blk.0.attn_q.bias" in message
    assert "unexpected odd, extra.0, extra.1, extra.2 and 4 more" in message
    assert "wrongly shaped output_norm.weight: shape 2, expected 96" in message


@pytest.mark.parametrize(
    ("number", "block", "n_bytes", "name"),
    [(16, 256, 66, "IQ2_XXS"), (34, 256, 54, "TQ1_0"), (10, 256, 84, "Q2_K"), (26, 1, 4, "I32"), (28, 1, 8, "F64")],
)
def test_unsupported_type_is_named(tmp_path: Path, number: int, block: int, n_bytes: int, name: str) -> None:
    assert T(number).name == name
    builder = GGUFBuilder().pair("general.architecture", STRING, "llama")
    builder.tensor("blk.0.ffn_up.weight", [3, block], number, bytes(3 * n_bytes))
    path = builder.write(tmp_path / "odd.gguf")
    with GGUFFile(path) as gguf, pytest.raises(ModelError, match=rf"blk\.0\.ffn_up\.weight.*{name}") as caught:
        check_tensors(gguf, {"blk.0.ffn_up.weight": TensorSpec((3, block))})
    assert "Q4_K" in str(caught.value), "the message must list what is supported"


def test_quantised_vector_is_refused(tmp_path: Path) -> None:
    builder = GGUFBuilder().tensor("output_norm.weight", [64], TENSOR_Q8_0)
    specs = {"output_norm.weight": TensorSpec((64,))}
    with (
        GGUFFile(builder.write(tmp_path / "v.gguf")) as gguf,
        pytest.raises(ModelError, match=r"vector output_norm\.weight has type Q8_0"),
    ):
        check_tensors(gguf, specs)


def test_values_and_places(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    norm, bias = rng.normal(size=5).astype(np.float16), rng.normal(size=7).astype(np.float32)
    table = rng.normal(size=(3, 5)).astype(np.float32)
    builder = GGUFBuilder()
    builder.tensor("output_norm.weight", [5], TENSOR_F16, norm.tobytes())
    builder.tensor("blk.1.attn_q.bias", [7], TENSOR_F32, bias.tobytes())
    builder.tensor("blk.1.ffn_up_exps.bias", [3, 5], TENSOR_F32, table.tobytes())
    builder.tensor("blk.0.attn_q.weight", [7, 64], TENSOR_Q8_0)
    builder.tensor("blk.0.ffn_up_exps.weight", [3, 5, 32], TENSOR_MXFP4)
    shapes = {
        "output_norm.weight": (5,),
        "blk.1.attn_q.bias": (7,),
        "blk.1.ffn_up_exps.bias": (3, 5),
        "blk.0.attn_q.weight": (7, 64),
        "blk.0.ffn_up_exps.weight": (3, 5, 32),
    }
    specs = {name: TensorSpec(shape) for name, shape in shapes.items()}
    specs["blk.0.attn_k.bias"] = TensorSpec((2,), optional=True)
    done: list[tuple[int, int]] = []
    with GGUFFile(builder.write(tmp_path / "w.gguf")) as gguf:
        weights = load_weights(gguf, specs, 2, ArrayPlacement(np), lambda *step: done.append(step))
        stored = {name: gguf.data(name).copy() for name in shapes}

    # Vectors and bias tables are floats, exactly the file's values; matrices stay as they are stored.
    np.testing.assert_array_equal(weights.output_norm, norm.astype(np.float32))
    assert weights.output_norm.dtype == np.float32
    np.testing.assert_array_equal(weights.layers[1].attn_q_bias, bias)
    np.testing.assert_array_equal(weights.layers[1].ffn_up_exps_bias, table)
    matrix = weights.layers[0].attn_q
    assert isinstance(matrix, Matrix)
    assert (matrix.name, matrix.type, matrix.shape) == ("blk.0.attn_q.weight", T.Q8_0, (7, 64))
    np.testing.assert_array_equal(matrix.data, stored["blk.0.attn_q.weight"])
    assert weights.layers[0].attn_k_bias is None

    # A row of 64 takes two blocks of 34 bytes; rows of experts follow one another.
    np.testing.assert_array_equal(matrix.rows(2, 4), stored["blk.0.attn_q.weight"][2 * 68 : 4 * 68])
    experts = weights.layers[0].ffn_up_exps
    np.testing.assert_array_equal(experts.rows(9, 11), stored["blk.0.ffn_up_exps.weight"][9 * 17 : 11 * 17])

    total = sum(data.size for data in stored.values())
    assert weights.n_bytes == total
    assert done[-1] == (total, total)
    assert [step for step, _ in done] == sorted({step for step, _ in done})
    assert len(done) == 5


def test_matrices_are_views_of_the_file(models: dict[str, Path]) -> None:
    with GGUFFile(models["llama"]) as gguf:
        config = read_config(gguf)
        weights = load_weights(gguf, BY_ARCHITECTURE["llama"].tensors(config), 1, ArrayPlacement(np))
        assert np.shares_memory(weights.layers[0].ffn_up.data, gguf.data("blk.0.ffn_up.weight"))
        assert not weights.layers[0].ffn_up.data.flags.writeable


def test_tied_output_is_the_embedding(models: dict[str, Path], tmp_path: Path) -> None:
    tied = load_file(models["qwen2"])  # the tiny qwen2 has no output.weight
    assert tied.output is tied.token_embd
    untied_path = tmp_path / "untied.gguf"
    write_model(untied_path, "qwen2", "F32", n_layer=1, tied=False)
    untied = load_file(untied_path)
    assert untied.output is not untied.token_embd
    assert untied.output.name == "output.weight"


def test_products_are_the_matrices_that_a_forward_pass_multiplies_with(models: dict[str, Path], tmp_path: Path) -> None:
    untied_path = tmp_path / "untied.gguf"
    write_model(untied_path, "qwen2", "F32", n_layer=1, tied=False)
    for path in (*models.values(), untied_path):
        model = refengine.load(path, cpu_cache_mb=0)
        used: set[str] = set()
        original = linear.linear

        def spy(xp: Any, x: Any, w: Any, *rest: Any, original: Any = original, used: set[str] = used) -> Any:
            used.add(w.name)
            return original(xp, x, w, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "linear", spy)
            model.forward([1, 2, 3])
        products = [w.name for w in model.weights.products()]
        assert len(products) == len(set(products))
        assert set(products) == used, path.name


def test_gpt_oss_has_no_tied_output(models: dict[str, Path], tmp_path: Path) -> None:
    path = rewrite(models["gpt-oss"], tmp_path / "cut.gguf", tensors={"output.weight": None})
    assert "missing output.weight" in refused(path)


def test_a_name_that_no_architecture_has_is_an_attribute_error(models: dict[str, Path]) -> None:
    weights = load_file(models["llama"])
    with pytest.raises(AttributeError, match="no tensor position_embd"):
        _ = weights.position_embd


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [(None, "Q8_0"), (15, "Q4_K_M"), (7, "Q8_0"), (0, "F32"), (38, "MXFP4"), (1024, "Q8_0"), (999, "Q8_0")],
)
def test_quant_kind_is_the_file_type_or_the_largest_share(tmp_path: Path, file_type: int | None, expected: str) -> None:
    builder = GGUFBuilder()
    if file_type is not None:
        builder.pair("general.file_type", U32, file_type)
    builder.tensor("a", [64]).tensor("b", [64]).tensor("c", [5, 128], TENSOR_Q8_0)  # 2 x 256 against 680 bytes
    with GGUFFile(builder.write(tmp_path / "k.gguf")) as gguf:
        assert quant_kind(gguf) == expected


def test_quant_kind_of_a_file_without_tensors(tmp_path: Path) -> None:
    with GGUFFile(GGUFBuilder().pair("a", U32, 1).write(tmp_path / "n.gguf")) as gguf:
        assert quant_kind(gguf) == "none"
