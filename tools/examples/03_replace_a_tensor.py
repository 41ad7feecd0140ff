"""Replace a tensor in a forward pass, and see how the logits change."""

from __future__ import annotations

import numpy as np

import refengine

model = refengine.load()
ids = model.tokenizer.encode("a frog")
trace = refengine.Trace("^Vcur-1$")
logits = model.forward(ids, trace=trace)

noisy = trace.result()["Vcur-1"] * np.float32(1.001)  # another engine's Vcur of layer 1, say
changed = model.forward(ids, trace=refengine.Trace(replace={"Vcur-1": noisy}))
nmse = float(np.square(changed - logits).sum() / np.square(logits).sum())
print(f"0.1 % more in Vcur-1 moves the logits by an NMSE of {nmse:.1e}")
