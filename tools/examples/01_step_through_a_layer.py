"""Print every tensor of one layer during a forward pass, with llama.cpp's names.

To stop in a debugger instead, run `refengine generate "a frog" --break Qcur-0`: pdb opens in the model's file.
"""

from __future__ import annotations

import refengine
from refengine.trace import to_numpy

model = refengine.load()  # the packaged model; give a path for yours
ids = model.tokenizer.encode("a frog")
shown = refengine.Trace(r"-0(#\d+)?$")  # a regular expression: what belongs to layer 0
logits = model.forward(ids, trace=shown)

for name, x in shown.result().items():
    print(f"{name:22} {x.shape!s:16} from {x.min():9.4f} to {x.max():9.4f}")
print(f"the likeliest next token is {model.tokenizer.decode([int(to_numpy(logits)[-1].argmax())])!r}")
