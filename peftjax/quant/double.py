"""Double quantisation: the scales of the blocks in eight bits (QLoRA, section 3)."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from peftjax.core.fence import zero
from peftjax.quant import blockwise, codebooks

GROUP = 256


class DoubleScales(flax.struct.PyTreeNode):
  """absmax = map[codes] · group + offset.

  The 8-bit map is bitsandbytes' signed dynamic one. Groups are 256 scales in its order, which goes
  through the blocks of one output after the other; codes lie as the scales do.

  Attributes:
    codes: uint8, in the scales' shape: `[*stack, blocks, out]`, for a table `[*stack, V, blocks]`.
    group: float32 `[*stack, ⌈N/256⌉]`, N the number of a matrix's scales.
    offset: float32 `[*stack]`, their mean.
  """

  codes: Any
  group: Any
  offset: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  def dequantize(self, axis: int) -> jax.Array:
    """The scales, float32; `axis` is the axis of the blocks."""
    # The group of each is brought to where it lies: to bring the codes into the groups' order,
    # XLA:TPU would turn those of all layers before a scan over them.
    group = jnp.repeat(self.group, GROUP, axis=-1)[..., : math.prod(self.codes.shape[-2:])]
    values = jnp.asarray(codebooks.dynamic_map())[self.codes]
    scaled = _rounded(values * _unflatten(group, self.codes.shape, axis), self.group)
    return scaled + self.offset[..., None, None]

  def specs(self, spec: P) -> DoubleScales:
    """Specs: the small arrays are everywhere, 0.002 bits per weight."""
    stack = spec[: max(len(spec) - 2, 0)]
    return DoubleScales(spec, P(*stack, None), P(*stack))


def quantize(absmax: Float[Array, "... n m"], axis: int) -> DoubleScales:
  """`DoubleScales` of float32 `[*stack, blocks, out]` (axis -2) or `[*stack, V, blocks]` (-1)."""
  flat = _flatten(absmax, axis)
  offset = flat.mean(-1)
  groups = _grouped(flat - offset[..., None])
  group = jnp.abs(groups).max(-1)
  bounds = codebooks.dynamic_map()
  bounds = (bounds[1:] + bounds[:-1]) / bounds.dtype.type(2)
  codes = blockwise.nearest(groups * (1.0 / jnp.maximum(group, blockwise.TINY))[..., None], bounds)
  codes = codes.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
  return DoubleScales(_unflatten(codes, absmax.shape, axis), group, offset)


def _flatten(x: jax.Array, axis: int) -> jax.Array:
  """Each matrix's scales in bitsandbytes' order: `[*stack, N]`."""
  x = jnp.swapaxes(x, -1, -2) if axis == -2 else x
  return x.reshape(*x.shape[:-2], -1)


def _unflatten(flat: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  if axis == -1:
    return flat.reshape(shape)
  return jnp.swapaxes(flat.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)


def _grouped(flat: jax.Array) -> jax.Array:
  """Cuts `[*stack, N]` to `[*stack, ⌈N/256⌉, 256]`, filled up with zeros."""
  n = flat.shape[-1]
  count = math.ceil(n / GROUP)
  widths = [(0, 0)] * (flat.ndim - 1) + [(0, count * GROUP - n)]
  return jnp.pad(flat, widths).reshape(*flat.shape[:-1], count, GROUP)


def _rounded(product: jax.Array, witness: jax.Array) -> jax.Array:
  """The product itself, which a compiler may not fuse with the addition that follows.

  A fused multiply-add rounds once where bitsandbytes rounds twice. Its bits are combined with a
  zero that depends on data, which no compiler can see through.
  """
  bits = jax.lax.bitcast_convert_type(product, jnp.uint32) ^ zero(witness, jnp.uint32)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
