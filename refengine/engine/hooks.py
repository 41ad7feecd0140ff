"""What an engine reports while it runs: statistics, and a hook whose methods do nothing until they are overridden."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.engine.generation import Generation, Token


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds, and what it has counted since it was made.

    running, waiting: sequences. blocks_used, blocks_cached, blocks_free: blocks of the KV cache; together all of them.
    prefix_hits, prefix_misses: blocks of prompts that the prefix cache had and lacked. preemptions: of sequences.
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
    """One step: the engine after it, the sequences that drew a token, the prompt tokens computed, and its duration."""

    engine: EngineStats
    batch_size: int
    prefill_tokens: int
    seconds: float


class MetricsHook:
    """Override the methods you need; they run in the thread that calls `Engine.step`, quickly and without raising."""

    def on_start(self, generation: Generation) -> None:
        """The engine has accepted a request, which may still wait for its turn."""

    def on_first_token(self, generation: Generation, seconds: float) -> None:
        """The first token was drawn, so many seconds after the start."""

    def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
        """A token was drawn, so many seconds after the previous one or after the start."""

    def on_end(self, generation: Generation, reason: str) -> None:
        """The request ended: `eos`, `stop`, `length`, `cancelled` or `error`."""

    def on_step(self, stats: StepStats) -> None:
        """A step that did something is done."""
