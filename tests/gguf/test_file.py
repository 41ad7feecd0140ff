"""GGUF files that are right: values, tensors, typed access, split files, closing."""

import os
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refengine.errors import GGUFError
from refengine.gguf import cursor as gguf_cursor
from refengine.gguf.cursor import OpenFile
from refengine.gguf.file import GGUFFile, TensorInfo
from refengine.gguf.parse import parse
from tests.gguf_builder import (
    BOOL,
    STRING,
    TENSOR_F16,
    U32,
    GGUFBuilder,
    counting_bytes,
    tiny_builder,
)

SCALARS = {
    "general.architecture": ("string", "tiny"),
    "t.u8": ("uint8", 200),
    "t.i8": ("int8", -100),
    "t.u16": ("uint16", 60_000),
    "t.i16": ("int16", -30_000),
    "t.u32": ("uint32", 4_000_000_000),
    "t.i32": ("int32", -2_000_000_000),
    "t.u64": ("uint64", (1 << 64) - 3),
    "t.i64": ("int64", -(1 << 62)),
    "t.f32": ("float32", 0.15625),
    "t.f64": ("float64", 0.1),
    "t.true": ("bool", True),
    "t.false": ("bool", False),
    "t.empty": ("string", ""),
}
ARRAYS = {
    "a.u8": (np.uint8, [0, 255]),
    "a.i8": (np.int8, [-128, 127, 5]),
    "a.u16": (np.uint16, [65535]),
    "a.i16": (np.int16, [-32768, 32767]),
    "a.u32": (np.uint32, [4_294_967_295, 1]),
    "a.i32": (np.int32, [-2_147_483_648, 7]),
    "a.u64": (np.uint64, [(1 << 64) - 1]),
    "a.i64": (np.int64, [-1, 2]),
    "a.f32": (np.float32, [0.5, -0.25, 3.0]),
    "a.f64": (np.float64, [0.1, 1e300]),
    "a.bool": (np.bool_, [True, False, True]),
    "a.none": (np.int32, []),
}


@pytest.fixture(params=[2, 3])
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> GGUFFile:
    return GGUFFile(tiny_builder(version=request.param).write(tmp_path / "tiny.gguf"))


def test_metadata_scalars_keep_value_and_type(tiny: GGUFFile) -> None:
    for key, (type_name, value) in SCALARS.items():
        assert (tiny.type_name(key), tiny.metadata[key]) == (type_name, value), key
        assert type(tiny.metadata[key]) is type(value), key


def test_metadata_arrays_keep_values_and_dtype(tiny: GGUFFile) -> None:
    for key, (dtype, values) in ARRAYS.items():
        array = tiny.metadata[key]
        assert array.dtype == dtype, key
        assert array.tolist() == values, key
        assert not array.flags.writeable, key
    assert tiny.metadata["a.str"] == ["", "a", "é", "語", "🦙", "zero\0inside"]
    assert tiny.type_name("a.str") == "array of string"


def test_metadata_holds_every_key_in_file_order(tiny: GGUFFile) -> None:
    expected = ["general.architecture", "general.alignment", *list(SCALARS)[1:], *ARRAYS, "a.str"]
    assert list(tiny.metadata) == expected


def test_tensors_have_numpy_shapes_sizes_and_bytes(tmp_path: Path) -> None:
    builder = tiny_builder()
    raw = builder.build()
    (tmp_path / "tiny.gguf").write_bytes(raw)
    file = GGUFFile(tmp_path / "tiny.gguf")
    expected = {
        "vector": (GGMLQuantizationType.F32, (5,), 20),
        "matrix": (GGMLQuantizationType.Q8_0, (3, 64), 3 * 2 * 34),
        "cube.weight": (GGMLQuantizationType.MXFP4, (2, 3, 32), 6 * 17),
        "deep": (GGMLQuantizationType.F16, (2, 1, 3, 4), 48),
    }
    assert file.tensors == {
        name: TensorInfo(name, *rest, shard=0)
        for name, rest in ((n, (t, s, builder.at[f"data:{n}"], b)) for n, (t, s, b) in expected.items())
    }
    assert list(file.tensors) == list(expected)
    for index, (name, (_, _, n_bytes)) in enumerate(expected.items()):
        data = file.data(name)
        assert (data.dtype, data.shape) == (np.dtype(np.uint8), (n_bytes,))
        assert data.tobytes() == counting_bytes(n_bytes, start=7 * index)
        assert not data.flags.writeable


def test_header_fields(tmp_path: Path) -> None:
    path = tiny_builder(version=2).write(tmp_path / "tiny.gguf")
    file = GGUFFile(str(path))
    assert (file.version, file.alignment, file.file_size) == (2, 32, path.stat().st_size)
    assert (file.path, file.paths) == (path, (path,))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_places_the_data(tmp_path: Path, alignment: int) -> None:
    builder = GGUFBuilder(alignment=alignment).pair("general.alignment", U32, alignment)
    builder.tensor("a", [3]).tensor("b", [7], TENSOR_F16)
    file = GGUFFile(builder.write(tmp_path / "a.gguf"))
    assert file.alignment == alignment
    assert file.data("b").tobytes() == counting_bytes(14, start=7)
    assert file.tensors["b"].offset % alignment == 0


def test_data_may_have_gaps_and_another_order(tmp_path: Path) -> None:
    builder = GGUFBuilder().tensor("late", [8], data=bytes(96) + b"L" * 32, offset=96).tensor("early", [8], offset=32)
    file = GGUFFile(builder.write(tmp_path / "a.gguf"))
    assert file.data("late").tobytes() == b"L" * 32
    assert file.tensors["early"].offset < file.tensors["late"].offset


def test_names_at_their_limits_are_accepted(tmp_path: Path) -> None:
    key, name = "k" * 65_535, "é" * 32
    file = GGUFFile(GGUFBuilder().pair(key, BOOL, 1).tensor(name, [1]).write(tmp_path / "a.gguf"))
    assert file.get(key, bool) is True
    assert list(file.tensors) == [name]


@pytest.mark.parametrize("n_tensors", [0, 9_999])
def test_number_of_tensors_at_its_limits_is_accepted(tmp_path: Path, n_tensors: int) -> None:
    builder = GGUFBuilder()
    for index in range(n_tensors):
        builder.tensor(f"t{index}", [1])
    assert len(GGUFFile(builder.write(tmp_path / "a.gguf")).tensors) == n_tensors


def test_file_may_end_with_the_last_tensor_or_go_on(tmp_path: Path) -> None:
    raw = GGUFBuilder().tensor("a", [3]).build()
    for tail in (b"", b"tail"):
        (tmp_path / "a.gguf").write_bytes(raw + tail)
        assert GGUFFile(tmp_path / "a.gguf").data("a").size == 12


def test_known_but_unsupported_tensor_types_are_read(tmp_path: Path) -> None:
    iq2_xxs = int(GGMLQuantizationType.IQ2_XXS)
    path = GGUFBuilder().tensor("a", [2, 256], iq2_xxs, data=bytes(2 * 66)).write(tmp_path / "a.gguf")
    assert GGUFFile(path).tensors["a"].n_bytes == 2 * 66


def test_get_returns_the_value_of_the_kind(tiny: GGUFFile) -> None:
    for key in ("t.u8", "t.i8", "t.u16", "t.i16", "t.u32", "t.i32", "t.u64", "t.i64"):
        assert tiny.get(key, int) == SCALARS[key][1]
    assert tiny.get("t.f32", float) == 0.15625
    assert tiny.get("t.f64", float) == 0.1
    assert tiny.get("t.true", bool) is True
    assert tiny.get("general.architecture", str) == "tiny"
    assert tiny.get("a.str", "strs")[3] == "語"
    assert tiny.get("a.bool", "bools").tolist() == [True, False, True]
    assert tiny.get("a.f32", "floats").tolist() == [0.5, -0.25, 3.0]
    for key in ("a.u8", "a.i8", "a.u16", "a.i16", "a.u32", "a.i32", "a.u64", "a.i64", "a.none"):
        assert tiny.get(key, "ints") is tiny.metadata[key]


def test_get_gives_the_default_only_for_a_missing_key(tiny: GGUFFile) -> None:
    assert tiny.get("absent", int, 7) == 7
    assert tiny.get("absent", "floats", default=None) is None
    assert tiny.get("t.u8", int, default=7) == 200
    with pytest.raises(GGUFError, match="expected float"):
        tiny.get("t.u8", float, default=1.0)


@pytest.mark.parametrize(
    ("key", "kind", "found"),
    [
        ("t.true", int, "bool"),
        ("t.u8", bool, "uint8"),
        ("t.u32", float, "uint32"),
        ("t.f32", int, "float32"),
        ("t.f32", str, "float32"),
        ("general.architecture", int, "string"),
        ("a.u8", int, "array of uint8"),
        ("a.str", str, "array of string"),
        ("t.u8", "ints", "uint8"),
        ("a.bool", "ints", "array of bool"),
        ("a.i32", "floats", "array of int32"),
        ("a.f32", "ints", "array of float32"),
        ("a.f32", "strs", "array of float32"),
        ("a.u8", "bools", "array of uint8"),
    ],
)
def test_get_refuses_another_type(tmp_path: Path, key: str, kind: Any, found: str) -> None:
    builder = tiny_builder()
    path = builder.write(tmp_path / "tiny.gguf")
    wanted = f"array of {kind}" if isinstance(kind, str) else kind.__name__
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path).get(key, kind)
    position = builder.at[f"key:{key}"]
    assert str(caught.value) == f"{path}: key {key!r} is of type {found}; expected {wanted} (byte {position})"


def test_get_names_a_missing_key(tiny: GGUFFile) -> None:
    with pytest.raises(GGUFError, match=r"tiny\.gguf: required key 'llama\.x' is missing; expected int \(byte 24\)"):
        tiny.get("llama.x", int)


def test_errors_of_others_name_file_and_position(tmp_path: Path) -> None:
    builder = tiny_builder()
    file = GGUFFile(builder.write(tmp_path / "tiny.gguf"))
    assert str(file.error("t.u8", "too small")) == f"{file.path}: too small (byte {builder.at['key:t.u8']})"
    assert str(file.tensor_error("deep", "odd")) == f"{file.path}: odd (byte {builder.at['tensor:deep']})"


def test_data_of_an_absent_tensor_is_an_error(tiny: GGUFFile) -> None:
    with pytest.raises(GGUFError, match="no tensor 'nope'"):
        tiny.data("nope")


def test_close_leaves_views_and_metadata_readable(tmp_path: Path) -> None:
    path = tiny_builder().write(tmp_path / "tiny.gguf")
    with GGUFFile(path) as file:
        view = file.data("vector")
    file.close()
    assert view.tobytes() == counting_bytes(20)
    assert file.metadata["a.u16"].tolist() == [65535]
    assert "vector" in file.tensors
    with pytest.raises(ValueError, match="is closed"):
        file.data("vector")


def test_unread_bytes_are_those_of_the_view_in_memory_of_their_own(tiny: GGUFFile) -> None:
    unread, view = tiny.unread("matrix"), tiny.data("matrix")
    assert (unread.shape, unread.nbytes) == (view.shape, view.nbytes)
    for part in (slice(None), slice(3, 200), slice(100, None)):
        assert np.asarray(unread[part]).tobytes() == view[part].tobytes()
    assert np.asarray(unread[10:90][5:20]).tobytes() == view[15:30].tobytes()
    assert np.asarray(unread[90:10]).size == 0
    assert not np.shares_memory(np.asarray(unread), view)
    with pytest.raises(GGUFError, match="no tensor 'nope'"):
        tiny.unread("nope")


def test_file_that_shrinks_is_an_error_with_the_place_and_the_sizes(tmp_path: Path) -> None:
    builder = tiny_builder()
    path = builder.write(tmp_path / "tiny.gguf")
    start = builder.at["data:matrix"]
    with GGUFFile(path) as file:
        os.truncate(path, start + 150)
        unread = file.unread("matrix")
        assert np.asarray(unread[:150]).tobytes() == counting_bytes(150, start=7)
        for part, n, n_wanted, at in ((unread, 150, 204, start), (unread[100:180], 50, 80, start + 100)):
            with pytest.raises(GGUFError) as caught:
                np.asarray(part)
            assert str(caught.value) == (
                f"{path}: the file has shrunk while it was read: "
                f"tensor 'matrix' has {n} bytes, expected {n_wanted} (byte {at})"
            )
    with pytest.raises(ValueError, match="is closed"):
        np.asarray(unread)


@pytest.mark.parametrize("left", [0, 3, 100, 700])
def test_file_that_shrinks_while_its_metadata_is_read_is_an_error(tmp_path: Path, left: int) -> None:
    path = tiny_builder().write(tmp_path / "tiny.gguf")
    file = OpenFile(path)
    os.truncate(path, left)
    with pytest.raises(GGUFError, match=rf"has shrunk while it was read: the metadata has {left} bytes, expected \d+"):
        parse(file)
    file.close()


@pytest.mark.parametrize("window", [1, 7, 8, 9, 50, 333])
def test_metadata_is_the_same_however_much_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    words = ["", *("wörter und Wörter"[:i] for i in range(17)), "x" * 400, "", "語"]
    path = tiny_builder().array("a.words", STRING, words).write(tmp_path / "tiny.gguf")
    expected = GGUFFile(path)
    monkeypatch.setattr(gguf_cursor, "WINDOW_BYTES", window)
    file = GGUFFile(path)
    assert file.get("a.words", "strs") == words
    assert repr(file.metadata) == repr(expected.metadata)
    assert file.tensors == expected.tensors


def test_close_without_views_unmaps_at_once(tmp_path: Path) -> None:
    path = tiny_builder().write(tmp_path / "tiny.gguf")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps: mappings cannot be listed on this system")
    with GGUFFile(path) as file:
        arrays = [value for value in file.metadata.values() if isinstance(value, np.ndarray)]
        assert str(path) in maps.read_text()
    assert str(path) not in maps.read_text()
    assert arrays


def test_a_refused_file_is_unmapped(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny_builder().build()[:-1])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps: mappings cannot be listed on this system")
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    assert str(path) not in maps.read_text()  # while the error, and with it its frames, still lives
    assert caught.value


def write_with_package(path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A file by the `gguf` package's own writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["<s>", "ä", "▁the"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_token_types([3, 1, 1])
    writer.add_add_bos_token(True)
    writer.add_uint64("big", 1 << 40)
    tensors: dict[str, np.ndarray] = {
        "token_embd.weight": rng.standard_normal((3, 64), dtype=np.float32),
        "blk.0.attn_q.weight": rng.standard_normal((5, 7)).astype(np.float16),
        "blk.0.attn_norm.weight": rng.standard_normal(9, dtype=np.float32),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    quantised = gguf.quants.quantize(tensors["token_embd.weight"], GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", quantised, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**tensors, "output.weight": quantised}


def test_files_of_the_gguf_package_are_read(tmp_path: Path) -> None:
    tensors = write_with_package(tmp_path / "w.gguf", np.random.default_rng(0))
    file = GGUFFile(tmp_path / "w.gguf")
    assert file.get("general.architecture", str) == "llama"
    assert file.get("llama.block_count", int) == 3
    assert file.get("llama.attention.layer_norm_rms_epsilon", float) == np.float32(1e-5)
    assert file.get("tokenizer.ggml.tokens", "strs") == ["<s>", "ä", "▁the"]
    assert file.get("tokenizer.ggml.scores", "floats").tolist() == [0.0, -1.0, -2.5]
    assert file.get("tokenizer.ggml.token_type", "ints").tolist() == [3, 1, 1]
    assert file.get("tokenizer.ggml.add_bos_token", bool) is True
    assert file.get("big", int) == 1 << 40
    assert list(file.tensors) == list(tensors)
    assert file.tensors["output.weight"].shape == (3, 64)
    assert file.tensors["output.weight"].type == GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        assert file.data(name).tobytes() == tensor.tobytes(), name


def assert_equal_to_package_reader(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    file = GGUFFile(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        found = file.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), key
    expected = [
        TensorInfo(t.name, t.tensor_type, tuple(t.shape.tolist())[::-1], t.data_offset, t.n_bytes, shard=0)
        for t in reader.tensors
    ]
    assert list(file.tensors.values()) == expected
    for tensor in reader.tensors:
        assert file.data(tensor.name).tobytes() == tensor.data.tobytes(), tensor.name


def test_package_reader_agrees_on_the_tiny_file(tmp_path: Path) -> None:
    assert_equal_to_package_reader(tiny_builder().write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    "name", ["vocab/ggml-vocab-llama-spm.gguf", "vocab/ggml-vocab-phi-3.gguf", "models/stories260K.gguf"]
)
def test_package_reader_agrees_on_real_files(shared_data: Path, name: str) -> None:
    assert_equal_to_package_reader(shared_data / name)


@pytest.mark.parametrize(
    ("name", "n_tokens", "n_merges", "token"),
    [
        ("ggml-vocab-qwen2", 151_936, 151_387, (151_643, "<|endoftext|>")),
        ("ggml-vocab-llama-bpe", 128_256, 280_147, (128_000, "<|begin_of_text|>")),
        ("ggml-vocab-gpt-2", 50_257, 50_000, (50_256, "<|endoftext|>")),
        ("gpt-oss-o200k", 201_088, 199_742, (199_998, "<|startoftext|>")),
    ],
)
def test_large_vocabularies_are_read(
    shared_data: Path, name: str, n_tokens: int, n_merges: int, token: tuple[int, str]
) -> None:
    file = GGUFFile(shared_data / "vocab" / f"{name}.gguf")
    tokens = file.get("tokenizer.ggml.tokens", "strs")
    merges = file.get("tokenizer.ggml.merges", "strs")
    assert (len(tokens), len(merges)) == (n_tokens, n_merges)
    assert tokens[token[0]] == token[1]
    assert all(re.fullmatch(r"\S+ \S+", merge) for merge in merges)
    assert len(file.get("tokenizer.ggml.token_type", "ints")) == n_tokens


def test_builder_writes_what_the_specification_says() -> None:
    raw = GGUFBuilder().pair("k", U32, 7).tensor("t", [2, 3], data=b"x" * 24).build()
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q1sII", 1, b"k", 4, 7)
    index = struct.pack("<Q1sIQQIQ", 1, b"t", 2, 3, 2, 0, 0)
    assert raw == (head + index).ljust(96, b"\0") + b"x" * 24
