"""GGUF files that are wrong: each offence gives one GGUFError with the path, the offence and its byte offset.

Every case runs under tracemalloc: what a file claims must not decide how much is allocated.
"""

import os
import re
import struct
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from refengine.errors import GGUFError
from refengine.gguf.file import GGUFFile
from tests.gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    I8,
    I32,
    STRING,
    TENSOR_F32,
    TENSOR_MXFP4,
    TENSOR_Q4_K,
    TENSOR_Q8_0,
    U8,
    U16,
    U32,
    U64,
    GGUFBuilder,
    patched,
    tiny_builder,
)

MAX_ALLOCATED = 8 << 20  # bytes; no file here is larger than 0.4 MB
HUGE = [1 << 31, 1 << 33, (1 << 61) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1]


@dataclass(frozen=True)
class Case:
    """A malformed file, the byte offset of the offence, and how the error must describe it."""

    raw: bytes
    position: int
    words: str  # regular expression


def refusal(path: Path) -> str:
    """The message that the file is refused with, without its path; nothing large is allocated on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError) as caught:
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert peak < MAX_ALLOCATED
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message.removeprefix(f"{path}: ")


def assert_refused(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(case.raw)
    message = refusal(path)
    assert re.search(case.words, message), message
    assert message.endswith(f" (byte {case.position})"), message


def found_at(builder: GGUFBuilder, field: str, words: str, skip: int = 0) -> Case:
    """The builder's file and 64 more bytes, which a wrong length could take; the offence is `skip` behind `field`."""
    raw = builder.build() + bytes(64)
    return Case(raw, builder.at[field] + skip, words)


def with_patch(field: str, fmt: str, value: int, words: str, skip: int = 0) -> Case:
    """The tiny file with one field overwritten."""
    builder = tiny_builder()
    raw = builder.build()
    return Case(patched(raw, builder.at[field] + skip, fmt, value), builder.at[field] + skip, words)


def with_pair(key: str | bytes, value_type: int, value: bytes, field: str, words: str, skip: int = 0) -> Case:
    """A file with one raw pair behind a good one."""
    return found_at(GGUFBuilder().pair("good", U8, 1).raw_pair(key, value_type, value), field, words, skip)


def with_tensor(shape: list[int], tensor_type: int, field: str, words: str, skip: int = 0, **options: Any) -> Case:
    """A file with one tensor, "bad", behind a good one."""
    builder = GGUFBuilder().tensor("good", [3]).tensor("bad", shape, tensor_type, **options)
    return found_at(builder, f"{field}:bad", words, skip)


def with_alignment(value_type: int, value: int, words: str) -> Case:
    builder = GGUFBuilder().pair("good", U8, 1).pair("general.alignment", value_type, value).tensor("t", [3])
    return found_at(builder, "key:general.alignment", words)


def with_offsets(first: int, second: int, field: str, words: str) -> Case:
    """Two tensors of 64 bytes each at these offsets, in a data section of 192 bytes."""
    return found_at(GGUFBuilder().tensor("one", [16], offset=first).tensor("two", [16], offset=second), field, words)


TINY = tiny_builder().build()
LONG, TOO_LONG = "x" * 200, "k" * 65_536

HEADER = {
    "magic-other": Case(b"GGUX" + TINY[4:], 0, r"bad magic b'GGUX'; expected b'GGUF'"),
    "magic-swapped": Case(b"FUGG" + TINY[4:], 0, r"bad magic.*byte-swapped"),
    "magic-ggjt": Case(b"tjgg" + TINY[4:], 0, r"bad magic.*GGJT.*convert"),
    "magic-git-lfs": Case(b"version https://git-lfs.github.com/spec/v1\n", 0, r"bad magic.*git lfs pull"),
    "magic-short": Case(b"GG", 0, r"ends inside the magic: 4 bytes needed, 2 are left"),
    "version-short": Case(TINY[:6], 4, r"ends inside the version: 4 bytes needed, 2 are left"),
    "version-0": with_patch("version", "I", 0, r"unknown version 0 .*expected 2 or 3"),
    "version-1": with_patch("version", "I", 1, r"version 1 .* not supported"),
    "version-4": with_patch("version", "I", 4, r"unknown version 4 .*expected 2 or 3"),
    "version-max": with_patch("version", "I", 0xFFFFFFFF, r"unknown version 4294967295"),
    "version-swapped-3": with_patch("version", "I", 0x03000000, r"byte-swapped: a big-endian file of version 3"),
    "version-swapped-2": with_patch("version", "I", 0x02000000, r"byte-swapped: a big-endian file of version 2"),
    "tensors-short": Case(TINY[:12], 8, r"ends inside the number of tensors"),
    "keys-short": Case(GGUFBuilder().build()[:20], 16, r"ends inside the number of metadata keys"),
    "tensors-10000": with_patch("n_tensors", "Q", 10_000, r"number of tensors is 10000; expected at most 9999"),
    "tensors-more-than-fit": with_patch("n_tensors", "Q", 9_999, r"number of tensors is 9999.*at least 329967 bytes"),
    "keys-more-than-fit": with_patch("n_keys", "Q", 65_536, r"number of metadata keys is 65536.*at least 917504 bytes"),
    "keys-over-limit": with_patch("n_keys", "Q", 65_537, r"number of metadata keys is 65537; expected at most 65536"),
}
HEADER |= {f"tensors-{n:#x}": with_patch("n_tensors", "Q", n, rf"number of tensors is {n}\b") for n in HUGE}
HEADER |= {f"keys-{n:#x}": with_patch("n_keys", "Q", n, rf"number of metadata keys is {n}\b") for n in HUGE}


def array(element_type: int, n: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", element_type, n) + values


KEYS = {
    "key-empty": with_pair("", U8, b"\1", "key:", r"metadata key 1 is empty"),
    "key-duplicate": found_at(
        GGUFBuilder().pair("a.b", U8, 1).pair("c", U8, 2).pair("a.b", U16, 3),
        "key:a.b#2",
        r"duplicate metadata key 'a\.b', first at byte 24",
    ),
    "key-nul": with_pair("a\0b", U8, b"\1", "key:a\0b", r"metadata key 1, 'a\\x00b', contains NUL"),
    "key-not-utf8": with_pair(b"ab\xff", U8, b"\1", "key:ab\N{REPLACEMENT CHARACTER}", r"key 1 is not valid UTF-8", 10),
    "key-too-long": with_pair(TOO_LONG, U8, b"\1", f"key:{TOO_LONG}", r"length of metadata key 1 is 65536 bytes"),
    "value-type-13": with_pair("k", 13, b"\0", "type:k", r"unknown value type 13 of key 'k'; expected 0 to 12"),
    "value-type-max": with_pair("k", 0xFFFFFFFF, b"\0", "type:k", r"unknown value type 4294967295 of key 'k'"),
    "element-type-13": with_pair("k", ARRAY, array(13, 1), "value:k", r"unknown value type 13 of the elements of key"),
    "nested-array": with_pair(
        "k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")), "value:k", r"key 'k' is a nested array"
    ),
    "nested-array-deep": with_pair("k", ARRAY, array(ARRAY, 1) * 5_000, "value:k", r"key 'k' is a nested array"),
    "nested-array-wide": with_pair("k", ARRAY, array(ARRAY, 1 << 62), "value:k", r"key 'k' is a nested array"),
    "bool-2": with_pair("k", BOOL, b"\2", "value:k", r"key 'k' holds the bool value 2; expected 0 or 1"),
    "bool-255-in-array": with_pair("k", ARRAY, array(BOOL, 3, b"\0\1\xff"), "value:k", r"bool value 255", skip=14),
    "string-not-utf8": with_pair("k", STRING, struct.pack("<Q", 3) + b"a\xc3(", "value:k", r"not valid UTF-8", skip=9),
    "string-surrogate": with_pair("k", STRING, struct.pack("<Q", 3) + b"\xed\xa0\x80", "value:k", r"UTF-8", skip=8),
    "string-cut-code-point": with_pair("k", STRING, struct.pack("<Q", 2) + b"\xe8\xaa", "value:k", r"UTF-8", skip=8),
    "string-overlong": with_pair("k", STRING, struct.pack("<Q", 2) + b"\xc0\x80", "value:k", r"UTF-8", skip=8),
    "element-not-utf8": with_pair(
        "k", ARRAY, array(STRING, 2, struct.pack("<Q1sQ1s", 1, b"a", 1, b"\x80")), "value:k",
        r"element 1 of key 'k' is not valid UTF-8", skip=12 + 9 + 8,
    ),
    "element-beyond-file": with_pair(
        "k", ARRAY, array(STRING, 2, struct.pack("<Q1sQ", 1, b"a", 5_000)), "value:k",
        r"ends inside element 1 of key 'k': 5000 bytes needed", skip=12 + 9 + 8,
    ),
    "element-length-cut": Case(
        GGUFBuilder().raw_pair("k", ARRAY, array(STRING, 1, struct.pack("<Q", 3) + b"abc")).build()[:58],
        24 + 9 + 4 + 12 + 8,
        r"ends inside element 0 of key 'k': 3 bytes needed, 1 are left",
    ),
    "array-more-than-fit": with_pair("k", ARRAY, array(F32, 5_000), "value:k", r"elements of key 'k' is 5000", 4),
    "long-key-is-cut": with_pair(LONG, 13, b"", f"type:{LONG}", r"value type 13 of key 'x{77}'\.\.\.; expected"),
}  # fmt: skip
for n in HUGE:
    KEYS |= {
        f"key-length-{n:#x}": with_patch("key:t.u8", "Q", n, rf"length of metadata key 2 is {n}\b"),
        f"string-length-{n:#x}": with_patch("value:t.empty", "Q", n, rf"length of key 't\.empty' is {n}\b"),
        f"element-length-{n:#x}": with_patch("value:a.str", "Q", n, rf"length of element 0 of .* is {n}\b", skip=12),
        f"numbers-{n:#x}": with_patch("value:a.f64", "Q", n, rf"number of elements of key 'a\.f64' is {n}\b", skip=4),
        f"bools-{n:#x}": with_patch("value:a.bool", "Q", n, rf"number of elements of key 'a\.bool' is {n}\b", skip=4),
        f"strings-{n:#x}": with_patch("value:a.str", "Q", n, rf"number of elements of key 'a\.str' is {n}\b", skip=4),
    }

ALIGNMENT = {
    "alignment-0": with_alignment(U32, 0, r"general\.alignment is 0; expected a power of two"),
    "alignment-4": with_alignment(U32, 4, r"general\.alignment is 4; expected a power of two from 8"),
    "alignment-24": with_alignment(U32, 24, r"general\.alignment is 24; expected a power of two"),
    "alignment-33": with_alignment(U32, 33, r"general\.alignment is 33; expected a power of two"),
    "alignment-2**21": with_alignment(U32, 1 << 21, r"general\.alignment is 2097152; expected .* to 1048576"),
    "alignment-2**31": with_alignment(U32, 1 << 31, r"general\.alignment is 2147483648; expected"),
    "alignment-max": with_alignment(U32, 0xFFFFFFFF, r"general\.alignment is 4294967295; expected"),
    "alignment-u64": with_alignment(U64, 32, r"general\.alignment is of type uint64; expected uint32"),
    "alignment-i32": with_alignment(I32, 32, r"general\.alignment is of type int32; expected uint32"),
    "alignment-string": found_at(
        GGUFBuilder().pair("general.alignment", STRING, "32"), "key:general.alignment", r"is of type string"
    ),
    "alignment-array": found_at(
        GGUFBuilder().array("general.alignment", U32, [32]), "key:general.alignment", r"is of type array of uint32"
    ),
}

TENSORS = {
    "name-empty": found_at(GGUFBuilder().tensor("a", [3]).tensor("", [3]), "tensor:", r"name of tensor 1 is empty"),
    "name-duplicate": found_at(
        GGUFBuilder().tensor("a", [3]).tensor("b", [3]).tensor("a", [5]),
        "tensor:a#2",
        r"duplicate tensor name 'a', first",
    ),
    "name-nul": found_at(
        GGUFBuilder().tensor("a\0b", [3]), "tensor:a\0b", r"name of tensor 0, 'a\\x00b', contains NUL"
    ),
    "name-not-utf8": found_at(
        GGUFBuilder().tensor(b"\xfe", [3]),
        "tensor:\N{REPLACEMENT CHARACTER}",
        r"name of tensor 0 is not valid UTF-8",
        8,
    ),
    "name-65-bytes": found_at(
        GGUFBuilder().tensor("n" * 65, [3]),
        f"tensor:{'n' * 65}",
        r"length of the name of tensor 0 is 65 bytes.*at most 64",
    ),
    "dims-0": with_tensor([], TENSOR_F32, "dims", r"tensor 'bad' has 0 dimensions; expected 1 to 4"),
    "dims-5": with_tensor([1, 1, 1, 1, 2], TENSOR_F32, "dims", r"tensor 'bad' has 5 dimensions; expected 1 to 4"),
    "dims-max": with_tensor([2], TENSOR_F32, "dims", r"has 4294967295 dimensions", n_dims=0xFFFFFFFF),
    "length-0": with_tensor([2, 0], TENSOR_F32, "ne", r"dimension 0 of tensor 'bad' is 0; expected 1 to"),
    "length-0-outer": with_tensor([0, 2], TENSOR_F32, "ne", r"dimension 1 of tensor 'bad' is 0; expected 1 to", skip=8),
    "length-negative": with_tensor([-4, 2], TENSOR_F32, "ne", r"dimension 1 .* \(negative: -4 as int64\)", skip=8),
    "product-wraps-int64": with_tensor([1 << 32, 1 << 31], TENSOR_F32, "ne", r"number of elements .* wraps 64", skip=8),
    "product-wraps-to-0": with_tensor([1 << 32, 1 << 32], TENSOR_F32, "ne", r"number of elements .* wraps 64", skip=8),
    "product-wraps-to-3": with_tensor(
        [(1 << 62) + 1, 1, 4, 3], TENSOR_F32, "ne", r"number of elements .* wraps 64 bits", skip=24
    ),
    "bytes-wrap": with_tensor([1 << 62], TENSOR_F32, "ne", r"size of tensor 'bad' wraps 64 bits"),
    "row-not-divisible": with_tensor([2, 33], TENSOR_Q8_0, "ne", r"have 33 elements, not divisible by .* 32 of Q8_0"),
    "row-too-short": with_tensor([256, 32], TENSOR_Q4_K, "ne", r"have 32 elements, not divisible by .* 256 of Q4_K"),
    "row-of-1": with_tensor([32, 1], TENSOR_MXFP4, "ne", r"have 1 elements, not divisible by .* 32 of MXFP4"),
    "type-removed": with_tensor([32], 4, "dtype", r"unknown tensor type 4 \(removed from ggml\) of tensor 'bad'"),
    "type-unknown": with_tensor([32], 9_999, "dtype", r"unknown tensor type 9999 of tensor 'bad'"),
    "type-max": with_tensor([32], 0xFFFFFFFF, "dtype", r"unknown tensor type 4294967295"),
    "offset-misaligned": with_offsets(0, 65, "offset:two", r"offset 65 of tensor 'two' is misaligned.*multiple of 32"),
    "offset-negative": with_offsets(0, (1 << 64) - 32, "tensor:two", r"tensor 'two' lies beyond the file"),
    "offset-beyond": with_offsets(0, 1 << 20, "tensor:two", r"tensor 'two' lies beyond the file: bytes .* has \d+"),
    "offset-last-byte": with_offsets(0, 160, "tensor:two", r"tensor 'two' lies beyond the file"),
    "overlap": with_offsets(0, 32, "tensor:two", r"tensors 'one' and 'two' overlap"),
    "overlap-same": with_offsets(64, 64, "tensor:two", r"tensors 'one' and 'two' overlap"),
    "overlap-backwards": with_offsets(64, 32, "tensor:one", r"tensors 'two' and 'one' overlap"),
    "data-larger-than-file": with_tensor([1 << 40], TENSOR_F32, "tensor", r"'bad' lies beyond the file: .* file has"),
}
for n in HUGE:
    TENSORS[f"name-length-{n:#x}"] = with_patch("tensor:deep", "Q", n, rf"length of the name of tensor 3 is {n}\b")
for n in (1 << 63, (1 << 64) - 8, (1 << 64) - 1):
    TENSORS[f"length-{n:#x}"] = with_patch("ne:matrix", "Q", n, rf"dimension 1 of tensor 'matrix' is {n}\b", skip=8)


@pytest.mark.parametrize("case", HEADER.values(), ids=HEADER)
def test_bad_header_is_refused(tmp_path: Path, case: Case) -> None:
    assert_refused(tmp_path, case)


@pytest.mark.parametrize("case", KEYS.values(), ids=KEYS)
def test_bad_metadata_is_refused(tmp_path: Path, case: Case) -> None:
    assert_refused(tmp_path, case)


@pytest.mark.parametrize("case", ALIGNMENT.values(), ids=ALIGNMENT)
def test_bad_alignment_is_refused(tmp_path: Path, case: Case) -> None:
    assert_refused(tmp_path, case)


@pytest.mark.parametrize("case", TENSORS.values(), ids=TENSORS)
def test_bad_tensors_are_refused(tmp_path: Path, case: Case) -> None:
    assert_refused(tmp_path, case)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    for length in range(1, len(TINY)):
        path.write_bytes(TINY[:length])
        with pytest.raises(GGUFError, match=r"ends inside|number of|lies beyond the file") as caught:
            GGUFFile(path)
        position = re.search(r" \(byte (\d+)\)$", str(caught.value))
        assert position is not None
        assert int(position[1]) <= length


def test_tiny_file_itself_is_accepted(tmp_path: Path) -> None:
    """The control: what the cases above break is right before."""
    (tmp_path / "tiny.gguf").write_bytes(TINY)
    assert len(GGUFFile(tmp_path / "tiny.gguf").tensors) == 4


@pytest.mark.parametrize(
    ("value_type", "value", "words"),
    [
        (ARRAY, array(I8, 1 << 32), r"number of elements of key 'k' is 4294967296; expected at most 16777216"),
        (STRING, struct.pack("<Q", 1 << 32), r"length of key 'k' is 4294967296 bytes; expected at most 16777216"),
        (
            ARRAY,
            array(STRING, 1, struct.pack("<Q", 1 << 25)),
            r"length of element 0 of key 'k' is 33554432 bytes; expected at most 16777216",
        ),
    ],
    ids=["numbers", "string", "string-in-array"],
)
def test_sizes_that_the_file_could_hold_are_still_limited(
    tmp_path: Path, value_type: int, value: bytes, words: str
) -> None:
    """A sparse file of 8 GB: without limits of their own these would be read into memory."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(GGUFBuilder().raw_pair("k", value_type, value).build())
    os.truncate(path, 8 << 30)
    assert re.search(words, refusal(path))


def test_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    assert refusal(path) == "the file is empty; expected the magic 'GGUF' (byte 0)"


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.gguf") == "cannot open: No such file or directory"


def test_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "is a directory; expected a GGUF file"


def test_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "a.gguf") == "cannot open: Not a directory"


def test_path_with_nul_is_refused() -> None:
    with pytest.raises(GGUFError, match="cannot open: embedded null byte"):
        GGUFFile("a\0b.gguf")


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_builder().write(tmp_path / "secret.gguf")

    def refuse(*_: object) -> int:  # the permission bits do not stop a superuser, who may run the tests
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert refusal(path) == "cannot open: Permission denied"


def test_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    assert refusal(path) == "is not a regular file; expected a GGUF file"
