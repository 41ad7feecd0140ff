"""Random tensor data in ggml's formats, reproducible to the byte.

Every tensor has its own SFC64 generator, whose key is the seed and the tensor's name, so the order of tensors does not
matter. Only its raw 64-bit output is used (NumPy guarantees this stream, unlike those of its distributions), with
integer arithmetic or single IEEE operations in a fixed order, so the bytes do not depend on versions or machines.

Quantised tensors are not quantised from floats: their integer codes are random bits, and their scales are chosen so
that the values have the requested standard deviation and a mean near zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from refengine.quants import SUPPORTED

T = GGMLQuantizationType
CHUNK_BYTES = 4 << 20  # of tensor data made at a time; a constant of the format, as the chunks consume the stream

# Root mean square of the codes times the scale's own factor, for d = 1 and codes drawn uniformly.
_FACTOR_RMS = math.sqrt(1 + 1 / 48)  # of a factor uniform in 0.75..1.25
_RMS_4BIT, _RMS_5BIT = math.sqrt((16**2 - 1) / 12), math.sqrt((32**2 - 1) / 12)
_RMS_6BIT, _RMS_8BIT = math.sqrt((64**2 - 1) / 12), math.sqrt((255**2 - 1) / 12)
_RMS_FP4 = math.sqrt(68.5 / 8)  # of 0, 0.5, 1, 1.5, 2, 3, 4, 6
_RMS_K_SCALE = math.sqrt(39.5**2 + (48**2 - 1) / 12)  # of the integers 16..63
_RMS_Q6_SCALE = math.sqrt(63.5**2 + (64**2 - 1) / 12)  # of the integers 32..95


def random_stream(seed: int, name: str) -> Callable[[int], np.ndarray]:
    """A function that returns the next n random bytes (n,) u8 of this seed and name."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    generator = np.random.SFC64(key)
    return lambda n: np.asarray(generator.random_raw((n + 7) // 8)).astype("<u8").view(np.uint8)[:n]


def random_tensor(
    stream: Callable[[int], np.ndarray], type_: GGMLQuantizationType, n_elements: int, std: float, mean: float = 0.0
) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in pieces of about CHUNK_BYTES at most. `mean` is only used for float types."""
    block_size, block_bytes = GGML_QUANT_SIZES[type_]
    if n_elements % block_size:
        raise ValueError(f"{type_.name}: {n_elements} elements are not a multiple of {block_size}")
    if mean and block_size > 1:
        raise ValueError(f"{type_.name}: quantised tensors have zero mean, not {mean}")
    n_blocks = n_elements // block_size
    step = CHUNK_BYTES // (block_bytes if block_size > 1 else 8)  # 8: a normal deviate takes eight random bytes
    for start in range(0, n_blocks, step):
        n = min(step, n_blocks - start)
        if block_size == 1:
            yield _floats(stream, type_, n, std, mean)
        else:
            yield _blocks(stream(n * block_bytes), type_, std)


def _floats(
    stream: Callable[[int], np.ndarray], type_: GGMLQuantizationType, n: int, std: float, mean: float
) -> np.ndarray:
    """Sums of four uniform 16-bit integers, which are close to normal, standardised: n values as bytes."""
    lanes = stream(8 * n).view("<u2").reshape(n, 4).astype(np.int32)
    centred = lanes[:, 0] + lanes[:, 1] + lanes[:, 2] + lanes[:, 3] - 2 * 65535
    values = np.float32(mean) + centred.astype(np.float32) * np.float32(std * math.sqrt(3) / 65536)
    return encode_floats(values, type_)


def encode_floats(values: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    """float32 values as the bytes of an F32, F16 or BF16 tensor, rounded to nearest even."""
    if type_ == T.F32:
        return values.astype("<f4").view(np.uint8)
    if type_ == T.F16:
        return values.astype("<f2").view(np.uint8)
    if type_ == T.BF16:
        bits = values.astype("<f4").view("<u4")
        rounded: np.ndarray = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2").view(np.uint8)
    raise ValueError(f"{type_.name} is not a float type")


def _scale(random_u16: np.ndarray, base: float) -> np.ndarray:
    """Scales `base` times a factor uniform in 0.75..1.25, as float32."""
    factor = np.float32(0.75) + (random_u16 & 0x7FFF).astype(np.float32) * np.float32(0.5 / 32768)
    return factor * np.float32(base / _FACTOR_RMS)


def _signed(random_u16: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    return np.where(random_u16 & 0x8000, -magnitude, magnitude)


def _blocks(raw: np.ndarray, type_: GGMLQuantizationType, std: float) -> np.ndarray:
    """Turn random bytes into blocks of `type_`: the codes stay, the scales are replaced."""
    block = raw.view(SUPPORTED[type_].dtype)
    names = block.dtype.names or ()
    random_d = block["d"].view("<u2").copy() if "d" in names else np.empty(0, "<u2")
    if type_ in (T.Q4_0, T.Q5_0):
        # codes have a mean of -1/2; scales of both signs (real files have them too) take it out
        rms = _RMS_4BIT if type_ == T.Q4_0 else _RMS_5BIT
        block["d"] = _signed(random_d, _scale(random_d, std / rms))
    elif type_ in (T.Q4_1, T.Q5_1):
        rms, middle = (_RMS_4BIT, 7.5) if type_ == T.Q4_1 else (_RMS_5BIT, 15.5)
        scale = _scale(random_d, std / rms)
        wobble = (block["m"].view("<u2") & 0xFF).astype(np.float32) * np.float32(1 / 256) - np.float32(127.5 / 256)
        block["d"] = scale
        block["m"] = -scale * (np.float32(middle) + wobble)
    elif type_ == T.Q8_0:
        block["qs"] = np.maximum(block["qs"], -127)  # as a quantiser writes them
        block["d"] = _scale(random_d, std / _RMS_8BIT)
    elif type_ in (T.Q4_K, T.Q5_K):
        rms, middle = (_RMS_4BIT, 7.5) if type_ == T.Q4_K else (_RMS_5BIT, 15.5)
        scale = _scale(random_d, std / (rms * _RMS_K_SCALE))
        block["d"] = scale
        block["dmin"] = scale * np.float32(middle)
        block["scales"] = _k_scales(block["scales"])
    elif type_ == T.Q6_K:
        random_scales = block["scales"].view(np.uint8)
        magnitude = (32 + (random_scales & 63)).astype(np.int8)
        block["scales"] = np.where(random_scales & 64, -magnitude, magnitude)
        block["d"] = _scale(random_d, std / (_RMS_6BIT * _RMS_Q6_SCALE))
    elif type_ == T.MXFP4:
        block["e"] = _e8m0(block["e"], std / _RMS_FP4)
    else:
        raise ValueError(f"{type_.name} is not a block type this tool can make")
    return raw


def _k_scales(random: np.ndarray) -> np.ndarray:
    """Twelve packed bytes with eight 6-bit scales 16..63 and minimums equal to them give or take one: (n, 12) u8."""
    scales = (16 + (random[:, :8].astype(np.uint16) * 48 >> 8)).astype(np.uint8)
    jitter = np.stack([random[:, 8:] & 15, random[:, 8:] >> 4], axis=1).reshape(-1, 8) % 3
    mins = np.minimum(scales + jitter - 1, 63)
    low = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    middle = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    high = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    return np.concatenate([low, middle, high], axis=1)


def _e8m0(random: np.ndarray, scale: float) -> np.ndarray:
    """Exponent bytes of two neighbouring powers of two, mixed so that their mean square is scale squared."""
    exponent = math.frexp(scale)[1]  # 2^(exponent - 1) <= scale < 2^exponent
    share = (scale**2 / 4.0 ** (exponent - 1) - 1) / 3
    return np.where(random < round(share * 256), 127 + exponent, 126 + exponent).astype(np.uint8)
