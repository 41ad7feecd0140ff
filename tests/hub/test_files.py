"""Models by name: a real huggingface_hub against a hub on this machine, and the command line as users run it."""

import errno
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

import refengine
from refengine.gguf.file import GGUFFile
from refengine.hub import files as hub_module
from refengine.hub.files import fetch, resolve
from refengine.hub.names import parse
from refengine.model import PACKAGED_MODEL
from tests.cli_runner import ENVIRONMENT, ROOT, Result, cli
from tests.hub.server import TOKEN, Hub, Repo, hub_serving
from tests.worker.server import Server, command, until

HAIKU = PACKAGED_MODEL.read_bytes()
LARGE = HAIKU + bytes(range(256)) * 90_000  # 26 MB: huggingface_hub writes 10 MiB at a time
MIB = 2**20
SEED = ("--seed", "7")


def repos() -> dict[str, Repo]:
    other = PACKAGED_MODEL.parent / "other.gguf"
    assert not other.exists()
    smaller = {f"haiku-{quant}.gguf": quant.encode() for quant in ("Q8_0", "Q4_K_S", "IQ4_XS", "BF16")}
    extras = {"mmproj-F16.gguf": b"projector", "haiku.imatrix.gguf": b"imatrix", "README.md": b"words"}
    return {
        "haiku": Repo({"haiku-q4_k_m.gguf": HAIKU, **smaller, **extras}, tags=("v1",)),
        "one": Repo({"deep/down/model.gguf": HAIKU, "README.md": b"words"}),
        "large": Repo({"large-Q4_K_M.gguf": LARGE}),
        "several": Repo({"a-Q8_0.gguf": b"a" * MIB, "b-F16.gguf": b"b" * 2 * MIB}),
        "gated": Repo({"gated-Q4_K_M.gguf": HAIKU}, gated=True),
        "private": Repo({"private-Q4_K_M.gguf": HAIKU}, private=True),
        "none": Repo({"model.safetensors": b"weights", "mmproj-F16.gguf": b"projector"}),
        "evil": Repo({"../../../../evil-Q4_K_M.gguf": HAIKU}),
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_serving(**repos()) as served:
        yield served


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HOME": str(home), **more}


def run(hub: Hub, home: Path, *arguments: object, **more: str) -> Result:
    """The command line as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "refengine", *map(str, arguments)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(hub, home, **more),
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub in this process asks `hub`; the folder of its cache. Its settings are read at import only."""
    from huggingface_hub import constants, file_download

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for module in (constants, file_download):  # versions 0.x have a copy of their own there
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    return tmp_path / "hub"


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def error_of(name: str, *words: str) -> str:
    """The one line that a user sees."""
    result = cli("inspect", "--model", name)
    lines = result.err.splitlines()
    assert (result.code, result.out) == (2, ""), result.err
    assert lines[-1].startswith("refengine: error: hf:"), result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[-1], lines[-1]
    return lines[-1]


# As users run it


def test_generate_downloads_once_and_then_needs_no_network(tmp_path: Path) -> None:
    prompt = "Write a haiku about the ocean"
    expected = cli("generate", prompt, "--model", PACKAGED_MODEL, *SEED)
    with hub_serving(**repos()) as hub:
        first = run(hub, tmp_path, "generate", prompt, "--model", "hf:me/haiku:Q4_K_M", *SEED)
        assert (first.code, first.out) == (0, expected.out), first.err
        pinned = f"hf:me/haiku@{hub.repos['me/haiku'].commit}:haiku-q4_k_m.gguf"
        assert first.err.splitlines()[0] == f"refengine: downloading {pinned}, 3.14 MiB"
        assert len(hub.paths("GET", "/cdn/")) == 1
        assert not hub.paths("GET", "xet")
    again = run(hub, tmp_path, "generate", prompt, "--model", "hf:me/haiku:Q4_K_M", *SEED)  # nobody listens any more
    assert (again.code, again.out) == (0, expected.out), again.err
    told = again.err.splitlines()[0]
    assert told.startswith("refengine: the hub cannot be reached (")
    assert told.endswith(f"): using {pinned} from the cache")
    assert "Connection refused" in told


def test_interrupted_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cut, hub.hang = 12 * MIB, True
    line = [sys.executable, "-m", "refengine", "inspect", "--model", "hf:me/large"]
    process = subprocess.Popen(line, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.PIPE)
    until(lambda: sum(f.stat().st_size for f in tmp_path.glob("hub/*/blobs/*.incomplete")) >= 10 * MIB, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130, err
    assert not list(tmp_path.glob("hub/*/snapshots/*/*"))
    hub.cut, hub.hang = None, False
    before = len(hub.requests)
    result = run(hub, tmp_path, "inspect", "--model", "hf:me/large", "--json")
    assert result.code == 0, result.err
    assert "resuming after 10.00 MiB from an earlier run" in result.err
    (content,) = [r for r in hub.requests[before:] if "/cdn/" in r.path]
    assert content.headers["Range"] == f"bytes={10 * MIB}-"
    path = Path(json.loads(result.out)["file"])
    assert path.name == "large-Q4_K_M.gguf"
    assert path.read_bytes() == LARGE
    assert not list(tmp_path.glob("hub/*/blobs/*.incomplete"))


def test_two_that_want_the_same_download_it_once(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.5  # the first is to last until the second has come
    line = [sys.executable, "-m", "refengine", "inspect", "--model", "hf:me/large"]

    def start() -> subprocess.Popen[bytes]:
        environ = environment(hub, tmp_path)
        return subprocess.Popen(line, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    first = start()
    until(lambda: hub.paths("GET", "/cdn/"), 20)
    second = start()
    assert second.stderr is not None
    lines = [second.stderr.readline() for _ in range(2)]
    hub.pause = 0.0
    said = [process.communicate(timeout=60) for process in (first, second)]
    assert [out[:4] for out, _ in said] == [b"file"] * 2
    assert b"large-Q4_K_M.gguf: another process is downloading it; waiting" in lines[1]
    assert len(hub.paths("GET", "/cdn/")) == 1


def test_progress_bar_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.0005
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    line = [sys.executable, "-m", "refengine", "inspect", "--model", "hf:me/large"]
    process = subprocess.Popen(line, cwd=ROOT, env=environment(hub, tmp_path), stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=20) == 0
    assert re.search(rb"large-Q4_K_M\.gguf: +\d+%\|", shown), shown


# The worker


def test_worker_serves_a_model_by_name(hub: Hub, tmp_path: Path) -> None:
    with worker(hub, tmp_path, "hf:me/haiku:Q4_K_M") as (process, server):
        until(lambda: process.poll() is not None or server.events("ready"), 30)
        assert process.poll() is None, server.log_file.read_text()
        with server.client() as client:
            assert client.get("/health").json()["model"] == "refengine haiku"
        assert server.stop() == 0
    assert {line["model_ref"] for line in server.log} == {"hf:me/haiku:Q4_K_M"}
    events = [line["event"] for line in server.log]
    assert events[:2] == ["startup", "model_load_start"]
    download = [line for line in server.events("model_load_progress") if line.get("phase") == "download"]
    assert [line["percent"] for line in download if "percent" in line] == [0, 25, 50, 75, 100]
    commit = hub.repos["me/haiku"].commit
    assert (download[-1]["commit"], download[-1]["downloaded_bytes"]) == (commit, len(HAIKU))
    assert download[-1]["pinned"] == f"hf:me/haiku@{commit}:haiku-q4_k_m.gguf"


def test_signal_ends_a_worker_that_downloads(hub: Hub, tmp_path: Path) -> None:
    hub.cut, hub.hang = MIB, True
    with worker(hub, tmp_path, "hf:me/haiku:Q4_K_M") as (process, server):
        until(lambda: hub.paths("GET", "/cdn/"), 20)
        start = time.monotonic()
        process.terminate()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - start < 5  # at once, on a busy machine; the download hangs for ever
    assert [line["event"] for line in server.log][-1] == "shutdown"  # all lines are JSON


def test_worker_that_cannot_have_its_model(hub: Hub, tmp_path: Path) -> None:
    with worker(hub, tmp_path, "hf:me/gated") as (process, server):
        assert process.wait(timeout=20) == 1
    (error,) = server.events("error")
    assert (error["code"], error["model"]) == ("MODEL_LOAD_FAILED", "hf:me/gated")
    assert "this repo is gated" in error["message"]


class worker:
    """A worker that may still be starting."""

    def __init__(self, hub: Hub, home: Path, model: str) -> None:
        line, url = command("--device", "cpu", "--model", model)
        self._log = home / "log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(line, stderr=log, stdout=log, cwd=ROOT, env=environment(hub, home))
        self._server = Server(self._process, url, self._log)

    def __enter__(self) -> tuple["subprocess.Popen[bytes]", Server]:
        return self._process, self._server

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


# What the hub and the cache may answer


def found(name: str) -> hub_module.Found:
    reference = parse(name)
    assert reference is not None
    return fetch(reference)


def test_every_command_and_the_api_take_a_name(here: Path, hub: Hub, tmp_path: Path) -> None:
    name = "hf:me/haiku:haiku-q4_k_m.gguf"
    assert cli("tokenize", "a frog", "--model", name).code == 0
    assert cli("inspect", name).code == 0
    assert cli("logits", "--model", name, "--prompt", "a", "--output", tmp_path / "l.npz").code == 0
    assert refengine.load(name).config.name == "refengine haiku"
    assert len(hub.paths("GET", "/cdn/")) == 1


def test_split_model(here: Path, hub: Hub, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-Q8_0.gguf", "llama", split_max_tensors=1)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.arange(i + 3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    hub.repos["me/split"] = Repo({f"Q8_0/{part.name}": part.read_bytes() for part in parts} | {"m-F16.gguf": b"x"})
    path = found("hf:me/split:Q8_0").path
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    with GGUFFile(path) as file:
        assert sorted(file.tensors) == ["t0", "t1", "t2"]
    commit = hub.repos["me/split"].commit
    before = len(hub.requests)
    assert found(f"hf:me/split@{commit}:Q8_0/m-Q8_0-00002-of-00003.gguf").path == path
    assert len(hub.requests) == before  # what a commit holds never changes


def test_revisions(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found("hf:me/haiku@v1:Q8_0")
    commit = hub.repos["me/haiku"].commit
    assert first.commit == commit
    assert first.path.read_bytes() == b"Q8_0"
    error_of("hf:me/haiku@v2:Q8_0", "this repo has no revision v2")
    hub.repos["me/haiku"].files["haiku-Q8_0.gguf"] = b"newer"
    newer = found("hf:me/haiku:Q8_0")
    assert newer.path.read_bytes() == b"newer"
    assert newer.commit != commit
    go_offline(monkeypatch)
    assert found("hf:me/haiku:Q8_0") == hub_module.Found(newer.path, newer.commit, newer.pinned, 0)
    assert found("hf:me/haiku@v1:Q8_0").path == found(first.pinned).path == first.path


def test_offline(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = found("hf:me/haiku:Q8_0").pinned
    go_offline(monkeypatch)
    before = len(hub.requests)
    told: list[str] = []
    resolve("hf:me/haiku:Q8_0", told.append)
    assert told == [f"the hub cannot be reached (HF_HUB_OFFLINE is set): using {pinned} from the cache"]
    error_of("hf:me/haiku:BF16", "HF_HUB_OFFLINE is set", f"has only other models of this repo: {pinned} (4 bytes)")
    error_of("hf:me/haiku@v1:Q8_0", "(HF_HUB_OFFLINE is set)", f"other models of this repo: {pinned} (4 bytes)")
    error_of("hf:me/one", "HF_HUB_OFFLINE is set", f"the cache has no model of this repo ({here})")
    assert len(hub.requests) == before


def test_hub_that_is_ill_or_none(here: Path, hub: Hub) -> None:
    pinned = found("hf:me/haiku:Q8_0").pinned
    hub.status = 503
    told: list[str] = []
    resolve("hf:me/haiku:Q8_0", told.append)
    assert told == [f"the hub cannot be reached (it answers with HTTP status 503): using {pinned} from the cache"]
    error_of("hf:me/one", hub.url, "HTTP status 503")
    hub.status = 418
    error_of("hf:me/one", "the hub refuses the request with HTTP status 418")
    hub.status, hub.plain = None, True
    error_of("hf:me/one", f"the server at {hub.url} is not a hub")


def test_repos_that_are_missing_or_closed(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    error_of("hf:me/nothing", "has no such repo, or it is private", "HF_TOKEN (there is none)")
    error_of("hf:me/private", "has no such repo, or it is private", "HF_TOKEN (there is none)")
    error_of("hf:me/gated", "this repo is gated: ask for access on its page", "HF_TOKEN (there is none)")
    error_of("hf:me/none", "no GGUF model")
    error_of("hf:me/several", "a-Q8_0.gguf (1.00 MiB), b-F16.gguf (2.00 MiB)")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert found("hf:me/private").path.read_bytes() == found("hf:me/gated").path.read_bytes() == HAIKU
    error_of("hf:me/nothing", "has no such repo", "with a token that may read it")
    for request in hub.requests:
        assert "/cdn/" not in request.path or "authorization" not in {k.lower() for k in request.headers}
    for wrong, words in (
        ("hf_wrong", "the hub refuses the request (HTTP status 401)"),
        ("hf_wrong\x7fsecret", "the hub refuses"),
        ("hf_wröng secret", "the token (HF_TOKEN) has characters that are not allowed in a token"),
    ):
        monkeypatch.setenv("HF_TOKEN", wrong)
        message = error_of("hf:me/haiku:Q8_0", words)
        assert wrong not in message
        assert "secret" not in message


def test_connection_that_breaks(here: Path, hub: Hub) -> None:
    """Within a run the library goes on by itself; where it gives up, the next run does."""
    hub.cut = 11 * MIB
    told: list[str] = []
    path = resolve("hf:me/large", told.append)
    assert path.read_bytes() == LARGE
    ranges = [r.headers.get("Range") for r in hub.paths("GET", "/cdn/")]
    assert ranges == [None, f"bytes={10 * MIB}-", f"bytes={20 * MIB}-"]
    assert any("Trying to resume" in line for line in told)
    assert "aSecret" not in str(told)
    shutil.rmtree(here)
    hub.cut = MIB
    error_of("hf:me/large", "the download of large-Q4_K_M.gguf was interrupted", "try again later")


def test_file_too_large_for_plain_http_is_left_to_the_library(
    here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub_module, "MAX_HTTP_BYTES", 1000)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are not here
    assert found("hf:me/haiku:Q4_K_M").path.read_bytes() == HAIKU


def test_cache_on_a_file_system_without_links(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda folder: False)  # versions 0.x ask here alone
    path = found("hf:me/haiku:Q4_K_M").path
    assert [file for file in here.rglob("*") if file.is_file() and file.stat().st_size == len(HAIKU)] == [path]
    assert found("hf:me/haiku:Q4_K_M").n_downloaded == 0


def test_hub_that_knows_no_ranges(here: Path, hub: Hub) -> None:
    hub.ignore_range = True
    begun(here, LARGE, LARGE[:MIB])
    assert resolve("hf:me/large").read_bytes() == LARGE


@pytest.mark.parametrize("there", [b"x" * MIB, LARGE + b"more", LARGE[:-1] + b"x"], ids=["wrong", "long", "damaged"])
def test_what_an_earlier_run_left_is_checked(here: Path, hub: Hub, there: bytes) -> None:
    blob = begun(here, LARGE, there)
    told: list[str] = []
    assert resolve("hf:me/large", told.append).read_bytes() == LARGE
    assert blob.read_bytes() == LARGE
    restarted = "large-Q4_K_M.gguf: the part from the earlier run was damaged; downloading from the start"
    assert (restarted in told) == (len(there) <= len(LARGE))


def begun(here: Path, content: bytes, there: bytes) -> Path:
    blob = here / "models--me--large" / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True)
    Path(f"{blob}.incomplete").write_bytes(there)
    return blob


def test_content_that_is_not_what_was_announced(here: Path, hub: Hub) -> None:
    hub.garbled = True
    error_of("hf:me/haiku:Q4_K_M", "the downloaded haiku-q4_k_m.gguf did not have the SHA-256", "deleted")
    assert not [path for path in here.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_file_in_the_cache_that_was_cut(here: Path, hub: Hub) -> None:
    path = found("hf:me/haiku:Q4_K_M").path
    os.truncate(path, 1000)
    error_of("hf:me/haiku:Q4_K_M", f"{path} has 1000 bytes, not {len(HAIKU)}: delete it")


def test_file_names_do_not_lead_out_of_the_cache(here: Path, hub: Hub) -> None:
    error_of("hf:me/evil", "the repo's file name '../../../../evil-Q4_K_M.gguf' is not allowed")
    error_of("hf:me/evil:Q4_K_M", "the repo's file name '../../../../evil-Q4_K_M.gguf' is not allowed")
    assert not list(here.parent.rglob("evil*"))
    assert not hub.paths("GET", "/cdn/")


def test_no_room(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=MIB))
        error_of("hf:me/one", f"too little disk space for {here}: 3.14 MiB are needed, 1.00 MiB are", "HF_HOME")
    assert not hub.paths("GET", "/cdn/")
    with monkeypatch.context() as patched:

        class Full(io.FileIO):
            def write(self, data: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(hub_module, "open", lambda path, mode: Full(path, mode), raising=False)
        error_of("hf:me/one", f"too little disk space for {here}: it is full")
    assert found("hf:me/one").path.read_bytes() == HAIKU


def test_cache_that_cannot_be_written(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    here.write_bytes(b"a file in its place")
    error_of("hf:me/one", f"the cache {here} cannot be used: Not a directory")
