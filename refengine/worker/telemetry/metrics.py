"""Prometheus metrics, all labelled with the model's quant_kind; and the engine's hook that feeds some of them.

Counters and histograms are told of what happens; gauges are read from the cached state when somebody asks.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from refengine.engine.generation import Generation, Token
from refengine.engine.hooks import MetricsHook
from refengine.worker.telemetry.status import State

MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 300_000)
MS_FINE = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200, 500, 1000)
PURPOSES = ("weights", "kv", "workspace")
OUTCOMES = ("eos", "stop", "length", "cancelled", "disconnected", "timeout", "error", "refused")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One worker's registry. Any thread may tell it something."""

    def __init__(self, state: State) -> None:
        disable_created_metrics()
        self._state, self._kind = state, state.model.quant_kind
        self._registry = registry = CollectorRegistry()
        plain, kind = ["quant_kind"], self._kind

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, plain, registry=registry).labels(kind)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, plain, registry=registry).labels(kind)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, plain, buckets=buckets, registry=registry).labels(kind)

        requests = Counter(
            "worker_requests", "Requests to /execute by how they ended", ["outcome", *plain], registry=registry
        )
        self.requests = {outcome: requests.labels(outcome, kind) for outcome in OUTCOMES}
        self.tokens = counter("worker_tokens_generated", "Tokens drawn")
        self.prompt_tokens = counter("worker_prompt_tokens", "Tokens of prompts that were taken in")
        self.duration_ms = histogram("worker_inference_duration_ms", "From accept to the last event", MS)
        self.first_token_ms = histogram("worker_first_token_ms", "From accept to the first token", MS)
        self.inter_token_ms = histogram("worker_inter_token_ms", "Between two tokens of a request", MS_FINE)
        self._hits = counter("worker_prefix_cache_hits", "Blocks of prompts found in the prefix cache")
        self._misses = counter("worker_prefix_cache_misses", "Blocks of prompts not found there")
        self._seen_hits = self._seen_misses = 0
        vram = Gauge("worker_vram_bytes", "Device memory by purpose", ["kind", *plain], registry=registry)
        self._vram = {purpose: vram.labels(purpose, kind) for purpose in PURPOSES}
        blocks = Gauge("worker_kv_blocks", "Blocks of the KV cache by state", ["state", *plain], registry=registry)
        self._blocks = {name: blocks.labels(name, kind) for name in ("used", "cached", "free")}
        self._batch = gauge("worker_batch_size", "Sequences that run together")
        self._queue = gauge("worker_queue_depth", "Requests that wait for their turn")
        self._uptime = gauge("worker_uptime_seconds", "Since the model was loaded")

    def text(self) -> bytes:
        """The exposition format. Called in one thread only."""
        vram_bytes, engine = self._state.load.vram_bytes, self._state.load.engine
        for purpose, gauge in self._vram.items():
            gauge.set(vram_bytes.get(purpose, 0))
        self._blocks["used"].set(engine.blocks_used)
        self._blocks["cached"].set(engine.blocks_cached)
        self._blocks["free"].set(engine.blocks_free)
        self._batch.set(engine.running)
        self._queue.set(engine.waiting)
        self._uptime.set(self._state.uptime)
        self._hits.inc(engine.prefix_hits - self._seen_hits)
        self._misses.inc(engine.prefix_misses - self._seen_misses)
        self._seen_hits, self._seen_misses = engine.prefix_hits, engine.prefix_misses
        return generate_latest(self._registry)


class EngineHook(MetricsHook):
    """The engine's own events, in the engine's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_start(self, generation: Generation) -> None:
        self._metrics.prompt_tokens.inc(generation.n_prompt)

    def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
        self._metrics.tokens.inc()
        if generation.n_generated > 1:
            self._metrics.inter_token_ms.observe(seconds * 1000)
