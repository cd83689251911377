"""Formats: the meaning of a quantised weight's codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, UInt8

from peftjax.core.fence import computed_once
from peftjax.core.ranges import check
from peftjax.quant import blockwise, codebooks, double
from peftjax.quant.double import DoubleScales

FORMATS = (*codebooks.FOUR_BITS, "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Format:
  """A codebook, the size of a block, and whether the scales are quantised in turn.

  Made by `nf4`, `fp4`, `int4` and `int8`. `axis`, below, is the contraction axis: see `blockwise`.
  """

  name: str
  block_size: int
  double_quant: bool

  def __post_init__(self) -> None:
    check(Format, vars(self))
    if self.block_size not in BLOCK_SIZES:
      allowed = ", ".join(map(str, BLOCK_SIZES))
      raise ValueError(f"block_size {self.block_size!r} is not one of {allowed}")

  @property
  def bits(self) -> int:
    return 8 if self.name == "int8" else 4

  def quantize(self, w: Float[Array, "..."], axis: int = -2) -> tuple[UInt8[Array, "..."], Any]:
    """Codes, uint8, and scales, float32 or `DoubleScales`, of `[*stack, in, out]`."""
    codes, absmax = blockwise.quantize(w, self.name, self.block_size, axis)
    return codes, double.quantize(absmax, axis) if self.double_quant else absmax

  @jax.named_scope("dequantise")
  def dequantize(
    self, codes: UInt8[Array, "..."], scales: Any, axis: int, dtype: Any
  ) -> Float[Array, "..."]:
    """The dense array, in `dtype`."""
    absmax = absmax_of(scales, axis)
    return blockwise.dequantize(codes, absmax, self.name, self.block_size, axis, dtype)

  @jax.named_scope("dequantise")
  def halves(
    self, codes: UInt8[Array, "..."], scales: Any, axis: int, dtype: Any
  ) -> Float[Array, "2 ..."]:
    """See `blockwise.halves`."""
    absmax = absmax_of(scales, axis)
    return blockwise.halves(codes, absmax, self.name, self.block_size, axis, dtype)


def absmax_of(scales: Any, axis: int) -> Float[Array, "..."]:
  """The float32 scales, dequantised if they have to be: once, and not again for every weight."""
  return computed_once(scales.dequantize(axis)) if isinstance(scales, DoubleScales) else scales


def nf4(block_size: int = 64, double_quant: bool = True, *, codebook: str = "published") -> Format:
  """4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314), bitsandbytes' blocks and codes.

  Args:
    block_size: weights that share a scale: 32, 64, ..., 4096.
    double_quant: keep the scales in 8 bits: 4.127 bits per weight instead of 4.5.
    codebook: `"published"`, or for ablations `"textbook"`, sixteen bins of N(0, 1) of equal
      probability, each by its mean, or `"lloyd_max"`, the levels of least squared error for it.

  Raises:
    ValueError: on another block size or codebook.
  """
  names = {"published": "nf4", "textbook": "nf4_textbook", "lloyd_max": "lloyd_max"}
  return Format(_named(names, "codebook", codebook), block_size, double_quant)


def fp4(block_size: int = 64, double_quant: bool = True, *, layout: str = "e2m1") -> Format:
  """4-bit floating point: `"e2m1"`, as in bitsandbytes, or `"e3m0"`; otherwise as `nf4`."""
  names = {"e2m1": "fp4", "e3m0": "fp4_e3m0"}
  return Format(_named(names, "layout", layout), block_size, double_quant)


def int4(block_size: int = 64, double_quant: bool = True) -> Format:
  """Symmetric 4-bit integers, (−7, ..., 7) · absmax / 7; otherwise as `nf4`."""
  return Format("int4", block_size, double_quant)


def int8(block_size: int = 64, double_quant: bool = False) -> Format:
  """Symmetric 8-bit integers, (−127, ..., 127) · absmax / 127, one per byte.

  Scales of eight bits would be coarser than the weights they scale, so they stay float32.
  """
  return Format("int8", block_size, double_quant)


def _named(names: dict[str, str], what: str, given: str) -> str:
  if given not in names:
    raise ValueError(f"{what} {given!r} is not one of {', '.join(map(repr, names))}")
  return names[given]
