"""Implements `refengine compile`: compiles the CUDA kernels before the first start needs them. Needs no GPU."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from tqdm import tqdm

from refengine.cli.console import model_path
from refengine.cuda.decode.step import NoFusedStep, kernels_of_steps
from refengine.cuda.runtime.compile import compile_files, missing
from refengine.cuda.runtime.cubin_cache import cache_folder
from refengine.cuda.runtime.launch import Kernels, NoLaunches
from refengine.cuda.runtime.nvrtc import ARCHITECTURES, SHARED_LIMITS, architecture
from refengine.cuda.runtime.source import Part, names
from refengine.cuda.upload import Described
from refengine.device import open_device
from refengine.errors import DeviceError, RequestError
from refengine.gguf.file import GGUFFile
from refengine.models import BY_ARCHITECTURE, read_config
from refengine.weights import load_weights


def compile_kernels(arguments: argparse.Namespace) -> None:
    requested = arguments.arch or [_own_architecture()]
    unknown = [arch for arch in requested if re.fullmatch(r"sm_\d{2,3}a?|all", arch) is None]
    if unknown:
        raise RequestError(
            f"--arch: given {unknown[0][:40]!r}, allowed {', '.join(ARCHITECTURES)} and similar names, or all"
        )
    if arguments.jobs is not None and arguments.jobs < 1:
        raise RequestError(f"--jobs: given {arguments.jobs}, allowed 1 or more")
    for option, given in (("--max-batch", arguments.max_batch), ("--multiprocessors", arguments.multiprocessors)):
        if given is not None and given < 1:
            raise RequestError(f"{option}: given {given}, allowed 1 or more")
    if arguments.file:
        for unknown_file in set(arguments.file) - set(names()):
            raise RequestError(f"--file: given {unknown_file[:40]!r}, allowed {', '.join(names())}")
    for arch in ARCHITECTURES if "all" in requested else dict.fromkeys(requested):
        of_model = _parts_of_model(arguments, arch) if arguments.model else []
        with tqdm(desc=arch, unit=" files", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

            def show(done: int, total: int, bar: tqdm[Any] = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            files = [part for part in missing(arch) if not arguments.file or part[0] in arguments.file]
            files += missing(arch, of_model)
            compile_files(arch, files, show, arguments.jobs)
        print(
            f"{arch}: {len(files)} kernel files compiled, the others were in the cache ({cache_folder()})",
            file=sys.stderr,
        )


def _parts_of_model(arguments: argparse.Namespace, arch: str) -> list[Part]:
    """The kernels that a model's decode steps have for themselves. Raises RequestError if the GPU is not known."""
    if arch not in SHARED_LIMITS:
        raise RequestError(f"--model: given with --arch {arch}, allowed with {', '.join(ARCHITECTURES)}")
    kernels = NoLaunches("cuda")
    kernels.n_multiprocessors, kernels.shared_limit = _multiprocessors(arguments, arch), SHARED_LIMITS[arch]
    with GGUFFile(model_path(arguments.model)) as gguf:
        config = read_config(gguf)
        model = BY_ARCHITECTURE[config.arch]
        weights = load_weights(gguf, model.tensors(config), config.n_layer, Described())
        decode = getattr(model, "decode", None)
        try:
            return kernels_of_steps(decode, config, weights, kernels, arguments.max_batch, config.n_ctx_train)
        except NoFusedStep as e:
            print(f"refengine: {arguments.model} has no kernels of its own: {e}", file=sys.stderr)
            return []


def _multiprocessors(arguments: argparse.Namespace, arch: str) -> int:
    if arguments.multiprocessors is not None:
        return int(arguments.multiprocessors)
    try:
        xp = open_device("cuda").xp
        if architecture(xp) == arch:
            return Kernels("cuda").n_multiprocessors
        reason = f"this machine's GPU is {architecture(xp)}"
    except DeviceError as e:
        reason = f"there is no GPU ({e})"
    raise RequestError(f"--model: its kernels depend on the GPU, and {reason}: give its number of --multiprocessors")


def _own_architecture() -> str:
    """The architecture of this machine's GPU. Raises RequestError if there is none."""
    try:
        return architecture(open_device("cuda").xp)
    except DeviceError as e:
        known = ", ".join(ARCHITECTURES)
        raise RequestError(f"no --arch was given and there is no GPU ({e}): give --arch {known} or all") from None
