"""Models split over several GGUF files: they load as one from any of them; what does not fit together is refused."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from refengine.errors import GGUFError
from refengine.gguf.file import GGUFFile
from tests.gguf_builder import (
    BOOL,
    F32,
    I32,
    STRING,
    TENSOR_Q8_0,
    U16,
    U32,
    U64,
    GGUFBuilder,
    counting_bytes,
)


def shard(index: int, count: int, n_tensors: int, alignment: int = 32) -> GGUFBuilder:
    """A file of a split model, without its tensors; the first has the metadata."""
    builder = GGUFBuilder(alignment=alignment)
    if index == 0:
        builder.pair("general.architecture", STRING, "tiny").array("t.scores", F32, [1.5, 2.5])
    builder.pair("split.no", U16, index).pair("split.count", U16, count).pair("split.tensors.count", I32, n_tensors)
    return builder


def write_split(folder: Path) -> list[Path]:
    """Three files; the second has an alignment of its own, the third a tensor of another type."""
    paths = [folder / f"m-{i + 1:05d}-of-00003.gguf" for i in range(3)]
    shard(0, 3, 4).tensor("a", [4]).tensor("b", [3]).write(paths[0])
    shard(1, 3, 4, alignment=64).pair("general.alignment", U32, 64).tensor("c", [5], data=b"c" * 20).write(paths[1])
    shard(2, 3, 4).tensor("d", [2, 32], TENSOR_Q8_0, data=b"d" * 68).write(paths[2])
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_split_files_load_as_one(tmp_path: Path, given: int) -> None:
    paths = write_split(tmp_path)
    with GGUFFile(paths[given]) as file:
        assert file.path == paths[given]
        assert file.paths == tuple(paths)
        assert [(t.name, t.shard) for t in file.tensors.values()] == [("a", 0), ("b", 0), ("c", 1), ("d", 2)]
        assert file.get("general.architecture", str) == "tiny"
        assert file.get("t.scores", "floats").tolist() == [1.5, 2.5]
        assert file.file_size == sum(path.stat().st_size for path in paths)
        assert file.data("a").tobytes() == counting_bytes(16)
        assert file.data("c").tobytes() == b"c" * 20
        assert file.data("d").tobytes() == b"d" * 68
        assert str(file.tensor_error("c", "bad")).startswith(f"{paths[1]}: bad (byte ")


def test_split_files_of_the_gguf_package_load_as_one(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    tensors = {f"t{i}": np.arange(i + 3, dtype=np.float32) for i in range(5)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m-00002-of-00003.gguf")
    assert len(file.paths) == 3
    assert {name: file.data(name).tobytes() for name in file.tensors} == {n: t.tobytes() for n, t in tensors.items()}


def test_a_whole_file_may_say_that_it_is_one_of_one(tmp_path: Path) -> None:
    file = GGUFFile(shard(0, 1, 1).tensor("a", [1]).write(tmp_path / "any name.gguf"))
    assert list(file.tensors) == ["a"]


def test_a_file_that_only_looks_split_by_name_is_whole(tmp_path: Path) -> None:
    file = GGUFFile(GGUFBuilder().tensor("a", [1]).write(tmp_path / "m-00001-of-00002.gguf"))
    assert len(file.paths) == 1


def test_split_number_may_be_any_integer_type(tmp_path: Path) -> None:
    builder = GGUFBuilder().pair("split.no", U64, 0).pair("split.count", U32, 1)
    assert len(GGUFFile(builder.write(tmp_path / "a.gguf")).paths) == 1


def split_builder(number: int, n_files: int, n_tensors: int, **renamed: tuple[str, int, int]) -> GGUFBuilder:
    """The metadata of a split file; `renamed` replaces a pair: no=(key, type, value)."""
    builder = GGUFBuilder()
    builder.pair(*renamed.get("no", ("split.no", U16, number)))
    builder.pair(*renamed.get("count", ("split.count", U16, n_files)))
    builder.pair(*renamed.get("total", ("split.tensors.count", I32, n_tensors)))
    return builder


def write_pair_of_files(folder: Path, second: GGUFBuilder, first: GGUFBuilder | None = None) -> tuple[Path, Path]:
    paths = folder / "m-00001-of-00002.gguf", folder / "m-00002-of-00002.gguf"
    (first or split_builder(0, 2, 2).tensor("a", [3])).write(paths[0])
    second.write(paths[1])
    return paths


def assert_split_refused(opened: Path, culprit: Path, position: int, words: str) -> None:
    with pytest.raises(GGUFError) as caught:
        GGUFFile(opened)
    message = str(caught.value)
    assert message.startswith(f"{culprit}: "), message
    assert re.search(words, message), message
    assert message.endswith(f" (byte {position})"), message
    maps = Path("/proc/self/maps")
    assert (
        not maps.exists() or str(opened.parent) not in maps.read_text()
    )  # no file stays mapped, the good ones neither


@pytest.mark.parametrize("given", [0, 1])
def test_split_control_is_accepted(tmp_path: Path, given: int) -> None:
    paths = write_pair_of_files(tmp_path, split_builder(1, 2, 2).tensor("b", [3]))
    assert list(GGUFFile(paths[given]).tensors) == ["a", "b"]


@pytest.mark.parametrize(("given", "gone"), [(0, 1), (1, 0)])
def test_split_file_missing_is_refused(tmp_path: Path, given: int, gone: int) -> None:
    second = split_builder(1, 2, 2).tensor("b", [3])
    paths = write_pair_of_files(tmp_path, second)
    paths[gone].unlink()
    words = rf"1 of the 2 files of split\.count are missing, the first is {re.escape(paths[gone].name)}"
    assert_split_refused(paths[given], paths[given], second.at["key:split.count"], words)


@pytest.mark.parametrize("given", [0, 1])
def test_split_file_malformed_is_refused(tmp_path: Path, given: int) -> None:
    second = split_builder(1, 2, 2).tensor("b", [3])
    paths = write_pair_of_files(tmp_path, second)
    paths[1].write_bytes(second.build()[:-1])
    assert_split_refused(paths[given], paths[1], second.at["tensor:b"], r"tensor 'b' lies beyond the file")


def test_split_number_of_another_file_is_refused(tmp_path: Path) -> None:
    second = split_builder(0, 2, 2).tensor("b", [3])
    first_path, second_path = write_pair_of_files(tmp_path, second)
    assert_split_refused(
        first_path, second_path, second.at["key:split.no"], r"split\.no is 0; expected 1 by the file's name"
    )
    assert_split_refused(
        second_path, second_path, second.at["key:split.no"], r"need a file name that ends in '-00001-of-"
    )


def test_split_number_missing_is_refused(tmp_path: Path) -> None:
    second = split_builder(1, 2, 2, no=("other", U16, 1)).tensor("b", [3])
    first_path, second_path = write_pair_of_files(tmp_path, second)
    for opened in (first_path, second_path):
        assert_split_refused(opened, second_path, 24, r"split\.no is missing; expected")


@pytest.mark.parametrize("number", [2, 65_535])
def test_split_number_beyond_the_count_is_refused(tmp_path: Path, number: int) -> None:
    builder = split_builder(number, 2, 1)
    path = builder.write(tmp_path / "m-00001-of-00002.gguf")
    assert_split_refused(path, path, builder.at["key:split.no"], rf"split\.no is {number}; expected 0 to 1")


def test_split_count_that_differs_is_refused(tmp_path: Path) -> None:
    second = split_builder(1, 3, 2).tensor("b", [3])
    first_path, second_path = write_pair_of_files(tmp_path, second)
    assert_split_refused(first_path, second_path, second.at["key:split.count"], r"split\.count is 3; expected 2")
    assert_split_refused(
        second_path, second_path, second.at["key:split.no"], r"need a file name .*-00002-of-00003\.gguf"
    )


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (("split.count", U16, 0), r"split\.count is 0; expected 1 to 65535"),
        (("split.count", I32, -2), r"split\.count is -2; expected 1 to 65535"),
        (("split.count", U64, 1 << 60), r"split\.count is 1152921504606846976; expected 1 to 65535"),
        (("split.count", F32, 2), r"split\.count is of type float32; expected an integer"),
        (("split.count", BOOL, 1), r"split\.count is of type bool; expected an integer"),
        (("split.count", U16, 60_000), r"need a file name that ends in '-00001-of-60000\.gguf'"),
    ],
)
def test_split_count_out_of_range_is_refused(tmp_path: Path, count: tuple[str, int, int], words: str) -> None:
    builder = split_builder(0, 2, 1, count=count)
    path = builder.write(tmp_path / "m-00001-of-00002.gguf")
    position = builder.at["key:split.no" if "need" in words else "key:split.count"]
    assert_split_refused(path, path, position, words)


def test_split_file_under_another_name_is_refused(tmp_path: Path) -> None:
    builder = split_builder(0, 2, 1)
    for name in ("renamed.gguf", "-00001-of-00002.gguf", "m-00001-of-00002.gguf.part", "m-1-of-2.gguf"):
        path = builder.write(tmp_path / name)
        assert_split_refused(
            path, path, builder.at["key:split.no"], r"need a file name that ends in '-00001-of-00002\.gguf'"
        )


@pytest.mark.parametrize("given", [0, 1])
def test_split_tensor_in_two_files_is_refused(tmp_path: Path, given: int) -> None:
    second = split_builder(1, 2, 2).tensor("a", [3])
    paths = write_pair_of_files(tmp_path, second)
    words = r"duplicate tensor 'a': m-00001-of-00002\.gguf has it too"
    assert_split_refused(paths[given], paths[1], second.at["tensor:a"], words)


@pytest.mark.parametrize("total", [0, 1, 3, -1])
def test_split_tensor_count_that_differs_is_refused(tmp_path: Path, total: int) -> None:
    first = split_builder(0, 2, total).tensor("a", [3])
    paths = write_pair_of_files(tmp_path, split_builder(1, 2, 2).tensor("b", [3]), first)
    words = rf"split\.tensors\.count is {total}, but the files together have 2 tensors"
    assert_split_refused(paths[0], paths[0], first.at["key:split.tensors.count"], words)


def test_split_tensors_together_are_limited(tmp_path: Path) -> None:
    builders = [split_builder(i, 2, 10_000) for i in range(2)]
    for index in range(10_000):
        builders[index % 2].tensor(f"t{index}", [1])
    paths = write_pair_of_files(tmp_path, builders[1], builders[0])
    assert_split_refused(paths[0], paths[0], 8, r"number of tensors of all files is 10000; expected at most 9999")
