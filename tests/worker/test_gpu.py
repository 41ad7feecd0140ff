"""A worker on a GPU: what only a device can show of memory, of the same bits, and of what comes back."""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import refengine
from refengine.errors import DeviceError
from tests.worker.server import HAIKU, Server, serving, text_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
READY_S = 240  # a first start compiles all kernels
PAGE = 2 << 20  # bytes: the driver gives memory in pages of this size


@pytest.fixture(scope="module", autouse=True)
def _needs_gpu() -> None:
    try:
        refengine.load(device=DEVICE)
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(device=DEVICE, seconds=READY_S) as running:
        yield running


def health(server: Server) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.get("/health").json()
    return found


def test_health_tells_of_the_device(server: Server) -> None:
    found = health(server)
    assert (found["status"], found["resident"], found["device"]) == ("healthy", True, DEVICE)
    assert found["sm"].startswith("sm_")
    assert float(found["cuda_runtime_version"]) >= 12
    assert set(found["vram_bytes"]) == {"weights", "kv", "workspace"}
    assert all(found["vram_bytes"].values())
    assert sum(found["vram_bytes"].values()) == found["vram_bytes_used"]
    for kind, n_bytes in found["vram_bytes"].items():
        assert server.metric("worker_vram_bytes", kind=kind) == n_bytes


def used_by_driver() -> int:
    """Of the whole device, settled: an ended process gives its memory back a little later."""
    seen: list[int] = []
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        line = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        seen.append(int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) << 20)
        time.sleep(0.2)
    return seen[-1]


@pytest.mark.gpu_alone
def test_what_is_accounted_for_is_what_the_driver_says() -> None:
    """A process also has its context, which the driver counts and nobody can see into: differences are compared."""
    before = used_by_driver()
    accounted, driver = [], []
    for n_mb in (64, 1024, 4096):
        with serving("--kv-cache-size-mb", n_mb, device=DEVICE, seconds=READY_S) as running:
            driver.append(used_by_driver() - before)
            accounted.append(health(running)["vram_bytes_used"])
    for i in (1, 2):
        assert abs((driver[i] - driver[0]) - (accounted[i] - accounted[0])) <= 4 * PAGE
    assert 0 < driver[0] - accounted[0] < 1 << 30  # the context, cubins and graphs


def test_the_same_seed_gives_the_same_haiku_alone_and_in_company(server: Server) -> None:
    alone = [server.run(**HAIKU) for _ in range(2)]
    assert text_of(alone[0]) == text_of(alone[1])
    assert text_of(alone[0]).strip().count("\n") == 2
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.run, prompt="Write a haiku about rain", seed=i, max_tokens=60) for i in range(7)]
        assert text_of(pool.submit(lambda: server.run(**HAIKU)).result()) == text_of(alone[0])
        assert all(other.result()[-1][0] == "end" for other in others)
    model = refengine.load(device=DEVICE)
    params = refengine.SamplingParams(temperature=0.7, seed=42, max_tokens=50)
    assert "".join(token.text for token in refengine.generate(model, HAIKU["prompt"], params)) == text_of(alone[0])


def test_a_hundred_requests_leave_the_memory_as_it_was(server: Server) -> None:
    server.run(**HAIKU)
    before = health(server)["vram_bytes"]
    with ThreadPoolExecutor(16) as pool:
        prompts = ["Write a haiku about rain " * (1 + i % 9) for i in range(100)]
        runs = [pool.submit(server.run, prompt=p, seed=i, max_tokens=20) for i, p in enumerate(prompts)]
        assert {run.result()[-1][0] for run in runs} == {"end"}
    server.settled()
    assert health(server)["vram_bytes"] == before


def test_prompts_are_scored_without_growing_for_good(server: Server) -> None:
    body = {"prompt": "the warp hums softly " * 30, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    with server.client() as client:
        answers = [client.post("/v1/completions", json=body).json()["choices"] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    before = health(server)["vram_bytes"]
    with server.client() as client:
        client.post("/v1/completions", json=body)
    assert health(server)["vram_bytes"] == before
