"""Shared fixtures. Tests never touch the network and leave nothing outside their temporary folder."""

import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests import tools.* and tests.*

# One BLAS thread per test process: with `-n auto` every core already has a process of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# llama.cpp's threads wait for each other at every operation, and would keep their cores busy with that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell starts what it runs in the background with Ctrl-C ignored, which every child inherits: ours are to hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu_alone: a GPU test that compares the driver's memory, so it runs alone")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With `-n`, give each process tests that follow each other, so that most files start their servers only once.

    A process that has no more tests takes half of those that are left to another one.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: half as many again as there are cores, since many tests wait for a server they started."""
    from refengine.ops.dequant import usable_cpus

    return max(1, 3 * usable_cpus() // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `ci` take long, mostly because they repeat a test on more models. They run if $CI is set."""
    from tests.levels import IN_CI

    if IN_CI:
        return
    for item in items:
        if item.get_closest_marker("ci") and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="takes long: set CI=1 to run it, as .ci/run does"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Keeps other processes of the same run (`-n 4`) off the GPU while a test marked `gpu_alone` runs.

    It surrounds set-up and tear-down too, since fixtures of a module allocate before the test's own begin.
    """
    with ExitStack() as held:
        if item.get_closest_marker("gpu_alone"):
            held.enter_context(gpu_lock(fcntl.LOCK_EX))
        elif item.get_closest_marker("gpu"):
            held.enter_context(gpu_lock(fcntl.LOCK_SH))
        return (yield)


@contextmanager
def gpu_lock(how: int, folder: Path | None = None) -> Iterator[None]:
    """Holds the GPU among the processes of this user: shared (LOCK_SH) or exclusively (LOCK_EX).

    Whoever waits holds the gate, so that those who come later cannot overtake an exclusive one for ever.
    """
    place = folder or Path(tempfile.gettempdir())
    with (
        open(place / f"refengine-gpu-gate-{os.getuid()}", "w") as gate,
        open(place / f"refengine-gpu-{os.getuid()}", "w") as lock,
    ):
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, how)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real vocabularies and the trained stories260K model (third-party data, not in this repository)."""
    folder = Path(os.environ.get("REFENGINE_TEST_DATA", ROOT.parent / "shared"))
    if not (folder / "vocab").is_dir():
        pytest.skip(f"no test data in {folder}: set REFENGINE_TEST_DATA to a folder with vocab/ and models/")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in `tools.make_model.TINY` to the path of that model, written when first wanted."""
    from tools.make_model import TINY, write_spec

    folder = tmp_path_factory.mktemp("tiny")

    def path(name: str) -> Path:
        file = folder / f"{name}.gguf"
        if not file.exists():
            write_spec(file, TINY[name])
        return file

    return path


@pytest.fixture(scope="module", params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Where kernels run: in the host build, or on a GPU."""
    return request.param
