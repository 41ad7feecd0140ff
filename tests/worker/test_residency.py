"""Where device memory lies: what the driver is asked, what is refused, how often, and what then becomes known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refengine.cli.main import build_parser
from refengine.cli.serve import options_of
from refengine.cuda.memory import DeviceMemory
from refengine.device import Device
from refengine.errors import DeviceError
from refengine.model import PACKAGED_MODEL
from refengine.worker import startup
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry import status as facts
from refengine.worker.telemetry.log import Log
from tests.worker.server import serving, until

UUID = "123e4567-e89b-12d3-a456-426614174000"
HOST, DEVICE, MANAGED = 1, 2, 3  # of cudaMemoryType


@dataclass
class Driver:
    """What `pointerGetAttributes` says of each pointer, or raises; and which it was asked for."""

    said: dict[int, Any] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def attributes(self, pointer: int) -> Any:
        self.asked.append(pointer)
        said = self.said.get(pointer, SimpleNamespace(type=DEVICE, hostPointer=0))
        if isinstance(said, Exception):
            raise said
        return said


def fake_cupy(driver: Driver) -> Any:
    """As much of CuPy as `DeviceMemory` uses. Pointers are numbers; none twice."""
    pointers = iter(range(0x7F0000000000, 0x7FFFFFFFFFFF, 1 << 20))

    class Memory:
        __slots__ = ("ptr", "size")

        def __init__(self, size: int) -> None:
            self.ptr, self.size = next(pointers), size

    class MemoryPointer:
        def __init__(self, mem: Memory, offset: int) -> None:
            self.mem, self.ptr = mem, mem.ptr + offset

        def memset(self, value: int, size: int) -> None:
            pass

    class MemoryPool:
        """Keeps what it has got, until it is told to give it back."""

        def __init__(self, allocator: Callable[[int], MemoryPointer]) -> None:
            self._allocate, self._kept = allocator, list[Memory]()

        def malloc(self, size: int) -> MemoryPointer:
            found = self._allocate(size)
            self._kept.append(found.mem)
            return found

        def total_bytes(self) -> int:
            return sum(memory.size for memory in self._kept)

        def free_all_blocks(self) -> None:
            self._kept.clear()

    runtime = SimpleNamespace(pointerGetAttributes=driver.attributes, memGetInfo=lambda: (1 << 40, 1 << 40))
    cuda = SimpleNamespace(Memory=Memory, MemoryPointer=MemoryPointer, MemoryPool=MemoryPool, runtime=runtime)

    @contextmanager
    def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
        cuda.allocate = allocator
        yield

    cuda.using_allocator = using_allocator
    return SimpleNamespace(cuda=cuda)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def places(driver: Driver) -> tuple[DeviceMemory, list[Any], dict[str, int]]:
    """Memory of a model after its first prompt, what holds it, and where each of its buffers is."""
    xp = fake_cupy(driver)
    memory = DeviceMemory(xp)
    held = [memory.arena("weights", 1000), memory.arena("kv", 2000), memory.arena("workspace", 3000)]
    with memory.workspace():
        xp.cuda.allocate(4000)
    memory.settle()
    memory.check_residency()
    found = {f"{arena.purpose} arena": arena.pointer for arena in held}
    (chunk,) = set(driver.asked) - set(found.values())
    driver.asked.clear()
    return memory, held, {**found, "workspace chunk": chunk}


BUFFERS = ["weights arena", "kv arena", "workspace arena", "workspace chunk"]


def test_every_buffer_that_stays_is_asked_for(
    driver: Driver, places: tuple[DeviceMemory, list[Any], dict[str, int]]
) -> None:
    memory, held, found = places
    memory.check_residency()
    assert sorted(driver.asked) == sorted(found.values())
    driver.asked.clear()
    del held[1]
    memory.trim()
    memory.check_residency()  # of what is no longer there, nothing is asked
    assert sorted(driver.asked) == [found["weights arena"], found["workspace arena"]]


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize(
    "said",
    [
        SimpleNamespace(type=HOST, hostPointer=0x10),
        SimpleNamespace(type=MANAGED, hostPointer=0),
        SimpleNamespace(type=0, hostPointer=0),
        SimpleNamespace(type=DEVICE, hostPointer=0x10),
        RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"),
    ],
    ids=["host", "managed", "not registered", "mapped into the host", "the driver fails"],
)
def test_a_buffer_that_is_not_plain_device_memory(
    driver: Driver, places: tuple[DeviceMemory, list[Any], dict[str, int]], buffer: str, said: Any
) -> None:
    memory, _, found = places
    driver.said[found[buffer]] = said
    with pytest.raises(DeviceError, match=f"^{buffer} at {found[buffer]:#x}"):
        memory.check_residency()


def model_on(device: str) -> Any:
    """A model whose memory is not where it belongs."""

    def moved() -> None:
        raise DeviceError("kv arena at 0x7f is no plain device memory")

    memory: Any = SimpleNamespace(check_residency=moved)
    return SimpleNamespace(device=Device(np, device, "for a test"), memory=memory)


def test_the_memory_of_a_gpu_is_checked() -> None:
    with pytest.raises(DeviceError, match="kv arena at 0x7f"):
        facts.check_residency(model_on("cuda:1"))
    facts.check_residency(model_on("host"))
    facts.check_residency(model_on("cpu"))


def test_a_start_ends_where_memory_is_not_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "check_residency", lambda model: facts.check_residency(model_on("cuda:1")))
    with pytest.raises(startup.StartFailed, match="kv arena at 0x7f") as caught:
        startup.Startup(WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080), Log(UUID, "m", "cpu"))()
    assert caught.value.code == "CUDA_ERROR"


def test_checks_are_a_minute_apart_unless_said_otherwise() -> None:
    given = ["serve", "--worker-id", UUID, "--device", "cpu", "--port", "8080"]
    assert options_of(build_parser().parse_args(given)).residency_check_sec == 60.0
    assert options_of(build_parser().parse_args([*given, "--residency-check-sec", "7.5"])).residency_check_sec == 7.5
    assert WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080).residency_check_sec == 60.0


# `refengine serve` on a model whose memory has moved once a file is there.
MOVED = """
import pathlib, sys
from refengine.cli import main as cli
from refengine.device import Device
from refengine.errors import DeviceError
from refengine.worker.jobs import engine_thread
flag = pathlib.Path(sys.argv.pop(1))
def check(model):
    if flag.exists():
        raise DeviceError("kv arena at 0x7f is no plain device memory")
engine_thread.check_residency = check
sys.exit(cli.main())
"""


def test_memory_that_moves_while_it_serves(tmp_path: Path) -> None:
    """Soon /health says so, and the log has a critical line."""
    flag = tmp_path / "moved"
    with serving("--residency-check-sec", 0.1, script=(MOVED, flag)) as server, server.client() as client:
        assert client.get("/health").json()["status"] == "healthy"
        flag.touch()
        until(lambda: client.get("/health").json()["status"] == "unhealthy", 5)
        health = client.get("/health").json()
        assert (health["resident"], health["reasons"]) == (False, ["kv arena at 0x7f is no plain device memory"])
        line = server.events("error")[0]
        assert (line["level"], line["code"], line["message"]) == ("CRITICAL", "CUDA_ERROR", health["reasons"][0])
