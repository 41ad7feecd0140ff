"""Quantised formats: block layouts, dequantisation and activation rounding, with the same bits as in ggml."""

from refengine.quants.activations import q8_1_residual, q8_1_sums, quantize_activation, round_activation
from refengine.quants.blocks import (
    SUPPORTED,
    QuantFormat,
    codes,
    dequantize,
    mins,
    require_supported,
    six_bit_scales,
)

__all__ = [
    "SUPPORTED",
    "QuantFormat",
    "codes",
    "dequantize",
    "mins",
    "q8_1_residual",
    "q8_1_sums",
    "quantize_activation",
    "require_supported",
    "round_activation",
    "six_bit_scales",
]
