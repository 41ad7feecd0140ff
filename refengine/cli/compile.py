"""Implements `refengine compile`: compiles the CUDA kernels before the first start needs them. Needs no GPU."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from tqdm import tqdm

from refengine.cuda.runtime.compile import compile_files, missing
from refengine.cuda.runtime.cubin_cache import cache_folder
from refengine.cuda.runtime.nvrtc import ARCHITECTURES, architecture
from refengine.cuda.runtime.source import names
from refengine.device import open_device
from refengine.errors import DeviceError, RequestError


def compile_kernels(arguments: argparse.Namespace) -> None:
    requested = arguments.arch or [_own_architecture()]
    unknown = [arch for arch in requested if re.fullmatch(r"sm_\d{2,3}a?|all", arch) is None]
    if unknown:
        raise RequestError(
            f"--arch: given {unknown[0][:40]!r}, allowed {', '.join(ARCHITECTURES)} and similar names, or all"
        )
    if arguments.jobs is not None and arguments.jobs < 1:
        raise RequestError(f"--jobs: given {arguments.jobs}, allowed 1 or more")
    if arguments.file:
        for unknown_file in set(arguments.file) - set(names()):
            raise RequestError(f"--file: given {unknown_file[:40]!r}, allowed {', '.join(names())}")
    for arch in ARCHITECTURES if "all" in requested else dict.fromkeys(requested):
        with tqdm(desc=arch, unit=" files", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

            def show(done: int, total: int, bar: tqdm[Any] = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            files = [part for part in missing(arch) if not arguments.file or part[0] in arguments.file]
            compile_files(arch, files, show, arguments.jobs)
        print(
            f"{arch}: {len(files)} kernel files compiled, the others were in the cache ({cache_folder()})",
            file=sys.stderr,
        )


def _own_architecture() -> str:
    """The architecture of this machine's GPU. Raises RequestError if there is none."""
    try:
        return architecture(open_device("cuda").xp)
    except DeviceError as e:
        known = ", ".join(ARCHITECTURES)
        raise RequestError(f"no --arch was given and there is no GPU ({e}): give --arch {known} or all") from None
