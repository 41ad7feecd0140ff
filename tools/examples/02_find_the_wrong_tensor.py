"""Dump tensors from C++ and find the wrong one: 02_dump.cpp computes a norm with a wrong epsilon.

Needs a C++ compiler (g++, or $CXX).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np

import refengine

HERE = Path(__file__).parent
model = refengine.load()
ids = model.tokenizer.encode("a frog sits on a stone")
trace = refengine.Trace("^embd$")
model.forward(ids, trace=trace)
embd = trace.result()["embd"]  # (n_tokens, n_embd) float32

with tempfile.TemporaryDirectory() as folder:
    program, dump = f"{folder}/engine", f"{folder}/my_dump"
    header = str(files("refengine") / "validate")  # `refengine dump-header` prints where the header is
    compiler = [os.environ.get("CXX", "g++"), "-std=c++11", f"-I{header}"]
    subprocess.run([*compiler, str(HERE / "02_dump.cpp"), "-o", program], check=True)
    embd.tofile(f"{folder}/embd")
    np.asarray(model.weights.layers[0].attn_norm).tofile(f"{folder}/weight")
    sizes = map(str, embd.shape)
    subprocess.run([program, f"{folder}/embd", f"{folder}/weight", *sizes, dump, *map(str, ids)], check=True)
    command = [sys.executable, "-m", "refengine", "validate", "--peer", dump, "--numerics", "exact"]
    done = subprocess.run(command, check=False)  # exit code 1: it diverges, at attn_norm-0
    sys.exit(0 if done.returncode == 1 else 1)
