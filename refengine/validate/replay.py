"""Replay: every operation of our forward pass run on the peer's own inputs.

With quantised weights one activation on a rounding boundary falls either way and the difference travels, so that
two right engines end 1e-8 to 2e-4 apart. An operation that is fed the peer's captured inputs has inherited nothing:
what it differs by is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from refengine.errors import TraceError
from refengine.model import Model
from refengine.trace import Trace, to_numpy

SCORES = ("kq-", "kq_soft_max-")  # the peer pads these to its cache; columns past the prompt are not part of the model


def nmse(value: np.ndarray, reference: np.ndarray) -> float:
    """Normalised mean square error: mean((value - reference)²) / mean(reference²), in float64."""
    wide = reference.astype(np.float64)
    power = float(np.mean(np.square(wide)))
    error = float(np.mean(np.square(value.astype(np.float64) - wide)))
    return error / power if power else (0.0 if error == 0.0 else float("inf"))


def align(name: str, peer: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The peer's tensor in our shape: heads merged or split, padded score columns cut. Raises `TraceError`."""
    cut = peer[..., : shape[-1]] if name.startswith(SCORES) else peer
    if cut.size != int(np.prod(shape)):
        raise TraceError(f"tensor {name}: ours is {shape}, the peer's {peer.shape}")
    return cut.reshape(shape)


def replay(
    model: Model, ids: Sequence[int], peer: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Run `ids` with every tensor replaced, once we have computed it, by the peer's tensor of that name.

    Returns the logits and, by tensor name in order of evaluation, our value and the peer's, both in our shape.
    """
    compared: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def substitute(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def replacement(ours: np.ndarray) -> np.ndarray:
            theirs = align(name, peer[name], ours.shape)
            compared[name] = (to_numpy(ours), theirs)
            return theirs

        return replacement

    trace = Trace(replace={name: substitute(name) for name in peer})
    logits = model.forward(ids, trace=trace, chunk=len(ids))
    return logits, compared
