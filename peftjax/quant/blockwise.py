"""Block-wise quantisation of arrays: pure functions, for any number of leading axes.

`axis`, -2 or -1, is the contraction axis of n entries. Blocks of `block_size` run along it, and so
do the pairs that share a byte: entry 2i has the high four bits of byte i. So a `[*, in, out]`
kernel becomes codes `[*, in/2, out]` and scales `[*, ⌈in/block_size⌉, out]`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from peftjax.quant import codebooks

# For a block of zeros the reciprocal would be infinite; below it XLA flushes numbers to zero.
TINY = np.finfo(np.float32).tiny


def quantize(
  w: Float[Array, "..."], fmt: str, block_size: int, axis: int
) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
  """codes = nearest(w / absmax), absmax = max |w| per block (QLoRA, section 2).

  Args:
    w: float `[*, n, m]` (axis -2) or `[*, n]` (axis -1); n even for a four-bit format.
    fmt: `"int8"` or a codebook of `codebooks.four_bits`.
    block_size: entries per block; the last one may be short.

  Returns:
    codes, uint8, two per byte unless `fmt` is int8, and absmax, float32.
  """
  w = w.astype(jnp.float32)
  blocks = _blocks(w, block_size, axis)
  absmax = jnp.abs(blocks).max(axis)
  inverse = jnp.expand_dims(1.0 / jnp.maximum(absmax, TINY), axis)
  codes = _encode(jnp.clip(blocks * inverse, -1.0, 1.0), fmt)
  codes = _unblock(codes, w.shape, axis)
  return (codes if fmt == "int8" else pack(codes, axis)), absmax


def dequantize(
  codes: UInt8[Array, "..."],
  absmax: Float[Array, "..."],
  fmt: str,
  block_size: int,
  axis: int,
  dtype: Any,
) -> Float[Array, "..."]:
  """value(code) · absmax, multiplied in float32 and rounded once, to `dtype`."""
  values = _decode(codes if fmt == "int8" else unpack(codes, axis), fmt)
  return _scaled(values, absmax, block_size, axis, dtype)


def halves(
  codes: UInt8[Array, "..."],
  absmax: Float[Array, "..."],
  fmt: str,
  block_size: int,
  axis: int,
  dtype: Any,
) -> Float[Array, "2 ..."]:
  """`dequantize` for a four-bit format by even and odd entries along `axis`: `[2, ..., n/2, ...]`.

  No entry moves away from its byte, which on TPUs takes copies of the whole array.
  """
  half = lambda codes: _scaled(_decode(codes, fmt), absmax, block_size // 2, axis, dtype)
  return jnp.stack([half(codes >> 4), half(codes & 15)])


def _scaled(
  values: jax.Array, absmax: jax.Array, block_size: int, axis: int, dtype: Any
) -> jax.Array:
  n = values.shape[axis]
  if n % block_size:
    wide = jnp.repeat(absmax, block_size, axis=axis)
    return (values * jax.lax.slice_in_dim(wide, 0, n, axis=axis)).astype(dtype)
  blocks = _blocks(values, block_size, axis)
  return (blocks * jnp.expand_dims(absmax, axis)).astype(dtype).reshape(values.shape)


def pack(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
  """Packs four-bit codes `[..., n, ...]` into bytes `[..., n/2, ...]`."""
  pairs = codes.reshape(_split(codes.shape, 2, axis))
  high, low = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in (0, 1))
  return (high << 4) | low


def unpack(packed: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
  """Unpacks bytes `[..., n/2, ...]` into four-bit codes `[..., n, ...]`."""
  both = jnp.stack([packed >> 4, packed & 15], axis=axis)
  shape = list(packed.shape)
  shape[axis] *= 2
  return both.reshape(shape)


def nearest(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
  """The number of the ascending `thresholds` below each entry of x: uint8."""
  return jnp.searchsorted(thresholds, x, side="left", method="scan_unrolled").astype(jnp.uint8)


def lookup(table: np.ndarray, index: jax.Array) -> jax.Array:
  """`table[index]` for four bits: a gather on CPUs, a tree of selects where gathers are slow."""

  def gather(index: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), index, mode="clip")

  def select(index: jax.Array) -> jax.Array:
    # The first level in bits and not as where(odd, one, two), whose sixteen broadcast constants
    # would be hoisted out of a scan over layers, each an array of a whole weight.
    bits = table.view(f"uint{8 * table.itemsize}")
    odd = -(index & 1).astype(bits.dtype)  # all ones or none
    values = [(odd & (one ^ two)) ^ one for one, two in zip(bits[::2], bits[1::2], strict=True)]
    for bit in (2, 4, 8):
      high = (index & bit) != 0
      values = [
        jnp.where(high, two, one) for one, two in zip(values[::2], values[1::2], strict=True)
      ]
    return jax.lax.bitcast_convert_type(values[0], table.dtype)

  return jax.lax.platform_dependent(index, cpu=gather, default=select)


def _encode(x: jax.Array, fmt: str) -> jax.Array:
  if fmt == "int8":
    return (jnp.round(x * 127.0) + 128.0).astype(jnp.uint8)
  bounds, order = codebooks.thresholds(fmt)
  rank = jnp.zeros(x.shape, jnp.uint8)
  for bound in bounds:  # counting beats a search: fifteen comparisons of whole vectors
    rank += (x > bound).astype(jnp.uint8)
  if (order == np.arange(len(order))).all():
    return rank
  return lookup(np.pad(order, (0, 16 - len(order))), rank)


def _decode(codes: jax.Array, fmt: str) -> jax.Array:
  if fmt == "int8":
    return (codes.astype(jnp.float32) - 128.0) / 127.0
  return lookup(codebooks.four_bits(fmt), codes)


def _blocks(x: jax.Array, block_size: int, axis: int) -> jax.Array:
  """Cuts `[..., n, ...]` to `[..., blocks, block_size, ...]`, the last block filled with zeros."""
  short = -x.shape[axis] % block_size
  if short:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, short)
    x = jnp.pad(x, widths)
  return x.reshape(_split(x.shape, block_size, axis))


def _unblock(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  at = x.ndim + axis - 1
  x = x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])
  return jax.lax.slice_in_dim(x, 0, shape[axis], axis=axis)


def _split(shape: tuple[int, ...], size: int, axis: int) -> tuple[int, ...]:
  at = len(shape) + axis
  return (*shape[:at], shape[at] // size, size, *shape[at + 1 :])
