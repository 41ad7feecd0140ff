"""The worker's other routes: health, metrics, OpenAPI; and answers to what it does not know."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import refengine
from refengine.worker.errors import STATUS, WorkerError, to_worker_error
from refengine.worker.telemetry.status import ModelInfo, State
from tests.model_files import ModelFiles
from tests.tokenizer.test_hf_json import byte_level_json
from tests.worker.server import HAIKU, Server, parsed, serving, write_talker
from tools.make_model import write_model


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_health_has_everything(server: Server) -> None:
    with server.client() as client:
        health = client.get("/health").json()
    assert health.pop("uptime_seconds") >= 0
    assert health == {
        "status": "healthy",
        "reasons": [],
        "model": "refengine haiku",
        "resident": False,
        "quant_kind": "Q4_K_M",
        "vram_bytes_used": 0,
        "vram_bytes": {},
        "tokenizer_kind": "gguf-bpe",
        "vocab_size": 2048,
        "context_length": 512,
        "device": "cpu",
        "sm": None,
        "cuda_runtime_version": None,
        "active_expert_count": None,
    }


@pytest.mark.parametrize(
    ("name", "kind", "active"),
    [("llama-q4_0", "gguf-spm", None), ("qwen2-q4_k_m", "gguf-bpe", None), ("gpt-oss-mxfp4_moe", "gguf-bpe", 2)],
)
def test_health_tells_of_this_model(name: str, kind: str, active: int | None, tiny_model: ModelFiles) -> None:
    model = refengine.load(tiny_model(name))
    health = State(ModelInfo.of(model)).health()
    assert (health["tokenizer_kind"], health["active_expert_count"]) == (kind, active)
    assert (health["vocab_size"], health["context_length"]) == (model.config.n_vocab, model.config.n_ctx_train)
    assert health["model"] == model.config.name


def test_health_tells_of_a_tokenizer_beside_the_model(tmp_path: Path) -> None:
    for arch, n_vocab in (("gpt2", 261), ("gpt-oss", 261)):
        write_model(tmp_path / f"{arch}.gguf", arch, "F32", vocab="none", n_vocab=n_vocab, n_layer=1)
        byte_level_json(tmp_path / "tokenizer.json")
        facts = ModelInfo.of(refengine.load(tmp_path / f"{arch}.gguf"))
        assert facts.tokenizer_kind == "hf-json"


def test_limits_where_nothing_is_said(server: Server) -> None:
    server.run(prompt="Write a haiku about rain", seed=1, job_id="plain")
    (line,) = [line for line in server.events("execute_start") if line["job_id"] == "plain"]
    assert (line["max_tokens"], line["deadline_sec"]) == (2048, 300.0)


def test_metrics_are_all_there_and_labelled(server: Server) -> None:
    with server.client() as client:
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [line for line in response.text.splitlines() if not line.startswith("#")]
    names = {line.split("{")[0] for line in samples}
    plain = ("requests_total", "tokens_generated_total", "prompt_tokens_total", "prefix_cache_hits_total")
    gauges = ("prefix_cache_misses_total", "vram_bytes", "kv_blocks", "batch_size", "queue_depth", "uptime_seconds")
    histograms = [
        f"{name}_{part}"
        for name in ("inference_duration_ms", "first_token_ms", "inter_token_ms")
        for part in ("bucket", "sum", "count")
    ]
    assert names == {f"worker_{name}" for name in (*plain, *gauges, *histograms)}
    assert all('quant_kind="Q4_K_M"' in line for line in samples)
    for name, label, values in (
        ("worker_vram_bytes", "kind", {"weights", "kv", "workspace"}),
        ("worker_kv_blocks", "state", {"used", "cached", "free"}),
    ):
        found = {m[1] for line in samples if line.startswith(name) and (m := re.search(rf'{label}="(\w+)"', line))}
        assert found == values


def test_metrics_count_what_was_done(server: Server) -> None:
    names = ("worker_tokens_generated_total", "worker_prompt_tokens_total", "worker_first_token_ms_count")
    more = ("worker_inference_duration_ms_count", "worker_inter_token_ms_count")
    before = {name: server.metric(name) for name in (*names, *more)}
    ended = server.metric("worker_requests_total", outcome="eos")
    end = server.run(**HAIKU)[-1][1]
    after = {name: server.metric(name) - value for name, value in before.items()}
    n = end["tokens_out"]
    assert list(after.values()) == [n, end["tokens_in"], 1, 1, n - 1]
    assert server.metric("worker_requests_total", outcome="eos") == ended + 1


def test_unknown_routes_and_methods(server: Server) -> None:
    with server.client() as client:
        for method, path, status in (("GET", "/nothing", 404), ("GET", "/execute", 405), ("POST", "/health", 405)):
            response = client.request(method, path)
            assert response.status_code == status
            assert response.json()["code"] == "INVALID_REQUEST"
        assert client.post("/load", json={"model": "other.gguf"}).status_code == 404  # one model, for good


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    host = server.url.removeprefix("http://")
    with server.client() as client:
        for origin in ("http://evil.test", "null", f"http://evil.test/{host}", f"http://{host}.evil.test"):
            response = client.post("/shutdown", headers={"Origin": origin})
            assert (response.status_code, response.json()["code"]) == (403, "UNAUTHORIZED")
        assert client.get("/health", headers={"Origin": server.url}).status_code == 200
    assert server.run(**HAIKU)[-1][0] == "end"


def test_openapi_describes_the_requests(server: Server) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert {"/execute", "/cancel", "/shutdown", "/health", "/metrics"} <= set(paths)
    schema = paths["/execute"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["job_id", "prompt"]
    assert schema["additionalProperties"] is False


def test_codes_have_their_status() -> None:
    listed = {
        "INVALID_REQUEST": 400,
        "MODEL_LOAD_FAILED": 500,
        "INSUFFICIENT_VRAM": 503,
        "VRAM_OOM": 500,
        "CUDA_ERROR": 500,
        "INFERENCE_TIMEOUT": 504,
        "CANCELLED": 499,
        "INTERNAL": 500,
    }
    assert listed.items() <= STATUS.items()
    assert WorkerError("CANCELLED", "gone\n\x1b[31m").body() == {
        "code": "CANCELLED",
        "message": "gone \\x1b[31m",
        "field": None,
    }


def test_unexpected_errors_tell_no_details() -> None:
    cuda = type("CUDARuntimeError", (RuntimeError,), {})
    assert to_worker_error(cuda("at 0x7f"), on_gpu=True).code == "CUDA_ERROR"
    assert to_worker_error(cuda("at 0x7f"), on_gpu=False).code == "INTERNAL"
    assert to_worker_error(MemoryError("the prompt")).code == "VRAM_OOM"
    assert "prompt" not in to_worker_error(ValueError("the prompt")).message


def test_silence_is_broken_by_comments_and_figures_come_where_asked_for(tmp_path: Path) -> None:
    options = ("--model", write_talker(tmp_path), "--max-batch", 1, "--heartbeat-sec", 0.1, "--metrics-event-sec", 0.05)
    with serving(*options) as server, server.client() as client, server.client() as other:
        body = {"job_id": "waits", "prompt": "go on", "max_tokens": 20, "seed": 5}
        with server.stream(client, prompt="go on", max_tokens=2000) as first:
            next(first)
            with other.stream("POST", "/execute", json=body) as response:
                lines = response.iter_lines()
                started = [next(lines) for _ in range(3)]
                assert started[0] == "event: started"
                assert next(lines) == ": nothing yet"  # while the first one runs
                client.close()
                events = list(parsed(lines))
        assert [name for name, _ in events if name != "metrics"] == ["token"] * 20 + ["end"]
        events = server.run(prompt="go on", max_tokens=2000, seed=5)
        figures = [data for name, data in events if name == "metrics"]
        assert figures
        for data in figures:
            assert 0 < data["tokens_out"] <= 2000
            assert data["tokens_per_second"] > 0
            assert data["batch_size"] in (0, 1)
            assert data["kv_blocks_used"] + data["kv_blocks_free"] > 0
        assert events[-1][0] == "end"
