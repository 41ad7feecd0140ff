"""Dumps of other engines: written from C++, read back; every malformed one refused with words."""

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from refengine.errors import DumpError
from refengine.validate.dump import NameMap, manifest_of, read_dump

ROOT = Path(__file__).resolve().parents[2]

WRITER = r"""
#include "refengine_dump.h"
#include <cstdlib>

int main(int argc, char ** argv) {
    refengine::Dump dump(argv[1], "toy \"engine\"\n\\1", {3, 1, 4}, "ABC0", "f32");
    std::vector<float> q(3 * 2 * 4);
    for (size_t i = 0; i < q.size(); ++i) q[i] = 0.5f * i - 3.0f;
    dump.add("Qcur", 7, q.data(), {3, 2, 4});
    dump.add("Qcur", 7, q.data(), {3, 8}, 0);
    if (argc > 2) std::abort();  // an engine that dies
    const int32_t chosen[] = {2, 0, 1};
    dump.add_raw("ffn_moe_topk", 1, chosen, {3, 1}, "i32", 4);
    dump.add("result_norm", -1, q.data(), {3, 8});
    dump.finish();
}
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("writer")
    (folder / "writer.cpp").write_text(WRITER)
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT / 'refengine' / 'validate'}"]
    subprocess.run([compiler, *flags, "writer.cpp", "-o", "writer"], cwd=folder, check=True)
    return folder / "writer"


def test_what_the_header_writes_is_read(writer: Path, tmp_path: Path) -> None:
    subprocess.run([writer, tmp_path / "d"], check=True)
    dump = read_dump(tmp_path / "d")
    # On one line, whatever it holds: it is shown in a terminal.
    assert (dump.engine, dump.ids, dump.model_sha256) == ('toy "engine" \\1', [3, 1, 4], "abc0")
    assert dump.complete
    q = 0.5 * np.arange(24, dtype=np.float32) - 3
    assert list(dump.tensors) == ["Qcur-7", "Qcur-7#0", "ffn_moe_topk-1", "result_norm"]
    assert np.array_equal(dump.tensors["Qcur-7"], q.reshape(3, 2, 4))
    assert np.array_equal(dump.tensors["result_norm"], q.reshape(3, 8))
    assert dump.tensors["ffn_moe_topk-1"].tolist() == [[2], [0], [1]]


def test_what_a_dying_engine_has_written_is_read_and_said_to_be_incomplete(writer: Path, tmp_path: Path) -> None:
    assert subprocess.run([writer, tmp_path / "d", "die"], check=False, stderr=subprocess.DEVNULL).returncode != 0
    dump = read_dump(tmp_path / "d")
    assert not dump.complete
    assert list(dump.tensors) == ["Qcur-7", "Qcur-7#0"]


def write(folder: Path, *entries: dict[str, Any], **changes: Any) -> Path:
    """A dump whose data.bin holds the float32 numbers 0 to 11."""
    np.arange(12, dtype="<f4").tofile(folder / "data.bin")
    head = {"format": "refengine-dump", "format_version": 1, "engine": "e", "ids": [1, 2]}
    content = {**head, "tensors": list(entries), **changes}
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


def entry(**changes: Any) -> dict[str, Any]:
    full = {"name": "l_out", "layer": 0, "shape": [3, 4], "dtype": "f32", "file": "data.bin", **changes}
    return {k: v for k, v in full.items() if v is not ...}


def test_axis_order_ggml_reverses_the_shape(tmp_path: Path) -> None:
    dump = read_dump(write(tmp_path, entry(shape=[4, 3, 1]), entry(layer=1, axis_order="numpy"), axis_order="ggml"))
    assert dump.tensors["l_out-0"].shape == (1, 3, 4)
    assert np.array_equal(dump.tensors["l_out-0"][0], dump.tensors["l_out-1"])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64", "i32", "i64"])
def test_every_type_of_raw_data(dtype: str, tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0, 3.0]]) if dtype[0] in "fb" else np.array([[1, -2, 3]])
    ways: dict[str, Callable[[], np.ndarray]] = {
        "bf16": lambda: (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
        **{n: partial(values.astype, d) for n, d in {"f16": "f2", "f32": "f4", "f64": "f8", "i32": "i4"}.items()},
    }
    raw = ways.get(dtype, partial(values.astype, "i8"))()
    folder = write(tmp_path, entry(shape=[1, 3], dtype=dtype, file="x.bin", offset=5))
    (tmp_path / "x.bin").write_bytes(b"12345" + raw.tobytes())
    assert np.array_equal(read_dump(folder).tensors["l_out-0"], values)


def test_npy_and_safetensors_files(tmp_path: Path) -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", value)
    save_file({"l_out-1": value + 1, "odd name": value + 2}, tmp_path / "b.safetensors")
    in_safetensors = {"file": "b.safetensors"}
    entries = (entry(file="a.npy"), entry(layer=1, **in_safetensors), entry(layer=2, key="odd name", **in_safetensors))
    tensors = read_dump(write(tmp_path, *entries)).tensors
    for layer in range(3):
        assert np.array_equal(tensors[f"l_out-{layer}"], value + layer)


def test_manifest_of_what_a_trace_has_recorded_is_read_back(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "Qcur-10#0": np.ones((2, 3), np.float32),
        "result_norm": np.zeros((2, 4)),
        "blk-x": np.ones(1, np.int64),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    manifest = manifest_of("refengine", [5, 6], tensors, "t.safetensors", flags={"kv_type": "f16"})
    (tmp_path / "any.json").write_text(json.dumps(manifest))
    dump = read_dump(tmp_path / "any.json")
    assert list(dump.tensors) == list(tensors)
    assert all(np.array_equal(dump.tensors[n], v) for n, v in tensors.items())
    assert dump.flags == {"kv_type": "f16"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, 'expected "format": "refengine-dump"'),
        ({"format_version": 2}, "format_version is 2; this version reads 1"),
        ({"ids": ...}, "'ids' must be list"),
        ({"ids": [1, -2]}, "ids must be token ids"),
        ({"ids": [True]}, "ids must be token ids"),
        ({"engine": 3}, "'engine' must be str, found 3"),
        ({"tensors": {}}, "'tensors' must be list"),
        ({"tensors": [7]}, "tensor entry 0 is not an object"),
        ({"tensors": [entry(), entry()]}, "tensor l_out-0 occurs twice"),
        ({"tensors": [entry(name=...)]}, "tensor entry 0: 'name' must be str, found None"),
        ({"tensors": [entry(name="a\x1b[2Jb")]}, "must be printable"),
        ({"tensors": [entry(name="")]}, "must be printable"),
        ({"tensors": [entry(layer="0")]}, "'layer' must be int or null"),
        ({"tensors": [entry(shape=[3, -4])]}, "shape [3, -4] must be a list of lengths"),
        ({"tensors": [entry(shape=[3, 5])]}, "60 bytes at 0 do not fit data.bin, which has 48"),
        ({"tensors": [entry(shape=[2**40, 2**40])]}, "do not fit data.bin"),
        ({"tensors": [entry(offset=4)]}, "48 bytes at 4 do not fit"),
        ({"tensors": [entry(offset=-4)]}, "bytes at -4"),
        ({"tensors": [entry(dtype="q4_k")]}, "unknown dtype 'q4_k'; known: f32"),
        ({"tensors": [entry(axis_order="fortran")]}, "axis_order 'fortran'"),
        ({"tensors": [entry(file="../x.bin")]}, "outside the dump's folder"),
        ({"tensors": [entry(file="/etc/passwd")]}, "outside the dump's folder"),
        ({"tensors": [entry(file="none.bin")]}, "there is no file 'none.bin'"),
        ({"tensors": [entry(file="manifest.json")]}, "neither .bin, .npy nor .safetensors"),
        ({"tensors": [entry(file="bad.npy")]}, "bad.npy"),
        ({"tensors": [entry(file="bad.safetensors")]}, "bad.safetensors"),
        ({"tensors": [entry(file="pickled.npy")]}, "pickle"),
    ],
)
def test_malformed_dumps_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    for name in ("bad.npy", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"\x93NUMPY garbage")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DumpError) as caught:
        read_dump(write(tmp_path, entry(), **changes))
    assert words in str(caught.value)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "refengine-dump"', "[" * 100_000, "\xff"])
def test_manifests_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DumpError):
        read_dump(tmp_path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="a dump is a folder with manifest"):
        read_dump(tmp_path)


def test_name_map_renames_and_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(
        "- ['layers\\.(\\d+)\\.q', 'Qcur-\\1']\n- ['scratch.*', null]\n- ['(?i)FINAL', result_norm]\n"
    )
    names = NameMap.read(tmp_path / "map.yaml")
    assert [names(n) for n in ("layers.12.q", "scratch-3", "final", "l_out-0")] == [
        "Qcur-12",
        None,
        "result_norm",
        "l_out-0",
    ]
    dump = read_dump(write(tmp_path, entry(name="layers.4.q", layer=None), entry(name="scratch", layer=None)), names)
    assert list(dump.tensors) == ["Qcur-4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a: b}", "rule 0 must be"),
        ("- [a, b, c]", "rule 0 must be"),
        ("- ['(', x]", "rule 0"),
        ("- ['a', '\\1']", "rule 0"),
        ("- [a: ]]", "neither YAML nor JSON"),
    ],
)
def test_malformed_name_maps_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DumpError, match=words):
        NameMap.read(tmp_path / "map.yaml")
