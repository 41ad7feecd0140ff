"""Mutations of a valid GGUF file, 21,000 in CI: each is refused with a GGUFError, or is read and lies inside the file.

Hypothesis draws the mutations, so a failure is shrunk to the smallest one. Anything but GGUFError (a crash of the
parser, a MemoryError, a UnicodeDecodeError) fails the test. Each kind is a case of its own, so that they spread
over the processes of pytest-xdist.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from refengine.errors import GGUFError
from refengine.gguf.file import GGUFFile
from tests.gguf_builder import BLOCKS, tiny_builder
from tests.levels import in_ci

EXAMPLES_PER_KIND = in_ci(3_500, 500)

BUILDER = tiny_builder(version=3)
BASE = BUILDER.build()
FIELDS = sorted({*BUILDER.at.values()} & {*range(len(BASE) - 8)})  # where lengths, counts, types and offsets lie
FIELDS += [position for field, start in BUILDER.at.items() if field.startswith("value:a.") for position in (start + 4,)]
FIELDS += [start + 8 for field, start in BUILDER.at.items() if field.startswith("ne:")]

INTERESTING = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    13,
    16,
    31,
    32,
    33,
    64,
    65,
    127,
    128,
    255,
    256,
    257,
    4095,
    4096,
    9_999,
    10_000,
]
INTERESTING += [65_535, 65_536, len(BASE), len(BASE) - 1, len(BASE) + 1, 0x03000000]
INTERESTING += [1 << shift for shift in (24, 30, 31, 32, 33, 40, 59, 60, 61, 62, 63)]
INTERESTING += [(1 << bits) - back for bits in (31, 32, 63, 64) for back in (1, 2, 8, 32)]

positions = st.integers(0, len(BASE) - 1)
lengths = st.integers(0, 40)
numbers = st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1))


def flipped(raw: bytes, bits: list[tuple[int, int]]) -> bytes:
    out = bytearray(raw)
    for position, bit in bits:
        out[position % len(out)] ^= 1 << bit
    return bytes(out)


def overwritten(raw: bytes, fields: list[tuple[int, int, int]]) -> bytes:
    """(position, width, number): little-endian integers put over what is there."""
    out = bytearray(raw)
    for position, width, number in fields:
        out[position : position + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(out)


def replaced(raw: bytes, start: int, n_removed: int, new: bytes) -> bytes:
    return raw[:start] + new + raw[start + n_removed :]


def spliced(raw: bytes, source: int, n: int, target: int, n_removed: int) -> bytes:
    """Some of the file's own bytes put over others: fields and strings of the right form in the wrong place."""
    return replaced(raw, target, n_removed, raw[source : source + n])


bit_flips = st.builds(flipped, st.just(BASE), st.lists(st.tuples(positions, st.integers(0, 7)), min_size=1, max_size=4))
fields = st.tuples(st.sampled_from(FIELDS), st.sampled_from([1, 4, 8]), numbers)
integers = st.builds(overwritten, st.just(BASE), st.lists(fields, min_size=1, max_size=3))
any_integers = st.builds(
    overwritten,
    st.just(BASE),
    st.lists(st.tuples(positions, st.sampled_from([1, 2, 4, 8]), numbers), min_size=1, max_size=2),
)
truncations = st.builds(replaced, st.just(BASE), positions, st.just(len(BASE)), st.binary(max_size=12))
insertions = st.builds(replaced, st.just(BASE), positions, lengths, st.binary(max_size=40))
splices = st.builds(spliced, st.just(BASE), positions, lengths, st.one_of(positions, st.sampled_from(FIELDS)), lengths)

MUTATIONS: dict[str, SearchStrategy[bytes]] = {
    "bit-flips": bit_flips,
    "integers-in-fields": integers,
    "integers-anywhere": any_integers,
    "truncations": truncations,
    "insertions": insertions,
    "splices": splices,
}


def check_accepted(file: GGUFFile, file_size: int) -> None:
    """What is read lies inside the file, without overlaps, has the size its shape asks for, and can be read."""
    end_of_last = 0
    for info in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        assert end_of_last <= info.offset
        end_of_last = info.offset + info.n_bytes
        assert end_of_last <= file_size
        assert 1 <= len(info.shape) <= 4
        assert min(info.shape) >= 1
        assert info.offset % file.alignment == 0
        if int(info.type) in BLOCKS:
            elements, n_bytes = BLOCKS[int(info.type)]
            assert info.shape[-1] % elements == 0
            assert info.n_bytes == math.prod(info.shape) // elements * n_bytes
        data = file.data(info.name)
        assert data.shape == (info.n_bytes,)
        int(data.sum())  # touches every byte
    for key, value in file.metadata.items():
        assert 1 <= len(key.encode()) <= 65_535
        assert "\0" not in key
        assert isinstance(value, (bool, int, float, str, np.ndarray, list)), key
        assert not isinstance(value, list) or all(isinstance(text, str) for text in value), key
        if isinstance(value, np.ndarray) and value.dtype == np.bool_:
            assert value.view(np.uint8).max(initial=0) <= 1, key


def read(path: Path, file_size: int) -> str | None:
    """The message that the file is refused with; None if it is read, which is then checked."""
    try:
        file = GGUFFile(path)
    except GGUFError as error:
        return str(error)
    with file:
        check_accepted(file, file_size)
    return None


@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutated_files_give_only_clean_errors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mutated.gguf"
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=EXAMPLES_PER_KIND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(MUTATIONS[kind])
    def read_or_refuse(raw: bytes) -> None:
        path.write_bytes(raw)
        message = read(path, len(raw))
        outcomes["read" if message is None else "refused"] += 1
        assert message is None or re.fullmatch(rf"{re.escape(str(path))}: .+ \(byte \d+\)", message)

    read_or_refuse()
    assert outcomes["read"] + outcomes["refused"] >= EXAMPLES_PER_KIND
    assert outcomes["refused"] > EXAMPLES_PER_KIND // 10  # the mutations do break the file
    assert outcomes["read"] > 0 or kind == "truncations"  # and do not only break it at once
