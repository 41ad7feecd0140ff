"""Compiles kernel files before their first use, in parallel processes, because NVRTC compiles only one per process.

Each process runs `python -m refengine.cuda.runtime.compile ARCH FILE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from refengine.cuda.runtime.nvrtc import compile_source, is_compiled
from refengine.cuda.runtime.source import names, read_source
from refengine.errors import KernelError, RefengineError

PAUSE_S = 0.01  # between two checks of the processes


def missing(arch: str) -> list[str]:
    """The kernel files whose machine code is not in the cache, the longest first. Raises DeviceError without NVRTC."""
    sources = [read_source(name) for name in names()]
    sources.sort(key=lambda source: -len(source.text) * len(source.kernels))
    return [source.name for source in sources if not is_compiled(source, arch)]


def compile_files(
    arch: str, files: Sequence[str], progress: Callable[[int, int], None] | None = None, jobs: int | None = None
) -> None:
    """Compile the files that `missing` gives, into the cache. progress: called with (files done, total files).

    Raises KernelError with the compiler's messages. If this is interrupted, running processes still end by themselves,
    and their results are kept.
    """
    waiting, n_all, n_done = list(files), len(files), 0
    running: list[tuple[str, subprocess.Popen[str]]] = []
    while waiting or running:
        while waiting and len(running) < (jobs or os.cpu_count() or 1):
            name = waiting.pop(0)
            line = [sys.executable, "-m", "refengine.cuda.runtime.compile", arch, name]
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
    arch, name = sys.argv[1:]
    try:
        compile_source(read_source(name), arch)
    except RefengineError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
