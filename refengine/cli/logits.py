"""Implements `refengine logits`: writes the logits of every position of a prompt to a file."""

from __future__ import annotations

import argparse

import numpy as np

from refengine.cli.console import (
    check_trace,
    chunk,
    load_model,
    numerics_of,
    output_path,
    progress_bar,
    prompt_of,
    say,
    tracer,
    written,
)


def logits(arguments: argparse.Namespace) -> None:
    text, ids = prompt_of(arguments)
    output = output_path(arguments.output, ".npz")
    model = load_model(arguments)
    prompt_ids = model.prompt_ids(ids if text is None else text)
    trace = tracer(arguments)
    with progress_bar("prompt", len(prompt_ids), "token") as bar:
        result = model.forward(prompt_ids, trace=trace, chunk=chunk(arguments), progress=bar.update)
    check_trace(trace)
    with written(output) as temporary, open(temporary, "wb") as file:
        np.savez(file, ids=np.asarray(prompt_ids, dtype=np.int64), logits=result)
    say(f"{output}: logits {result.shape[0]} x {result.shape[1]} {result.dtype}, numerics {numerics_of(model)}")
