"""The leaf that holds a quantised matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftjax.core.einsum import split_subscripts
from peftjax.core.weight import Weight
from peftjax.quant.double import DoubleScales
from peftjax.quant.formats import Format, absmax_of
from peftjax.quant.product import product, ragged_product


class Quantized(Weight):
  """W = value(codes) · absmax of their block, for a kernel `[*stack, in, out]` or a table `[V, D]`.

  Attributes:
    codes: uint8 `[*stack, in/2, out]`, two per byte, or `[*stack, in, out]` for eight bits.
    scales: float32 `[*stack, ⌈in/block_size⌉, out]`, or `DoubleScales` of this shape.
    fmt: the format of codes and scales.
    axis: axis of the blocks and the pairs, the contraction axis: -2 for a kernel, -1 for a table.
    dense_dtype: name of the dtype that the weight was quantised from and `materialize` returns.
  """

  codes: Any
  scales: Any
  fmt: Format = flax.struct.field(pytree_node=False)
  axis: int = flax.struct.field(pytree_node=False, default=-2)
  dense_dtype: str = flax.struct.field(pytree_node=False, default="float32")

  pretrained: ClassVar[frozenset[str]] = frozenset({"codes", "scales"})

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.codes.shape)
    shape[self.axis] *= 8 // self.fmt.bits
    return tuple(shape)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.dense_dtype)

  @property
  def quantised(self) -> bool:
    return True

  @property
  def cuts(self) -> tuple[int, ...]:
    """A block is never split; with a short last one its axis is not split at all."""
    cuts = list(self.shape)
    whole, rest = divmod(cuts[self.axis], self.fmt.block_size)
    cuts[self.axis] = 1 if rest else whole
    return tuple(cuts)

  def true_size(self) -> int:
    return 0 if self.codes is None else self.size

  def materialize(self) -> jax.Array:
    """The dequantised array, all of it at once."""
    return self.fmt.dequantize(self.codes, self.scales, self.axis, self.dtype)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """einsum(eqn, x, W) without a dense W that outlives the product; see `product`."""
    x_s, w_s, out_s = split_subscripts(eqn)
    if set(x_s) - set(w_s) - set(out_s):
      return super().einsum(eqn, x)
    return product(eqn, self.fmt, self.axis, self.names or (), x, self.codes, self.scales)

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows of a table: only these are dequantised."""
    if self.axis != -1 or self.ndim != 2:
      return super().take(ids)
    absmax = absmax_of(self.scales, self.axis)
    codes, absmax = (jnp.take(rows, ids, axis=0) for rows in (self.codes, absmax))
    return self.fmt.dequantize(codes, absmax, -1, self.dtype)

  def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Decodes all experts for the product, and again for its gradient: none stays in between."""
    return ragged_product(self.fmt, self.axis, x, self.codes, self.scales, group_sizes)

  def transposed(self) -> Quantized:
    """Wᵀ of a matrix, with the same codes: blocks and pairs run along the axis they ran along."""
    scales = self.scales
    turned = scales.replace(codes=scales.codes.T) if isinstance(scales, DoubleScales) else scales.T
    names = self.names and self.names[::-1]
    return self.replace(codes=self.codes.T, scales=turned, axis=-3 - self.axis, names=names)

  def child_specs(self, spec: P) -> Quantized:
    """Codes and scales are split as the dense array is."""
    spec = P(*spec, *[None] * (self.codes.ndim - len(spec)))
    double = isinstance(self.scales, DoubleScales)
    return self.replace(codes=spec, scales=self.scales.specs(spec) if double else spec)
