"""What an engine tells about itself while it runs: a hook with no-op methods, to be overridden where it is wanted."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.engine.generation import Generation, Token


@dataclass(frozen=True)
class EngineFacts:
    """What an engine holds: sequences that run and wait, blocks by use (together all of them); and, so far, blocks of
    prompts that the prefix cache had and lacked, and preemptions."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    preemptions: int = 0


@dataclass(frozen=True)
class StepFacts:
    """One step: what the engine holds after it, sequences that drew a token, prompt tokens computed, and its time."""

    engine: EngineFacts
    batch_size: int
    prefill_tokens: int
    seconds: float


class MetricsHook:
    """Override what is wanted. Called from the thread that calls `Engine.step`; must be quick and must not raise."""

    def on_start(self, generation: Generation) -> None:
        """A request was taken in (it may wait)."""

    def on_first_token(self, generation: Generation, seconds: float) -> None:
        """Seconds from the start to the first token."""

    def on_token(self, generation: Generation, token: Token, seconds: float) -> None:
        """Seconds since the token before, or since the start."""

    def on_end(self, generation: Generation, reason: str) -> None:
        """`eos`, `stop`, `length`, `cancelled` or `error`."""

    def on_step(self, facts: StepFacts) -> None:
        """After every step that did something."""
