"""The leaf that holds a kernel of several input or output axes as a matrix."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftjax.core import contraction
from peftjax.core.einsum import split_subscripts
from peftjax.core.layout import Axes
from peftjax.core.view import Uses, View
from peftjax.core.weight import Weight


class Folded(Weight):
  """W is `base` `[*stack, in, out]` with `in` and `out` as a kernel's axes, as in attention.

  Attributes:
    base: any `Weight`.
    axes: which axes of the kernel are inputs and outputs.
    sizes: sizes of the kernel's axes, its stack left out.
  """

  base: Any
  axes: Axes = flax.struct.field(pytree_node=False)
  sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)

  @property
  def stack(self) -> tuple[int, ...]:
    return tuple(self.base.shape[:-2])

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.stack, *self.sizes)

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def quantised(self) -> bool:
    return self.base.quantised

  @property
  def cuts(self) -> tuple[int, ...]:
    """The first axis of a group can be split as the matrix's can; the others cannot."""
    cuts = [*self.stack, *[1] * len(self.sizes)]
    for group, cut in zip(self.axes, self.base.cuts[-2:], strict=True):
      cuts[group[0]] = math.gcd(self.shape[group[0]], cut)
    return tuple(cuts)

  def true_size(self) -> int:
    return self.base.true_size()

  def materialize(self) -> jax.Array:
    return self.axes.as_kernel(jnp.swapaxes(self.base.materialize(), -1, -2), self.shape)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """`einsum(eqn, x, W)` as a product with the matrix, in the dtype of `x`."""
    x_s, w_s, out_s = split_subscripts(eqn)
    if "..." in x_s:
      rest = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in eqn][: x.ndim - len(x_s) + 3]
      x_s, out_s = (s.replace("...", "".join(rest)) for s in (x_s, out_s))
    shared = [c for c in w_s if c in x_s]
    contracted, batch = ([c for c in shared if (c in out_s) == kept] for kept in (False, True))
    at = lambda letters: ([x_s.index(c) for c in letters], [w_s.index(c) for c in letters])
    y = None
    if set(x_s) | set(w_s) == {*contracted, *out_s}:
      y = contraction.dot_general(
        x, self._view(), (at(contracted), at(batch)), view_left=False, dtype=x.dtype, precision=None
      )
    if y is None:
      return super().einsum(eqn, x)
    made = [*batch, *(c for c in x_s if c not in shared), *(c for c in w_s if c not in shared)]
    return jnp.transpose(y, [made.index(c) for c in out_s])

  def child_specs(self, spec: P) -> Folded:
    stack, ins, outs = self.axes.places(spec, self.ndim)
    return self.replace(base=self.base.child_specs(P(*stack, ins, outs)))

  def _view(self) -> View:
    groups = (*self.axes.ins, *self.axes.outs)
    sizes = [self.shape[axis] for axis in groups]
    view = View.whole(self.base, "", Uses()).reshape([*self.stack, *sizes])
    order = [*range(len(self.stack)), *(self.ndim + axis for axis in groups)]
    return view.transpose([order.index(i) for i in range(self.ndim)])  # type: ignore[union-attr]


def matrix(kernel: Any, axes: Axes) -> Any:
  """A kernel, an array or the shape of one, as `[*stack, in, out]`."""
  stack = axes.stack(kernel.shape)
  shape = (*stack, *(math.prod(kernel.shape[axis] for axis in group) for group in axes))
  if isinstance(kernel, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, kernel.dtype)
  order = [*range(len(stack)), *(kernel.ndim + axis for axis in (*axes.ins, *axes.outs))]
  return jnp.transpose(kernel, order).reshape(shape)
