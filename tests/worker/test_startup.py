"""`refengine serve` before it serves: arguments, the order of a start, failures that are logged, the ready callback."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

import refengine
from refengine import device
from refengine.bench.process import free_port
from refengine.cli.main import build_parser
from refengine.cli.serve import options_of
from refengine.errors import RequestError
from refengine.model import PACKAGED_MODEL
from refengine.worker import startup
from refengine.worker.options import WorkerOptions
from refengine.worker.telemetry.log import Log
from tests.cli_runner import ENVIRONMENT, ROOT, cli, write_no_vocab
from tests.worker.server import HAIKU, Server, command, parsed, serving, until

UUID = "123e4567-e89b-12d3-a456-426614174000"
GOOD = {"--worker-id": UUID, "--device": "cpu", "--port": "8080"}

BAD_ARGUMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "worker id": ({"--worker-id": "me"}, "--worker-id: given 'me', allowed a UUID"),
    "port low": ({"--port": "1023"}, "--port: given 1023, allowed 1024 to 65535"),
    "port high": ({"--port": "65536"}, "--port: given 65536, allowed 1024 to 65535"),
    "port text": ({"--port": "http"}, "--port: given 'http', allowed a whole number from 1024 to 65535"),
    "no device": ({"--device": None}, "--gpu-device N and --device: given neither, allowed exactly one"),
    "two devices": ({"--gpu-device": "0"}, "--gpu-device N and --device: given both, allowed exactly one"),
    "device auto": ({"--device": "auto"}, "--device: given 'auto', allowed cpu, host, cuda or cuda:N"),
    "gpu text": ({"--device": None, "--gpu-device": "gpu0"}, "--gpu-device: given 'gpu0', allowed a whole number"),
    "gpu below": ({"--device": None, "--gpu-device": "-1"}, "--gpu-device: given -1, allowed 0 to 9999"),
    "tokens in": ({"--max-tokens-in": "0"}, "--max-tokens-in: given 0, allowed 1 to"),
    "tokens out": ({"--max-tokens-out": "2049"}, "--max-tokens-out: given 2049, allowed 1 to 2048"),
    "timeout": ({"--inference-timeout-sec": "0"}, "--inference-timeout-sec: given 0.0, allowed 0.001 to 86400"),
    "timeout nan": ({"--inference-timeout-sec": "nan"}, "--inference-timeout-sec: given nan, allowed 0.001 to"),
    "timeout text": ({"--inference-timeout-sec": "5m"}, "--inference-timeout-sec: given '5m', allowed a number"),
    "cache": ({"--kv-cache-size-mb": "0"}, "--kv-cache-size-mb: given 0, allowed 1 to"),
    "batch": ({"--max-batch": "0"}, "--max-batch: given 0, allowed 1 to 1024"),
    "step tokens": ({"--max-step-tokens": "0"}, "--max-step-tokens: given 0, allowed 1 to 1048576"),
    "queue": ({"--max-queue": "-1"}, "--max-queue: given -1, allowed 0 to"),
    "residency": ({"--residency-check-sec": "0"}, "--residency-check-sec: given 0.0, allowed 0.1 to"),
    "grace": ({"--shutdown-grace-sec": "-1"}, "--shutdown-grace-sec: given -1.0, allowed 0 to"),
    "callback": (
        {"--callback-url": "file:///etc/passwd"},
        "--callback-url: given 'file:///etc/passwd', allowed an http",
    ),
    "key": ({"--api-key": "short"}, "the API key: given 5 characters, allowed 8 to 512"),
    "host": ({"--host": ""}, "--host: given nothing, allowed an address"),
    "allowed host": ({"--allowed-host": "http://a"}, "--allowed-host: given 'http://a', allowed a host name"),
    "connections": ({"--max-connections": "0"}, "--max-connections: given 0, allowed 1 to"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_argument_that_is_not_allowed(case: str) -> None:
    changes, message = BAD_ARGUMENTS[case]
    changed: dict[str, str | None] = {**GOOD, **changes}
    given = {k: v for k, v in changed.items() if v is not None}
    assert message in cli("serve", *[f"{k}={v}" for k, v in given.items()]).error


def test_help_names_every_argument_and_route() -> None:
    text = cli("serve", "--help").out
    for word in (
        "--worker-id",
        "--gpu-device",
        "--callback-url",
        "--api-key-file",
        "REFENGINE_API_KEY",
        "--allowed-host",
        "--max-connections",
        "POST /execute",
        "SIGTERM",
        "exit codes",
    ):
        assert word in text
    assert "127.0.0.1" in text


def test_required_arguments() -> None:
    result = cli("serve", "--device", "cpu")
    assert result.code == 2
    assert "--worker-id" in result.err


def failed(*arguments: object, device: str = "cpu") -> list[dict[str, Any]]:
    """The log of a start that must fail with exit code 1."""
    line, _ = command("--device", device, *arguments)
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == b""
    return [json.loads(text) for text in done.stderr.splitlines()]


def error_of(log: list[dict[str, Any]]) -> dict[str, Any]:
    error = log[-1]
    assert (error["event"], error["level"]) == ("error", "ERROR")
    assert {"code", "message", "device", "model", "bytes_required", "bytes_available"} <= set(error)
    return error


def test_model_that_is_missing_or_none(tmp_path: Path) -> None:
    error = error_of(failed("--model", tmp_path / "none.gguf"))
    assert error["code"] == "MODEL_LOAD_FAILED"
    assert str(tmp_path / "none.gguf") in error["message"]
    (tmp_path / "wrong.gguf").write_bytes(b"GGML" + bytes(100))
    assert error_of(failed("--model", tmp_path / "wrong.gguf"))["code"] == "MODEL_LOAD_FAILED"
    (tmp_path / "cut.gguf").write_bytes(PACKAGED_MODEL.read_bytes()[:1_000_000])
    assert error_of(failed("--model", tmp_path / "cut.gguf"))["code"] == "MODEL_LOAD_FAILED"
    assert "no vocabulary" in error_of(failed("--model", write_no_vocab(tmp_path)))["message"]


def test_model_that_cannot_be_read(tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, a link to nothing, a file that the user may not read, a socket."""
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "none.gguf")
    (tmp_path / "closed.gguf").write_bytes(PACKAGED_MODEL.read_bytes())
    (tmp_path / "closed.gguf").chmod(0)
    (tmp_path / "empty.gguf").touch()
    paths = [tmp_path, tmp_path / "pipe.gguf", tmp_path / "link.gguf", tmp_path / "empty.gguf", Path("/dev/zero")]
    if os.geteuid() != 0:  # root may read everything
        paths.append(tmp_path / "closed.gguf")
    for path in paths:
        error = error_of(failed("--model", path))
        assert error["code"] == "MODEL_LOAD_FAILED"
        assert str(path) in error["message"]


def test_gpu_that_is_not_there_never_falls_back() -> None:
    log = failed(device="cuda:9999")
    error = error_of(log)
    assert error["code"] == "CUDA_ERROR"
    assert error["gpu_device"] == error["device"] == "cuda:9999"
    assert not [line for line in log if line["event"] in ("model_load_start", "ready")]  # the device comes first


def test_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = error_of(failed("--port", port))
    assert error["code"] == "PORT_UNAVAILABLE"
    assert f"127.0.0.1 port {port}: " in error["message"]


def test_too_little_memory_is_found_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a megabyte free: the error has the bytes, the device and the file; the model is not loaded."""
    runtime = SimpleNamespace(memGetInfo=lambda: (1_000_000, 2_000_000))
    small = device.Device(SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)), "cuda:3", "for a test")
    monkeypatch.setattr(startup, "open_device", lambda spec: small)
    monkeypatch.setattr(startup, "load", lambda *a, **k: pytest.fail("loaded all the same"))
    with pytest.raises(startup.StartFailed) as caught:
        startup.Startup(WorkerOptions(UUID, PACKAGED_MODEL, "cuda:3", 8080), Log(UUID, "m", "cuda:3"))()
    error = caught.value
    assert (error.code, error.available) == ("INSUFFICIENT_VRAM", 1_000_000)
    assert error.required is not None
    assert error.required > 3_228_160
    assert "cuda:3" in error.message
    assert str(PACKAGED_MODEL) in error.message


def test_switches_reach_the_engine() -> None:
    basic = [a for pair in GOOD.items() for a in pair]
    switches = ["--no-batching", "--no-prefix-cache", "--no-graphs", "--no-ahead", "--attention", "reference"]
    numbers = ["--max-step-tokens", "64", "--copy-chunk-kb", "64"]
    for given, on in ((basic, True), ([*basic, *switches, *numbers], False)):
        options = options_of(build_parser().parse_args(["serve", *given]))
        engine = startup.capacity_of(refengine.load().config, options, "cpu", None).engine_options(3)
        assert (engine.batching, engine.prefix_cache, engine.graphs, engine.ahead) == (on, on, on, on)
        assert engine.cache_tokens == 3 * 64
        assert engine.max_step_tokens == (128 if on else 64)
        assert options.attention == ("flash" if on else "reference")
        assert options.copy_chunk_kb == (1024 if on else 64)


def test_what_is_not_said_is_the_same_on_the_command_line_and_in_python() -> None:
    basic = [a for pair in GOOD.items() for a in pair]
    options = options_of(build_parser().parse_args(["serve", *basic]))
    assert options == WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080)
    assert (options.host, options.max_tokens_in, options.max_tokens_out) == ("127.0.0.1", None, 2048)
    assert (options.inference_timeout_sec, options.kv_cache_size_mb, options.callback_url) == (300.0, None, None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_and_only_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup, "tqdm", partial(tqdm, mininterval=0, miniters=1))  # it is over soon
    options = WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080)
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        startup.Startup(options, Log(UUID, "m", "cpu", stream))()
        bar = capsys.readouterr().err
        assert "loading: 100%" in bar if shown else bar == ""
        assert stream.getvalue().count("model_load_progress") == 5


def test_options_are_as_the_worker_is_to_be_reached() -> None:
    assert WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080, host="::1").url == "http://[::1]:8080"
    with pytest.raises(RequestError, match="--on-shortage"):
        WorkerOptions(UUID, PACKAGED_MODEL, "cpu", 8080, on_shortage="hope")


class Callback(HTTPServer):
    """Refuses the first POST, and keeps the bodies."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), CallbackHandler)


class CallbackHandler(BaseHTTPRequestHandler):
    server: Callback

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(503 if len(self.server.bodies) == 1 else 200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def callback() -> Iterator[Callback]:
    with Callback() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server(callback: Callback) -> Iterator[Server]:
    arguments = ["--callback-url", f"http://127.0.0.1:{callback.server_port}/ready", "--api-key", "a-secret-of-ours"]
    with serving("--worker-id", UUID, *arguments, "--inference-timeout-sec", "0.001") as running:
        yield running


def test_order_of_the_start(server: Server) -> None:
    events = [line["event"] for line in server.log if line["event"] != "error"]
    progress = ["model_load_progress"] * 5
    assert events[:9] == ["startup", "model_load_start", *progress, "model_load_complete", "ready"]
    assert [line["percent"] for line in server.events("model_load_progress")] == [0, 25, 50, 75, 100]
    assert {line["worker_id"] for line in server.log} == {UUID}
    assert {line["gpu_device"] for line in server.log} == {"cpu"}


def test_ready_callback_is_repeated_until_it_is_heard(server: Server, callback: Callback) -> None:
    until(lambda: len(callback.bodies) >= 2)
    body = {"worker_id": UUID, "url": server.url, "vram_bytes": 0, "model": "refengine haiku"}
    assert callback.bodies == [body, body]


def test_key_is_wanted_by_all_but_health_and_never_logged(server: Server) -> None:
    key = "a-secret-of-ours"
    values = (
        "Bearer a-secret-of-theirs",
        f"Bearer {key}x",
        "Bearer",
        key,
        f"Basic {key}",
        basic(key),
        basic(f"{key}:"),
        basic(f"me:{key}x"),
        "Basic !",
    )
    wrong = [{}, *({"Authorization": value} for value in values)]
    with server.client() as client:
        assert client.get("/health").status_code == 200
        for headers in wrong:
            for method, path in (
                ("POST", "/execute"),
                ("POST", "/shutdown"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/"),
                ("GET", "/docs"),
                ("GET", "/nothing"),
            ):
                response = client.request(method, path, headers=headers)
                assert (response.status_code, response.json()["code"]) == (401, "UNAUTHORIZED")
                assert response.headers["www-authenticate"].startswith("Basic realm=")  # a browser asks for it
        for value in (f"Bearer {key}", f"bearer  {key}", basic(f"me:{key}"), "b" + basic(f":{key}")[1:]):
            assert client.get("/metrics", headers={"Authorization": value}).status_code == 200
    assert "a-secret" not in server.log_file.read_text()


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_key_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("key-in-a-file\n")

    def options(*given: str) -> WorkerOptions:
        return options_of(build_parser().parse_args(["serve", *[a for pair in GOOD.items() for a in pair], *given]))

    assert options().api_key is None
    assert options("--api-key-file", str(file)).api_key == "key-in-a-file"
    monkeypatch.setenv("REFENGINE_API_KEY", "key-of-the-environment")
    assert options().api_key == "key-of-the-environment"
    assert options("--api-key-file", str(file)).api_key == "key-in-a-file"
    assert options("--api-key", "key-of-the-line").api_key == "key-of-the-line"
    assert "key-of-the-line" not in repr(options("--api-key", "key-of-the-line"))
    wrong = {
        "given both": ("--api-key", "key-of-the-line", "--api-key-file", str(file)),
        "cannot be read": ("--api-key-file", str(tmp_path / "none")),
        "given 0 characters": ("--api-key-file", "/dev/null"),
        "is not a text file": ("--api-key-file", str(PACKAGED_MODEL)),
    }
    for message, given in wrong.items():
        with pytest.raises(RequestError, match=message):
            options(*given)
    monkeypatch.setenv("REFENGINE_API_KEY", "")  # meant to have one, surely
    with pytest.raises(RequestError, match="given 0 characters"):
        options()


def test_timeout_of_the_worker_is_a_limit_of_every_request(server: Server) -> None:
    """A millisecond: over before the stream starts, or just after."""
    headers = {"Authorization": "Bearer a-secret-of-ours", "X-Deadline": "100"}
    with server.client() as client:
        response = client.post("/execute", json={**HAIKU, "job_id": "brief"}, headers=headers)
    data = response.json() if response.status_code == 504 else list(parsed(iter(response.text.splitlines())))[-1][1]
    assert data["code"] == "INFERENCE_TIMEOUT"


# `refengine serve` that stays where it begins to import what it needs, and says which libraries are there already.
IMPORTING = """
import sys, time
class Slow:
    def find_spec(self, name, *rest):
        if name == "refengine.cli.serve":
            print("importing", *sorted(sys.modules), file=sys.stderr, flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv.pop(1)
from refengine.cli import main as cli
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_libraries_are_imported(number: signal.Signals) -> None:
    line, _ = command("--gpu-device", 3, "--model", "m.gguf", script=(IMPORTING, ""))
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    loaded = process.stderr.readline().split()
    assert loaded[0] == "importing"
    assert not {"numpy", "gguf", "tokenizers", "fastapi", "uvicorn"} & set(loaded)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    (found,) = [json.loads(text) for text in err.splitlines()]
    assert (found["event"], found["reason"]) == ("shutdown", "stopped during the start")
    assert (found["model_ref"], found["gpu_device"]) == ("m.gguf", "cuda:3")


def test_the_command_line_leaves_signals_as_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert cli("serve", "--worker-id", "me", "--device", "cpu", "--port", "8080").code == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_signal_while_it_starts() -> None:
    line, _ = command("--device", "cpu", "--port", free_port())
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b'"startup"' in process.stderr.readline()
    until(lambda: b"model_load_start" in process.stderr.readline())
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert json.loads(err.splitlines()[-1])["event"] == "shutdown"
