"""The statistics of an engine, and a hook with methods that the engine calls at events; they do nothing by default."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.engine.generation import Generation, Token


@dataclass(frozen=True)
class EngineStats:
    """The current state of an engine, and its counters since it was made.

    running, waiting: sequences. blocks_used, blocks_cached, blocks_free: KV cache blocks; their sum is all blocks.
    prefix_hits, prefix_misses: prompt blocks that were found and not found in the prefix cache.
    preemptions: how often a sequence was preempted.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    preemptions: int = 0


@dataclass(frozen=True)
class StepStats:
    """One step: the engine's state after it, the sequences that got a token, the prompt tokens computed.

    seconds: the time that `Engine.step` took to get its results; a step launched ahead had begun before.
    """

    engine: EngineStats
    batch_size: int
    prefill_tokens: int
    seconds: float


class MetricsHook:
    """Override the methods you need. They run in the thread that calls `Engine.step` and must be fast and not raise."""

    def on_start(self, generation: Generation) -> None:
        """The engine has accepted a request, which may still wait in the queue."""

    def on_first_token(self, generation: Generation, seconds: float) -> None:
        """The first token was sampled, `seconds` after the request was accepted."""

    def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
        """A token was sampled, `seconds` after the previous one, or after the request was accepted."""

    def on_end(self, generation: Generation, reason: str) -> None:
        """The request ended: `eos`, `stop`, `length`, `cancelled` or `error`."""

    def on_step(self, stats: StepStats) -> None:
        """A step that computed something has ended."""
