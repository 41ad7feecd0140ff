"""Replay: runs every operation of our forward pass on the peer's own inputs.

With quantised weights, an activation on a rounding boundary may be rounded either way, and the difference propagates,
so that two correct engines end 1e-8 to 2e-4 apart. An operation on the peer's captured inputs has inherited no error,
so its whole difference is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from refengine.model import Model
from refengine.trace import Trace, to_numpy
from refengine.validate.alignment import align, may_be_cut, part_of, put_into


def replay(
    model: Model, ids: Sequence[int], peer: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Run `ids` and replace every tensor, after computing it, by the peer's tensor with that name.

    Returns the logits and, by tensor name in order of evaluation, our value and the peer's, both in our shape.
    """
    compared: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def substitute(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def replacement(ours: np.ndarray) -> np.ndarray:
            values = to_numpy(ours)
            theirs, _ = align(name, peer[name], values, rows_cut=may_be_cut(name, model.config.n_layer))
            compared[name] = (part_of(name, values, theirs), theirs)
            return put_into(name, values, theirs)

        return replacement

    trace = Trace(replace={name: substitute(name) for name in peer}, strict=False)
    logits = model.forward(ids, trace=trace, chunk=len(ids))
    return logits, compared
