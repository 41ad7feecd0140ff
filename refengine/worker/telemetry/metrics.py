"""Prometheus metrics, all labelled with the model's quant_kind, and the engine hook that updates some of them.

Counters and histograms are updated by events; gauges are set from the cached state when /metrics is requested.
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
    """The metrics of one worker. Any thread may update them."""

    def __init__(self, state: State) -> None:
        disable_created_metrics()
        self._state, self._kind = state, state.model.quant_kind
        self._registry = registry = CollectorRegistry()
        plain, kind = ["quant_kind"], self._kind

        def counter(name: str, description: str) -> Counter:
            return Counter(name, description, plain, registry=registry).labels(kind)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(name, description, plain, registry=registry).labels(kind)

        def histogram(name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, description, plain, buckets=buckets, registry=registry).labels(kind)

        requests = Counter(
            "worker_requests", "Jobs and refused requests by outcome", ["outcome", *plain], registry=registry
        )
        self.requests = {outcome: requests.labels(outcome, kind) for outcome in OUTCOMES}
        self.tokens = counter("worker_tokens_generated", "Generated tokens")
        self.prompt_tokens = counter("worker_prompt_tokens", "Prompt tokens of started jobs")
        self.duration_ms = histogram(
            "worker_inference_duration_ms", "Milliseconds from the acceptance of a job to its last event", MS
        )
        self.first_token_ms = histogram(
            "worker_first_token_ms", "Milliseconds from the acceptance of a job to its first token", MS
        )
        self.inter_token_ms = histogram(
            "worker_inter_token_ms", "Milliseconds between two successive tokens of a job", MS_FINE
        )
        self._hits = counter("worker_prefix_cache_hits", "Prompt blocks found in the prefix cache")
        self._misses = counter("worker_prefix_cache_misses", "Prompt blocks not found in the prefix cache")
        self._seen_hits = self._seen_misses = 0
        vram = Gauge("worker_vram_bytes", "Bytes of device memory by purpose", ["kind", *plain], registry=registry)
        self._vram = {purpose: vram.labels(purpose, kind) for purpose in PURPOSES}
        blocks = Gauge("worker_kv_blocks", "KV cache blocks by state", ["state", *plain], registry=registry)
        self._blocks = {name: blocks.labels(name, kind) for name in ("used", "cached", "free")}
        self._batch = gauge("worker_batch_size", "Sequences in the running batch")
        self._queue = gauge("worker_queue_depth", "Jobs waiting to run")
        self._uptime = gauge("worker_uptime_seconds", "Seconds since the model was loaded")

    def text(self) -> bytes:
        """All metrics in Prometheus' text format. To be called in one thread only."""
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
    """Updates metrics from the engine's events. Called in the engine's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_start(self, generation: Generation) -> None:
        self._metrics.prompt_tokens.inc(generation.n_prompt)

    def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
        self._metrics.tokens.inc()
        if generation.n_generated > 1:
            self._metrics.inter_token_ms.observe(seconds * 1000)
