"""An engine under test in a process of its own, which waits for requests without using the processor.

It reads requests as JSON lines from standard input and answers each. The first one says which engine is to be opened.
The environment of the process has the number of threads. If the process crashes, a file that was handed to it has its
last words: what llama.cpp logged, and where Python was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from refengine.bench.speed.measure import EngineUnderTest, Sample
from refengine.bench.speed.profile import Profile, ProfileRow
from refengine.errors import RefengineError, one_line
from refengine.validate.llamacpp import log_to

REFENGINE, LLAMACPP = "refengine", "llama.cpp"
OF_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
CRASH = "Fatal Python error"  # how faulthandler's report begins
LOGGED_LINES = 8  # of an engine's log, shown if its process crashes
_FRAME = re.compile(r'File "(?:.*/)?([^/"<>]+)", line (\d+) in (.+)')


class Refused(RefengineError):
    """The engine cannot do what was asked, for want of memory or for a reason that the message gives."""

    def __init__(self, message: str, engine: str) -> None:
        super().__init__(message)
        self.engine = engine


@dataclass(frozen=True)
class Setup:
    """Which engine is opened, and how.

    engine: `refengine` or `llama.cpp`. chunk: the tokens of a prompt in one forward pass. threads: of the CPU.
    repack: whether llama.cpp repacks weights on the CPU.
    """

    engine: str
    path: str
    device: str
    numerics: str | None
    chunk: int
    threads: int
    repack: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """What the process has in its environment besides ours."""
        found = dict.fromkeys(OF_THREADS, str(self.threads))
        if self.engine == LLAMACPP and self.device == "cpu":
            found["CUDA_VISIBLE_DEVICES"] = ""  # a build for GPUs computes large products there even so
        return found


# The start of the process, without and with llama.cpp: a llama.cpp whose libraries contain a C++ runtime of their own
# crashes if another library, such as CuPy's, has loaded the system's runtime before it.
_START = (
    "from refengine.bench.speed.process import main; main({})",
    "import contextlib\nwith contextlib.suppress(Exception):\n    import llama_cpp\n"
    "from refengine.bench.speed.process import main; main({})",
)


class EngineProcess:
    """An `EngineUnderTest` in another process. A context manager, which ends the process.

    facts: what the engine says of itself after it has loaded the model, and `load_s`, the seconds that loading took.
    beside: the processes that wait while this one measures; what they use of the processor then is counted.
    """

    def __init__(self, setup: Setup) -> None:
        self.name = setup.engine
        self.beside: Sequence[EngineProcess] = ()
        self._waited_s = self._waited_cpu_s = 0.0
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        words = self._last_words.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START[setup.engine == LLAMACPP].format(words)],
            pass_fds=[words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **setup.environment},
            start_new_session=True,  # Ctrl-C interrupts only the benchmark, which then ends this process
        )
        try:
            self.facts: dict[str, Any] = self._ask("open", **asdict(setup))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that was not sent
                    stream.close()
        self._last_words.close()

    def prompt(self, n: int) -> Sample:
        return self._measured("prompt", n=n)

    def decode(self, streams: int, depth: int, tokens: int) -> Sample:
        return self._measured("decode", streams=streams, depth=depth, tokens=tokens)

    def step_bytes(self, streams: int, positions: float) -> int:
        return int(self._ask("step_bytes", streams=streams, positions=positions))

    def cache_bytes(self, n_positions: int) -> int:
        return int(self._ask("cache_bytes", n_positions=n_positions))

    def copy_rates(self) -> list[float]:
        """The bytes per second of a copy (only of refengine's process)."""
        return [float(rate) for rate in self._ask("copy_rates")]

    def free_memory(self) -> int:
        """The free memory of the device in bytes (only of refengine's process)."""
        return int(self._ask("free_memory"))

    def profile(self, streams: int, depth: int, tokens: int) -> Profile:
        """The time of a decode step by kernel or operation (only of refengine's process)."""
        found = self._ask("profile", streams=streams, depth=depth, tokens=tokens)
        return Profile(**{**found, "rows": tuple(ProfileRow(**row) for row in found["rows"])})

    def usage(self) -> dict[str, Any]:
        """`peak_rss_bytes`, and `idle_cpu_share`: the share of one core that it used while another one measured."""
        share = self._waited_cpu_s / self._waited_s if self._waited_s else 0.0
        return {"peak_rss_bytes": self._ask("peak_rss_bytes"), "idle_cpu_share": share}

    def cpu_s(self) -> float:
        """The seconds of processor time that the process has used; 0 where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime

    def _measured(self, do: str, **arguments: int) -> Sample:
        before, start = [other.cpu_s() for other in self.beside], time.perf_counter()
        sample = Sample(**self._ask(do, **arguments))
        for other, used in zip(self.beside, before, strict=True):
            other._waited_s += time.perf_counter() - start
            other._waited_cpu_s += other.cpu_s() - used
        return sample

    def _ask(self, do: str, **arguments: Any) -> Any:
        """The answer to a request. Raises Refused with the engine's message, RefengineError if the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._last_words.seek(0)
            said = last_words(self._last_words.read().decode("utf-8", "replace")) if code < 0 else ""
            raise RefengineError(f"the process of {self.name} {ending(code)}{said}")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"], self.name)
        return answer["result"]


class _Answers:
    """The other side: opens an engine and answers requests by calling its methods."""

    def __init__(self) -> None:
        self._engine: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """`result`, or `refused` with the message of an error that a user can understand."""
        do = request.pop("do")
        own: Mapping[str, Callable[..., Any]] = {"open": self._open, "peak_rss_bytes": _peak_rss_bytes}
        try:
            result = (own[do] if do in own else getattr(self._engine, do))(**request)
            return {"result": asdict(result) if isinstance(result, Sample | Profile) else result}
        except RefengineError as e:
            return {"refused": one_line(str(e))}
        except MemoryError as e:
            return {"refused": one_line(f"not enough memory: {e}")}

    def _open(self, **setup: Any) -> dict[str, Any]:
        start = time.perf_counter()
        self._engine, facts = opened(Setup(**setup))
        return {**facts, "load_s": time.perf_counter() - start}


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def opened(setup: Setup) -> tuple[EngineUnderTest, dict[str, Any]]:
    """An engine in this process, and what it says of itself."""
    if setup.engine == LLAMACPP:
        from refengine.bench.speed.llamacpp import LlamaCppSpeed

        peer = LlamaCppSpeed(setup.path, setup.device, setup.chunk, setup.threads, setup.repack)
        return peer, {"version": peer.version, "system": peer.system, "repack": setup.repack}
    from refengine.bench.speed.ours import Refengine

    ours = Refengine(setup.path, setup.device, setup.numerics, setup.chunk, setup.threads)
    return ours, ours.facts()


def main(last_words: int) -> None:
    faulthandler.enable(last_words)
    log_to(last_words)
    answers = _Answers()
    # What libraries print goes to standard error; the answers alone go to standard output.
    output: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        print(json.dumps(answers.answer(json.loads(requests.get()))), file=output, flush=True)


def _read(requests: SimpleQueue[str]) -> None:
    """Pass the requests on. If the benchmark ends, however it does, so does this process, amid a measurement too."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def ending(code: int) -> str:
    """How a process ended, in words, by its exit code; below zero, it is that of the signal that ended it."""
    if code >= 0:
        return f"ended with exit code {code}: see its messages above"
    if -code == signal.SIGKILL:
        return "was killed (SIGKILL), perhaps because memory ran out"
    known = {int(s): s.name for s in signal.Signals}
    return f"crashed ({known.get(-code, f'signal {-code}')}), which is a fault in it or in a library that it uses"


def last_words(text: str) -> str:
    """The end of a message about a crash, by what the process wrote before it: its log, and faulthandler's report."""
    log, crash, report = text.partition(CRASH)
    lines = [line.strip() for line in log.splitlines() if line.strip(" .")][-LOGGED_LINES:]
    said = f"; its last messages: {' | '.join(lines)}" if lines else ""
    # The thread that crashed, unless it is one of a library's own, which has no frames.
    current = report.partition("Current thread")[2].partition("\n\n")[0]
    frames = _FRAME.findall(current) or _FRAME.findall(report)
    where = " < ".join(f"{function} ({file}:{line})" for file, line, function in frames)
    return said + (f"; Python was in {where}" if crash and where else "")
