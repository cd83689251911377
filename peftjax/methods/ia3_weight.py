"""The IA3 leaf: a weight whose inputs or outputs are scaled."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftjax.core import mesh
from peftjax.core.adapted import Adapted
from peftjax.core.einsum import einsum, split_subscripts
from peftjax.core.layout import Axes
from peftjax.core.weight import materialize


class IA3(Adapted):
  """W = base · diag(l), or diag(l) · base (Liu et al. 2022, section 3.3), and a bias l ⊙ base.

  Attributes:
    l: `[*stack, n]`, n the size of the scaled axes, flattened; None in a bias, to which `tree.tie`
      gives its kernel's.
    axes: which axes of the base are inputs and outputs.
    inputs: True if the inputs are scaled, else the outputs.
    of: in a bias, the path of its kernel.
  """

  trained: ClassVar[frozenset[str]] = frozenset({"l"})

  l: Any  # noqa: E741 - the paper's letter
  axes: Axes = flax.struct.field(pytree_node=False, default=Axes())
  inputs: bool = flax.struct.field(pytree_node=False, default=False)
  of: str = flax.struct.field(pytree_node=False, default="")

  @property
  def stack(self) -> tuple[int, ...]:
    return self.shape[: len(self.shape) - len(self.axes.ins) - len(self.axes.outs)]

  def true_size(self) -> int:
    """The number of parameters of the base and the scales that are here."""
    return self.base_size() + (0 if self.l is None else self.l.size)

  def materialize(self) -> jax.Array:
    base = materialize(self.base)
    return base * self._scales().astype(base.dtype)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """The product with the base, with its operand or its result scaled."""
    x_s, w_s, out_s = split_subscripts(eqn)
    ndim = len(self.axes.ins) + len(self.axes.outs)
    stack = w_s[: len(w_s) - ndim]
    letters = stack + "".join(w_s[axis] for axis in self._scaled)
    scales = (
      mesh.whole(self.l).reshape(*(self.shape[w_s.index(c)] for c in letters)).astype(x.dtype)
    )
    scaled = jax.named_scope("adapter")(jnp.einsum)
    if set(letters) <= set(x_s):
      return einsum(eqn, scaled(f"{x_s},{letters}->{x_s}", x, scales), self.base)
    if set(letters) <= set(out_s):
      return scaled(f"{out_s},{letters}->{out_s}", einsum(eqn, x, self.base), scales)
    return super().einsum(eqn, x)

  def unmerged(self, dense: jax.Array) -> jax.Array:
    return dense / self._scales().astype(dense.dtype)

  def borrow(self, kernel: IA3) -> IA3:
    """A bias with the scales of its kernel."""
    return self.replace(l=kernel.l)

  def child_specs(self, spec: P) -> IA3:
    ndim = len(self.axes.ins) + len(self.axes.outs)
    full = (*spec, *[None] * (len(self.shape) - len(spec)))
    lies = P(*full[: len(full) - ndim], full[self._scaled[0]])
    return self.replace(base=self.base_specs(spec), l=None if self.l is None else lies)

  @property
  def _scaled(self) -> tuple[int, ...]:
    return self.axes.ins if self.inputs else self.axes.outs

  def _scales(self) -> jax.Array:
    """l with the rank of the base, 1 on the other axes.

    Raises:
      ValueError: in a bias that has not been given its kernel's.
    """
    if self.l is None:
      raise ValueError(
        f"the bias of {self.of} has no scales of its own; use pj.apply or pj.merge, which give it "
        "those of its kernel"
      )
    others = [a for a in (*self.axes.ins, *self.axes.outs) if a not in self._scaled]
    stack = self.shape[: len(self.shape) - len(others) - len(self._scaled)]
    scales = mesh.whole(self.l).reshape(*stack, *(self.shape[a] for a in self._scaled))
    return jnp.expand_dims(scales, tuple(a % len(self.shape) for a in others))
