"""Compiles kernel files ahead of their first use, in processes side by side: NVRTC takes one at a time in each.

`python -m refengine.cuda.runtime.compile ARCH FILE` is such a process.
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

PAUSE_S = 0.01  # between two looks at the processes


def missing(arch: str) -> list[str]:
    """Kernel files whose machine code the cache lacks, the longest first. Raises DeviceError without NVRTC."""
    sources = [read_source(name) for name in names()]
    sources.sort(key=lambda source: -len(source.text) * len(source.kernels))
    return [source.name for source in sources if not is_compiled(source, arch)]


def compile_files(
    arch: str, files: Sequence[str], progress: Callable[[int, int], None] | None = None, jobs: int | None = None
) -> None:
    """Compile what `missing` found, into the cache. progress(files done, files in all).

    Raises KernelError with a compiler's messages. Processes that run when this is given up end by themselves, and what
    they compiled is kept.
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
            _, said = process.communicate()
            if process.returncode != 0:
                raise KernelError(
                    f"{name}.cu was not compiled for {arch} (exit code {process.returncode}): {said[-2000:]}"
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
