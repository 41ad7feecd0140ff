"""The operations for a model's `decode()`: rows of sequences in a cache, with the names of `forward()`.

In a decode step, there is one new token for each of n sequences; in a pass over prompts, there are several.

A `Value` stands for rows that may not have been computed yet. It has no arithmetic of its own: `x * factor` is
`ops.scale(x, factor)` here. The protocol defines what is computed; the implementation (`cuda.decode.ops`) decides how
many launches that takes and which operations are fused: a norm, a bias, an activation or a residual may be deferred
until the adjacent product is known. An implementation raises a RefengineError for a combination that it does not
support.

Shapes: n rows, one for each new token. Weights are in the form of the implementation's device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Value = Any
Weight = Any
DecodeTrace = Callable[[str, int, Value], None]  # called with a layer's result: "l_out", il, (n, n_embd)


class DecodeOps(Protocol):
    """The operations of a decode step. n_ctx: the length of the longest sequence in the cache, in tokens."""

    @property
    def n_ctx(self) -> int: ...

    def embedding(self, w: Weight) -> Value:
        """The rows of w for the fed tokens. (n, n_embd)"""

    def position_embedding(self, w: Weight) -> Value:
        """The rows of w for the tokens' positions. (n, n_embd)"""

    def rows(self, x: Value) -> Value:
        """The rows of x whose logits are wanted. (n_out, n_embd)"""

    def rms_norm(self, x: Value, weight: Weight, eps: float) -> Value:
        """RMS norm over the last axis: of rows (n, width), or of each head (n, n_head, head_dim)."""

    def layer_norm(self, x: Value, weight: Weight, bias: Weight, eps: float) -> Value:
        """Layer norm over the last axis. (n, width)"""

    def linear(self, x: Value, w: Weight, bias: Weight | None = None) -> Value:
        """x wᵀ + bias. (n, n_out)"""

    def split(self, x: Value, widths: tuple[int, ...]) -> tuple[Value, ...]:
        """Split x by columns into parts of these widths. (n, width) each"""

    def add(self, a: Value, b: Value) -> Value:
        """a + b. (n, width)"""

    def swiglu(self, gate: Value, up: Value) -> Value:
        """silu(gate) · up. (n, n_ff)"""

    def swiglu_clamped(self, gate: Value, up: Value) -> Value:
        """`ops.activation.swiglu_clamped`. (n, n_ff), or (n, n_expert_used, n_ff_exp)"""

    def gelu(self, x: Value) -> Value:
        """tanh GELU. (n, n_ff)"""

    # --- Attention ---

    def heads(self, x: Value, n_head: int) -> Value:
        """x (n, n_head · head_dim) as heads. (n, n_head, head_dim)"""

    def rope_angles(self, constants: Any, freq_factors: Weight | None = None) -> Any:
        """The angles of every position, for `rope_norm` and `rope_neox`."""

    def rope_norm(self, x: Value, angles: Any) -> Value:
        """RoPE of heads, on pairs (2i, 2i + 1). (n, n_head, head_dim)"""

    def rope_neox(self, x: Value, angles: Any) -> Value:
        """RoPE of heads, on pairs (i, i + n_rot / 2). (n, n_head, head_dim)"""

    def scale(self, x: Value, factor: float) -> Value:
        """x · factor, rounded to float32 before: of heads (n, n_head, head_dim), or of rows (n, width)."""

    def attention(
        self,
        il: int,
        q: Value,
        k: Value,
        v: Value,
        *,
        scale: float,
        window: int = 0,
        sinks: Weight | None = None,
    ) -> Value:
        """Append K and V to layer il's cache, then compute `ops.attention.attention` over it. (n, n_embd_q)"""

    # --- Mixture of experts ---

    def top_experts(self, scores: Value, n_used: int) -> Value:
        """The experts with the highest scores (n, n_expert), best first. (n, n_expert_used)"""

    def take_experts(self, scores: Value, chosen: Value) -> Value:
        """The chosen experts' scores. (n, n_expert_used)"""

    def row_soft_max(self, x: Value) -> Value:
        """Softmax over the last axis. (n, n_expert_used)"""

    def linear_experts(self, x: Value, w: Weight, chosen: Value, bias: Weight | None = None) -> Value:
        """x times the chosen experts' matrices, + their biases. x: (n, n_in), or (n, n_expert_used, n_in).

        Returns (n, n_expert_used, n_out).
        """

    def sum_experts(self, experts: Value, shares: Value) -> Value:
        """Σ over ranks, in their order, of experts (n, n_expert_used, n_embd) times shares. (n, n_embd)"""


def no_trace(name: str, il: int, x: Value) -> None:
    """The DecodeTrace that records nothing."""
