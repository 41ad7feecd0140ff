"""A worker as a process of its own, and a client that reads its events."""

import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from refengine.bench.load import metric
from refengine.bench.process import free_port
from tests.cli_runner import ENVIRONMENT, ROOT
from tools.make_model import write_model

Event = tuple[str, dict[str, Any]]
HAIKU: dict[str, Any] = {
    "prompt": "Write a haiku about GPU computing",
    "max_tokens": 50,
    "temperature": 0.7,
    "seed": 42,
}

# `refengine serve` whose next step raises what a file names: a device that fails in the middle of a step. While it says
# `slow`, every step takes its time.
FAULTY = """
import pathlib, sys, time
from refengine import model
from refengine.cli import main as cli
flag, step = pathlib.Path(sys.argv.pop(1)), model.Model.evaluate
class CUDARuntimeError(RuntimeError): pass
def faulty(*arguments, **keywords):
    try:
        kind = flag.read_text()
    except FileNotFoundError:
        kind = ""
    if kind == "slow":
        time.sleep(0.03)
    elif kind:  # nothing: it is being written
        flag.unlink()
        raise {"memory": MemoryError, "device": CUDARuntimeError, "bug": ZeroDivisionError}[kind]("a secret")
    return step(*arguments, **keywords)
model.Model.evaluate = faulty
sys.exit(cli.main())
"""


def write_talker(folder: Path) -> Path:
    """A model of random weights whose answers never end by themselves: no token of its vocabulary ends one."""
    path = folder / "talker.gguf"
    write_model(path, "qwen2", "Q8_0", n_layer=2, n_ctx=4096)
    data = path.read_bytes()
    renamed = {b"<|endoftext|>": b"<|unending!|>", b"<|im_end|>": b"<|im_mid|>", b".eos_token_id": b".not_token_id"}
    for end, other in renamed.items():  # of the same length, so that the file stays whole
        assert end in data
        data = data.replace(end, other)
    path.write_bytes(data)
    return path


# `refengine serve` whose model says a text, byte by byte: each byte is a token of the small byte-level vocabulary.
SCRIPTED = """
import sys
from refengine import model
from refengine.cli import main as cli
said, step = sys.argv.pop(1).encode(), model.Model.evaluate
def scripted(self, parts, *arguments, **keywords):
    logits = step(self, parts, *arguments, **keywords)
    for row, (sequence, ids) in zip(logits, parts):
        row[:] = 0
        row[said[(sequence.length + len(ids) - 1) % len(said)]] = 100
    return logits
model.Model.evaluate = scripted
sys.exit(cli.main())
"""


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every line of the log: all of them are JSON objects."""
        complete, _, _ = self.log_file.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in complete.splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == name]

    def client(self, read_s: float = 30, **keywords: Any) -> httpx.Client:
        """A client that gives up when it has read nothing for so long; it may take its time to connect."""
        return httpx.Client(base_url=self.url, timeout=httpx.Timeout(30, read=read_s), **keywords)

    def run(self, **body: Any) -> list[Event]:
        """All events of a request."""
        with self.client() as client, self.stream(client, **body) as events:
            return list(events)

    @contextmanager
    def stream(self, client: httpx.Client, headers: Any = None, **body: Any) -> Iterator[Iterator[Event]]:
        """Events of a request while it runs."""
        request = {"job_id": uuid.uuid4().hex, **body}
        with client.stream("POST", "/execute", json=request, headers=headers) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            yield parsed(response.iter_lines())

    def cancel(self, job_id: str) -> None:
        with self.client() as client:
            assert client.post("/cancel", json={"job_id": job_id}).status_code == 202

    def outcome_of(self, job_id: str) -> str:
        """Wait for the end of a job."""
        until(lambda: any(line.get("job_id") == job_id for line in self.events("execute_end")))
        (end,) = [line for line in self.events("execute_end") if line["job_id"] == job_id]
        return str(end["outcome"])

    def health(self) -> dict[str, Any]:
        with self.client() as client:
            found: dict[str, Any] = client.get("/health").json()
            return found

    def metrics(self) -> str:
        """All of them, as they are right now."""
        with self.client() as client:
            return client.get("/metrics").text

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        return metric(self.metrics(), name, **labels)

    def settled(self) -> None:
        """Wait until no sequence holds blocks, at most as long as the requirement allows and a busy machine needs."""
        until(lambda: self.metric("worker_kv_blocks", state="used") == 0)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=20)


def parsed(lines: Iterator[str]) -> Iterator[Event]:
    event = ""
    for line in lines:
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield event, json.loads(line.removeprefix("data: "))


def read(events: Iterator[Event], n: int) -> list[Event]:
    """The next n events."""
    return [next(events) for _ in range(n)]


def until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.01)


def text_of(events: list[Event]) -> str:
    return "".join(data["t"] for event, data in events if event == "token")


def command(*arguments: object, script: tuple[str, object] | None = None) -> tuple[list[str], str]:
    """A command line that serves on a free port, and its URL. script: a program in place of refengine, its argument."""
    port = free_port()
    program = ["-m", "refengine"] if script is None else ["-c", script[0], str(script[1])]
    fixed = ["serve", "--worker-id", str(uuid.uuid4()), "--port", str(port)]
    return [sys.executable, *program, *fixed, *map(str, arguments)], f"http://127.0.0.1:{port}"


@contextmanager
def serving(
    *arguments: object, script: tuple[str, object] | None = None, device: str = "cpu", seconds: float = 120
) -> Iterator[Server]:
    """A worker that is ready within so many seconds; it is stopped at the end if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        line, url = command("--device", device, *arguments, script=script)
        with open(log_file, "wb") as log:
            process = subprocess.Popen(line, stderr=log, stdout=log, cwd=ROOT, env=ENVIRONMENT)
        server = Server(process, url, log_file)
        try:
            until(lambda: process.poll() is not None or b'"ready"' in log_file.read_bytes(), seconds)
            assert process.poll() is None, log_file.read_text()
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
