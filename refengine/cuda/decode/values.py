"""What a decode step's operations hand on: rows that are there, and rows that are still to be computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from refengine.array import Array
from refengine.cuda.decode.buffers import Buffer
from refengine.cuda.kernels.moe import Groups
from refengine.cuda.kernels.quantize_rows import Rows
from refengine.cuda.kernels.rope import Rotation
from refengine.cuda.layout import PackedMatrix
from refengine.errors import KernelError


class NoFusedStep(KernelError):
    """Kernels have no way to compute what a model's `decode()` asks for: its tokens go through `forward`."""


@dataclass(eq=False)
class Value:
    """Rows (n_rows, width) float32. buffer: where they are, None until they are computed.

    prepared: the rows as products take them, and the buffers that hold them, once one has asked.
    """

    n_rows: int
    width: int
    buffer: Buffer | None = None
    prepared: list[tuple[Rows, tuple[Buffer, ...]]] = field(default_factory=list)


@dataclass(eq=False)
class Norm(Value):
    """A norm of rows, computed when the first product reads it. bias: of a layer norm; None: an RMS norm."""

    x: Value | None = None
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 0.0


@dataclass(eq=False)
class Choice:
    """The experts chosen from scores. computed: (chosen, shares, groups) once they are wanted."""

    scores: Value
    n_used: int
    computed: tuple[Buffer, Buffer, Groups, tuple[Buffer, ...]] | None = None


@dataclass(frozen=True, eq=False)
class Shares:
    """The softmax over the chosen experts' scores; before that, the scores themselves."""

    choice: Choice
    soft_max: bool


@dataclass(eq=False)
class Product(Value):
    """A product of rows with a matrix, + bias; with a choice, with the matrices of the chosen experts."""

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
    """Experts' outputs times their shares, to be summed over ranks where a residual is added."""

    experts: Value | None = None
    shares: Shares | None = None


@dataclass(frozen=True)
class Heads:
    """Q, K or V as heads, and what is to be done to each head on its way to attention, in this order."""

    x: Value
    n_head: int
    norm: Array | None = None
    eps: float = 0.0
    rotation: Rotation | None = None
    factor: float = 1.0
