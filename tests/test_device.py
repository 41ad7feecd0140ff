"""Choosing a device. CuPy is played by a module of this file: what it says must end in the right device or error."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refengine.device import INSTALL_HINT, open_device
from refengine.errors import DeviceError, RequestError


class FakeCuda:
    """Stands for `cupy.cuda`: counts devices, remembers which was taken, or fails as without a driver."""

    def __init__(
        self, n_devices: int = 0, count_error: Exception | None = None, use_error: Exception | None = None
    ) -> None:
        self.taken: list[int] = []

        def count() -> int:
            if count_error is not None:
                raise count_error
            return n_devices

        def use(index: int) -> None:
            if use_error is not None:
                raise use_error
            self.taken.append(index)

        self.runtime = SimpleNamespace(getDeviceCount=count)
        self.Device = lambda index: SimpleNamespace(use=lambda: use(index))


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda | None) -> Any:
    """Make `import cupy` give a module with this `cuda`; None: the import fails, as where CuPy is not installed."""
    module: Any = None
    if cuda is not None:
        module = ModuleType("cupy")
        module.cuda = cuda
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cpu_is_numpy() -> None:
    device = open_device("cpu")
    assert (device.xp, device.name) == (np, "cpu")


@pytest.mark.parametrize(
    "spec", ["", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:0x1", "cuda:99999", "cuda:0 ", "cpu:0", "cuda,cpu"]
)
def test_bad_name_is_refused_and_the_good_ones_listed(spec: str) -> None:
    with pytest.raises(RequestError, match="choose cpu, cuda, cuda:N, auto or host"):
        open_device(spec)


@pytest.mark.parametrize("spec", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_without_cupy_says_what_to_install(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    install(monkeypatch, None)
    with pytest.raises(DeviceError, match=r"needs CuPy") as caught:
        open_device(spec)
    assert INSTALL_HINT in str(caught.value)
    assert "pip install '.[cuda13]'" in INSTALL_HINT


FAILURES = {
    "no driver": FakeCuda(count_error=RuntimeError("cudaErrorInsufficientDriver")),
    "no device": FakeCuda(n_devices=0),
    "busy device": FakeCuda(n_devices=1, use_error=RuntimeError("cudaErrorDevicesUnavailable")),
}


@pytest.mark.parametrize("cuda", FAILURES.values(), ids=FAILURES)
def test_explicit_cuda_never_falls_back(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    install(monkeypatch, cuda)
    for spec in ("cuda", "cuda:0"):
        with pytest.raises(DeviceError, match="device cuda:0"):
            open_device(spec)
    assert cuda.taken == []


@pytest.mark.parametrize("cuda", [None, *FAILURES.values()], ids=["no CuPy", *FAILURES])
def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda | None) -> None:
    install(monkeypatch, cuda)
    device = open_device("auto")
    assert (device.xp, device.name) == (np, "cpu")
    assert device.reason.startswith("no GPU is usable: device cuda:0")
    assert ("needs CuPy" in device.reason) == (cuda is None)


@pytest.mark.parametrize(("spec", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("auto", 0)])
def test_a_gpu_that_serves_is_taken(monkeypatch: pytest.MonkeyPatch, spec: str, index: int) -> None:
    cuda = FakeCuda(n_devices=3)
    module = install(monkeypatch, cuda)
    device = open_device(spec)
    assert (device.xp, device.name, cuda.taken) == (module, f"cuda:{index}", [index])


def test_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(n_devices=3)
    install(monkeypatch, cuda)
    with pytest.raises(DeviceError, match=r"cuda:3 does not exist: this machine has 3"):
        open_device("cuda:3")
    assert cuda.taken == []
