"""What an engine tells about itself while it runs: a hook with no-op methods, to be overridden where it is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from refengine.engine.generation import Generation, Token


class InferenceStep(Protocol):
    """start → next_token → free: what batching, serving and generating stand on. See `engine.Engine`."""

    def start(self, ids: Any, params: Any = None) -> Generation: ...
    def next_token(self, generation: Generation) -> Token: ...
    def free(self, generation: Generation) -> None: ...


@dataclass(frozen=True)
class StepFacts:
    """One step: sequences that got a token, prompt tokens computed, requests that wait, blocks by use (all, together),
    blocks that the prefix cache had and lacked so far, and preemptions so far."""

    batch_size: int
    prefill_tokens: int
    queue_depth: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    prefix_hits: int
    prefix_misses: int
    preemptions: int
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
