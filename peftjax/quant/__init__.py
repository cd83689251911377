"""Frozen weights in four and eight bits."""

from peftjax.quant.formats import fp4, int4, int8, nf4
from peftjax.quant.transform import quantize, requantize
from peftjax.quant.weight import Quantized

__all__ = ["Quantized", "fp4", "int4", "int8", "nf4", "quantize", "requantize"]
