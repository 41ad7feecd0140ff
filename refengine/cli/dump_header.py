"""Implements `refengine dump-header`: provides the C++ header that writes dumps for `refengine validate`."""

from __future__ import annotations

import argparse
import shutil
from importlib.resources import as_file, files


def dump_header(arguments: argparse.Namespace) -> None:
    """Print the header's path, or copy the header to `--output`."""
    with as_file(files("refengine") / "validate" / "refengine_dump.h") as header:
        if arguments.output is None:
            print(header)
        else:
            shutil.copyfile(header, arguments.output)
