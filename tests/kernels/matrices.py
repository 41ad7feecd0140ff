"""Stored matrices with random bits, for kernel tests: all codes occur, scales are finite and of ordinary size."""

import numpy as np
from gguf import GGMLQuantizationType

from refengine import quants
from refengine.weights import Matrix

TILED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "F16")


def random_matrix(kind: str, shape: tuple[int, ...], seed: int) -> Matrix:
    """A matrix of this type and shape whose codes are random bits."""
    rng = np.random.default_rng(seed)
    fmt = quants.SUPPORTED[GGMLQuantizationType[kind]]
    n_blocks = int(np.prod(shape)) // fmt.block_size
    blocks = rng.integers(0, 256, (n_blocks, fmt.block_bytes), dtype=np.uint8).view(fmt.dtype).reshape(-1)
    for name in fmt.dtype.names or ():
        if fmt.dtype[name].base == np.dtype("<f2"):
            blocks[name] = (rng.standard_normal(blocks[name].shape) * 0.02).astype(np.float16)
        elif name == "e":  # 2^-8 to 2^-5
            blocks[name] = rng.integers(119, 123, blocks[name].shape)
        elif fmt.dtype[name].base == np.dtype("<f4"):
            blocks[name] = rng.standard_normal(blocks[name].shape).astype(np.float32)
    if kind == "BF16":  # of random bits, some would be NaN
        blocks = (rng.standard_normal(n_blocks).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Matrix(f"random {kind}", fmt.type, shape, blocks.view(np.uint8).reshape(-1))
