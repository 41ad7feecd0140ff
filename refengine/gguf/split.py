"""Split models: finds the files that belong together, and checks that they fit.

llama.cpp splits a model into files named `NAME-00001-of-0000N.gguf` that contain `split.no` (from 0), `split.count` and
`split.tensors.count` (the tensors of all files); see its `src/llama-model-loader.cpp` and `tools/gguf-split`. The
first file has all metadata, the others only tensors. Each file has its own data section and its own alignment.
llama.cpp needs the path of the first file; here any of the files can be given.
"""

import contextlib
import os
import re
from pathlib import Path

from refengine.gguf.cursor import malformed, quoted
from refengine.gguf.parse import INTEGER_TYPES, MAX_TENSORS, METADATA_START, Shard, open_shard

_SPLIT_NAME = re.compile(r"(?P<prefix>.+)-\d{5}-of-\d{5}\.gguf", re.DOTALL)
_MAX_SPLIT_COUNT = 0xFFFF  # uint16 in llama.cpp


def open_all(path: Path) -> tuple[Shard, ...]:
    """The file at `path` and, if it is part of a split model, all the others, in the order of their numbers.

    Raises GGUFError for a malformed file, and for files that are missing or do not fit together.
    """
    with contextlib.ExitStack() as close_on_error:
        given = open_shard(path)
        close_on_error.callback(given.file.close)
        number, count = _position(given)
        shards = [given]
        if count > 1:
            shards = []
            for index, shard_path in enumerate(_shard_paths(given, number, count)):
                shard = given if index == number else open_shard(shard_path)
                close_on_error.callback(shard.file.close)
                _check_position(shard, index, count)
                shards.append(shard)
        _check_tensors(shards)
        close_on_error.pop_all()
    return tuple(shards)


def _value(shard: Shard, key: str) -> int | None:
    entry = shard.entries.get(key)
    if entry is None:
        return None
    if entry.type not in INTEGER_TYPES:
        raise malformed(shard.path, entry.offset, f"{key} is of type {entry.type_name}; expected an integer")
    return int(entry.value)


def _offset(shard: Shard, key: str) -> int:
    return shard.entries[key].offset if key in shard.entries else METADATA_START


def _position(shard: Shard) -> tuple[int, int]:
    """(number from 0, count) of a file among its split files; (0, 1) for a file that is not split."""
    count = _value(shard, "split.count")
    if count is None:
        return 0, 1
    if not 1 <= count <= _MAX_SPLIT_COUNT:
        offset = _offset(shard, "split.count")
        raise malformed(shard.path, offset, f"split.count is {count}; expected 1 to {_MAX_SPLIT_COUNT}")
    number = _value(shard, "split.no")
    if number is None or not 0 <= number < count:
        found = "missing" if number is None else number
        offset = _offset(shard, "split.no")
        raise malformed(shard.path, offset, f"split.no is {found}; expected 0 to {count - 1} by split.count")
    return number, count


def _shard_paths(shard: Shard, number: int, count: int) -> list[Path]:
    """The paths of all files of the model that `shard` is a part of. Raises GGUFError if one does not exist."""
    suffix = f"-{number + 1:05d}-of-{count:05d}.gguf"
    match = _SPLIT_NAME.fullmatch(shard.path.name)
    if match is None or not shard.path.name.endswith(suffix):
        raise malformed(
            shard.path,
            _offset(shard, "split.no"),
            f"split.no {number} and split.count {count} need a file name that ends in {suffix!r}",
        )
    paths = [shard.path.with_name(f"{match['prefix']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [path.name for path in paths if not os.path.exists(path)]
    if missing:
        raise malformed(
            shard.path,
            _offset(shard, "split.count"),
            f"{len(missing)} of the {count} files of split.count are missing, the first is {missing[0]}",
        )
    return paths


def _check_position(shard: Shard, index: int, count: int) -> None:
    number = _value(shard, "split.no")
    if number != index:
        found = "missing" if number is None else number
        offset = _offset(shard, "split.no")
        raise malformed(shard.path, offset, f"split.no is {found}; expected {index} by the file's name")
    own_count = _value(shard, "split.count")
    if own_count not in (None, count):
        offset = _offset(shard, "split.count")
        raise malformed(shard.path, offset, f"split.count is {own_count}; expected {count} as in the other files")


def _check_tensors(shards: list[Shard]) -> None:
    """Raise GGUFError if a tensor is in two files, or if their number differs from `split.tensors.count`."""
    owner: dict[str, Shard] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in owner:
                offset = shard.tensor_info_offsets[info.name]
                other = owner[info.name].path.name
                raise malformed(shard.path, offset, f"duplicate tensor {quoted(info.name)}: {other} has it too")
            owner[info.name] = shard
    if len(owner) > MAX_TENSORS:
        message = f"the number of tensors of all files is {len(owner)}; expected at most {MAX_TENSORS}"
        raise malformed(shards[0].path, 8, message)
    for shard in shards:
        announced = _value(shard, "split.tensors.count")
        if announced not in (None, len(owner)):
            offset = _offset(shard, "split.tensors.count")
            message = f"split.tensors.count is {announced}, but the files together have {len(owner)} tensors"
            raise malformed(shard.path, offset, message)
