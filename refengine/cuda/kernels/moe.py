"""Mixture of experts: bindings of kernels_cu/moe.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from refengine.array import Array
from refengine.cuda.kernels.quantize_rows import GROUP
from refengine.cuda.kernels.shapes import check_shape
from refengine.cuda.runtime.launch import Kernels
from refengine.cuda.runtime.source import Struct
from refengine.errors import KernelError

MOST_USED = 32  # maximum number of experts per row, because one warp handles them
NO_GROUPS = Struct(None, None, None)  # output row i is made from row i


@dataclass(frozen=True)
class Groups:
    """Which pairs of row and rank use which experts, in groups of at most `size` pairs of one expert.

    group: (n_groups, 3) int32: expert, first slot, number of slots. x_rows, y_rows: (n_pairs,) int32: the row of
    activations that a slot reads, and the output row that it writes. n_tokens: the number of tokens, or None if it is
    not known; the experts of a token differ, so that a group has no more pairs than there are tokens. known: whether a
    product with few rows that was launched before has read them.
    """

    group: Array
    x_rows: Array
    y_rows: Array
    size: int
    n_tokens: int | None = None
    known: bool = False

    @property
    def most(self) -> int:
        """The most pairs in a group."""
        return self.size if self.n_tokens is None else min(self.size, self.n_tokens)

    @cached_property
    def struct(self) -> Struct:
        """The struct `Groups` of arguments.cuh."""
        return Struct(self.group, self.x_rows, self.y_rows)

    @cached_property
    def by_pair(self) -> Groups:
        """The same groups for activations that have one row per pair."""
        return replace(self, x_rows=self.y_rows)


def most_groups(n_pairs: int, n_expert: int, size: int) -> int:
    """The maximum number of groups, of up to `size` pairs of one expert, for `n_pairs` pairs."""
    return min(n_pairs, n_expert) + n_pairs // size


def top_experts(kernels: Kernels, scores: Array, chosen: Array) -> None:
    """chosen (n_tokens, n_used) int32: the experts with the highest scores (n_tokens, n_expert) float32, best first."""
    n_tokens, n_expert = scores.shape
    n_used = chosen.shape[1]
    if not 1 <= n_used <= n_expert:
        raise KernelError(f"top_experts: {n_used} of {n_expert} experts")
    check_shape("top_experts", "the array of chosen experts", chosen, (n_tokens, n_used))
    kernels.launch("moe", "top_experts_f32", (n_tokens,), 32, [scores, chosen, n_expert, n_used])


def row_soft_max(kernels: Kernels, x: Array, y: Array) -> None:
    """Softmax over the last axis of x, at most 32 wide. x, y: (..., n) float32."""
    n = int(x.shape[-1])
    if n > MOST_USED:
        raise KernelError(f"row_soft_max: rows of {n}, allowed at most {MOST_USED}")
    check_shape("row_soft_max", "the output", y, x.shape)
    kernels.launch("moe", "row_soft_max_f32", (int(x.size) // n,), 32, [x, y, n])


def route(kernels: Kernels, scores: Array, positions: Array, chosen: Array, shares: Array) -> None:
    """`top_experts`, and the softmax over the chosen experts' scores: shares (n, n_used) float32. Overlaps.

    positions: (n,) int32; a row whose position is below zero chooses expert -1, which means none.
    """
    n, n_expert = scores.shape
    n_used = chosen.shape[1]
    if not 1 <= n_used <= min(n_expert, MOST_USED):
        raise KernelError(f"route: {n_used} of {n_expert} experts, allowed at most {MOST_USED}")
    check_shape("route", "the positions' array", positions, (n,))
    check_shape("route", "the array of chosen experts", chosen, (n, n_used))
    check_shape("route", "the shares' array", shares, (n, n_used))
    arguments = [scores, positions, chosen, shares, n_expert, n_used]
    kernels.launch("moe", "route_f32", (n,), 32, arguments, overlap=True)


def group_experts(
    kernels: Kernels, chosen: Array, n_expert: int, share: int, groups: Groups, *, overlap: bool = False
) -> None:
    """Fill `groups` from chosen (n_tokens, n_used) int32. share: how many successive pairs read the same row."""
    n_pairs = int(chosen.size)
    check_shape("group_experts", "the groups' array", groups.group, (most_groups(n_pairs, n_expert, groups.size), 3))
    check_shape("group_experts", "the array of rows read", groups.x_rows, (n_pairs,))
    check_shape("group_experts", "the array of rows written", groups.y_rows, (n_pairs,))
    arrays = [chosen, groups.group, groups.x_rows, groups.y_rows]
    sizes = [n_pairs, n_expert, len(groups.group), groups.size, share]
    threads = min(1024, -(-n_pairs // 256) * 32)  # a lane has eight pairs in flight
    kernels.launch("moe", "group_experts", (n_expert,), threads, [*arrays, *sizes], 4 * n_expert, overlap=overlap)


def sum_experts(kernels: Kernels, experts: Array, y: Array) -> None:
    """y (n_tokens, n) = the sum of experts (n_tokens, n_used, n) over ranks, in their order; float32."""
    n_tokens, n_used, n = experts.shape
    n_elements = n_tokens * n
    check_shape("sum_experts", "the output", y, (n_tokens, n))
    kernels.launch("moe", "sum_experts_f32", (-(-n_elements // 256),), 256, [experts, y, n_used, n, n_elements])


def combine(
    kernels: Kernels, down: Array, shares: Array, residual: Array, y: Array, squares: Array | None = None
) -> None:
    """y (n, width) = the sum over ranks of down (n · n_used, width) times shares (n, n_used), + residual. Overlaps.

    squares: is filled with those of y; see `quantize_rows.Rows`.
    """
    n, width = y.shape
    check_shape("combine", "the array of outputs", down, (n * shares.shape[1], width))
    check_shape("combine", "the shares' array", shares, (n, shares.shape[1]))
    check_shape("combine", "the residual", residual, y.shape)
    check_shape("combine", "the squares' array", squares, (n, width // GROUP))
    arguments = [down, shares, residual, y, squares, shares.shape[1], width]
    kernels.launch("moe", "combine_f32", (-(-width // 256), n), 256, arguments, overlap=True)
