"""Compiles kernel files before their first use, in parallel processes, because NVRTC compiles only one per process.

Each process runs `python -m refengine.cuda.runtime.compile ARCH FILE MACRO=VALUE…`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from refengine.cuda.runtime.nvrtc import compile_source, is_compiled
from refengine.cuda.runtime.source import Part, names, read_source
from refengine.errors import KernelError, RefengineError

PAUSE_S = 0.01  # between two checks of the processes


def missing(arch: str, parts: Sequence[Part] | None = None) -> list[Part]:
    """Those parts whose machine code is not in the cache, the longest first. parts: all files, if it is not given.

    Raises DeviceError without NVRTC.
    """
    found = [(part, read_source(*part)) for part in ([(name, ()) for name in names()] if parts is None else parts)]
    found.sort(key=lambda of: -len(of[1].text) * len(of[1].kernels))
    return [part for part, source in found if not is_compiled(source, arch)]


def compile_files(
    arch: str, parts: Sequence[Part], progress: Callable[[int, int], None] | None = None, jobs: int | None = None
) -> None:
    """Compile what `missing` gives, into the cache. progress: called with (parts done, total parts).

    Raises KernelError with the compiler's messages. If this is interrupted, running processes still end by themselves,
    and their results are kept.
    """
    waiting, n_all, n_done = list(parts), len(parts), 0
    running: list[tuple[str, subprocess.Popen[str]]] = []
    while waiting or running:
        while waiting and len(running) < (jobs or os.cpu_count() or 1):
            name, constants = waiting.pop(0)
            macros = [f"{macro}={value}" for macro, value in constants]
            line = [sys.executable, "-m", "refengine.cuda.runtime.compile", arch, name, *macros]
            running.append((name, subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)))
        for name, process in [(name, process) for name, process in running if process.poll() is not None]:
            running.remove((name, process))
            _, messages = process.communicate()
            if process.returncode != 0:
                raise KernelError(
                    f"{name}.cu was not compiled for {arch} (exit code {process.returncode}): {messages[-2000:]}"
                )
            n_done += 1
            if progress is not None:
                progress(n_done, n_all)
        time.sleep(PAUSE_S)


def main() -> int:
    arch, name, *macros = sys.argv[1:]
    try:
        constants = tuple((macro, value) for macro, _, value in (text.partition("=") for text in macros))
        compile_source(read_source(name, constants), arch)
    except RefengineError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
