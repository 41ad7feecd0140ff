"""The values of a decode step's operations: rows that have been computed, and rows whose computation is deferred."""

from __future__ import annotations

from dataclasses import dataclass, field

from refengine.array import Array
from refengine.cuda.decode.buffers import Buffer
from refengine.cuda.kernels.attention import Rotation
from refengine.cuda.kernels.moe import Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.layout import PackedMatrix
from refengine.errors import KernelError


class NoFusedStep(KernelError):
    """The kernels cannot compute a model's `decode()`; its tokens then go through `forward`."""


@dataclass(eq=False)
class Value:
    """Rows (n_rows, width) float32. buffer: their buffer; None until they are computed. squares: their sums of squares
    (see `quantize_rows.Rows`), if a launch has computed them.

    prepared: the rows in the forms that products have requested, with their buffers.
    """

    n_rows: int
    width: int
    buffer: Buffer | None = None
    squares: Buffer | None = None
    prepared: list[tuple[Rows, tuple[Buffer, ...]]] = field(default_factory=list)


@dataclass(eq=False)
class Norm(Value):
    """A norm of rows, computed when the first product reads it. bias: of a layer norm; None for an RMS norm."""

    x: Value | None = None
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 0.0


@dataclass(eq=False)
class Choice:
    """The experts chosen from scores. Made when first needed: the experts of each row, their shares, and by the size of
    groups, which rows go to which expert, with the groups' buffers. A router that makes groups has no need of `chosen`.
    """

    scores: Value
    n_used: int
    chosen: Buffer | None = None
    shares: Buffer | None = None
    groups: dict[int, tuple[Groups, tuple[Buffer, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Shares:
    """The softmax over the chosen experts' scores; before that, the scores themselves."""

    choice: Choice
    soft_max: bool


@dataclass(eq=False)
class Product(Value):
    """A product of rows with a matrix, + bias; with `choice`, with the matrices of the chosen experts."""

    x: Value | None = None
    w: PackedMatrix | None = None
    bias: Array | None = None
    choice: Choice | None = None


@dataclass(eq=False)
class Columns(Value):
    """`width` columns of another value, from `start` on."""

    of: Value | None = None
    start: int = 0


@dataclass(eq=False)
class ExpertSum(Value):
    """Experts' outputs times their shares; they are summed over ranks when a residual is added."""

    experts: Value | None = None
    shares: Shares | None = None


@dataclass(frozen=True)
class Heads:
    """Q, K or V as heads, with the operations that are applied to each head before attention, in this order."""

    x: Value
    n_head: int
    norm: Array | None = None
    eps: float = 0.0
    rotation: Rotation | None = None
    factor: float = 1.0
