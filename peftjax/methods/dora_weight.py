"""The DoRA leaf: a direction, which LoRA changes, and a magnitude for each output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftjax.core import mesh
from peftjax.core.einsum import einsum, free_letter, split_subscripts
from peftjax.core.fence import tied
from peftjax.core.layout import Axes
from peftjax.core.weight import Weight, children, materialize
from peftjax.methods.lora_weight import LoRA


class DoRA(LoRA):
  """W = m · (base + ΔW) / ‖base + ΔW‖ per output, ΔW as in `LoRA` (Liu et al. 2024, eq. 5).

  The norm is a constant to the gradient (section 4.3). It is never taken of a dense sum: with
  v = base + s (B A)ᵀ, ‖v_o‖² = ‖base_o‖² + 2 s B_o · (A base)_o + s² B_o (A Aᵀ) B_oᵀ.

  Attributes:
    m: `[*stack, out]`, the magnitude; several output axes are flattened into one.
    square: `[*stack, out]` float32, ‖base_o‖².
  """

  trained: ClassVar[frozenset[str]] = frozenset({"a", "b", "m"})

  m: Any = None
  square: Any = None

  def true_size(self) -> int:
    """The number of LoRA's parameters, and of the magnitude."""
    return super().true_size() + (0 if self.m is None else self.m.size)

  def materialize(self) -> jax.Array:
    dense = super().materialize()
    return dense * self._along_outs(self._factor()).astype(dense.dtype)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """LoRA's product, times m / ‖base + ΔW‖ along the outputs; dropout acts on the branch alone."""
    x_s, w_s, out_s = split_subscripts(eqn)
    stack, outs = w_s[: len(self.stack)], "".join(w_s[axis] for axis in self.axes.outs)
    if self.branch(eqn) is None:
      return Weight.einsum(self, eqn, x)
    f = self._factor(x).reshape(*self.stack, *self._dims(self.axes.outs)).astype(x.dtype)
    if set(stack + outs) <= set(out_s):
      return jnp.einsum(f"{out_s},{stack}{outs}->{out_s}", super().einsum(eqn, x), f)
    if set(stack + outs) <= set(x_s):
      return super().einsum(eqn, jnp.einsum(f"{x_s},{stack}{outs}->{x_s}", x, f))
    return Weight.einsum(self, eqn, x)

  def cut(self, axis: int, take: Callable[[jax.Array, int], jax.Array]) -> LoRA | None:
    """Part of the outputs; None for part of the inputs, whose norm is another one."""
    made = None if self.axes.ins == (axis,) else super().cut(axis, take)
    if made is None:
      return None
    own = {name: take(getattr(self, name), self.b.ndim - 2) for name in ("m", "square")}
    return made.replace(**own)

  def take(self, ids: jax.Array) -> jax.Array:
    return Weight.take(self, ids)

  def conv(self, x: jax.Array, **how: Any) -> jax.Array:
    """LoRA's convolution, each channel times its m / ‖base + ΔW‖."""
    if self.stack or self.axes.outs != (how["dimension_numbers"].rhs_spec[0] - self.ndim,):
      return Weight.conv(self, x, **how)
    channels = how["dimension_numbers"].out_spec[1]
    y = super().conv(x, **how)
    shape = [-1 if i == channels else 1 for i in range(y.ndim)]
    return y * self._factor(x).astype(y.dtype).reshape(shape)

  def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    if len(self.stack) != 1 or self.axes != Axes():
      return Weight.ragged_dot(self, x, group_sizes)
    y = super().ragged_dot(x, group_sizes)
    rows = jnp.repeat(self._factor(x), group_sizes, axis=0, total_repeat_length=len(x))
    return y * rows.astype(y.dtype)

  def unmerged(self, dense: jax.Array) -> jax.Array:
    """The base, as with LoRA, where ‖ΔW‖ < ‖base‖ for each output.

    For v = base + ΔW the merged weight has the direction u; n = ‖v‖ solves ‖n u − ΔW‖² = ‖base‖².
    """
    delta, ins = self.delta().astype(jnp.float32), self.axes.ins
    wide = dense.astype(jnp.float32)
    sign = self._along_outs(jnp.sign(self.m))
    u = sign * wide / jnp.sqrt(jnp.square(wide).sum(ins, keepdims=True))
    p = (u * delta).sum(ins, keepdims=True)
    rest = self._along_outs(self.square) - jnp.square(delta).sum(ins, keepdims=True)
    return (u * (p + jnp.sqrt(jnp.square(p) + rest)) - delta).astype(dense.dtype)

  def child_specs(self, spec: P) -> DoRA:
    made = super().child_specs(spec)
    lies = P(*made.b[:-1])
    return self.replace(**{**children(made), "m": lies, "square": lies})

  @jax.named_scope("adapter")
  def _factor(self, x: jax.Array | None = None) -> jax.Array:
    """m / ‖base + ΔW‖, `[*stack, out]` float32; for a quantised base not before x is there.

    It depends on parameters alone, so XLA:CPU would decode the bases of all layers for it first.
    The price is paid in a decoding loop of unrolled layers, which computes it for every token.
    """
    up = jax.lax.stop_gradient(self._up().astype(jnp.float32))  # s B
    a = jax.lax.stop_gradient(mesh.whole(self.a).astype(jnp.float32))
    if self.quantised and x is not None:
      a = tied(a, jax.lax.stop_gradient(x))
    gram = a @ jnp.swapaxes(a, -1, -2)
    crossed = (up * self._projected(a)).sum(-1)
    squares = mesh.whole(self.square) + 2.0 * crossed + ((up @ gram) * up).sum(-1)
    return mesh.whole(self.m).astype(jnp.float32) * jax.lax.rsqrt(jnp.maximum(squares, 1e-30))

  def _projected(self, a: jax.Array) -> jax.Array:
    """A base, transposed: `[*stack, out, R]`."""
    letters = "abcdefghijklm"[: self.ndim]
    stack = letters[: len(self.stack)]
    ins, outs = ("".join(letters[axis] for axis in axes) for axes in self.axes)
    r = free_letter(letters)
    a = a.reshape(*a.shape[:-1], *self._dims(self.axes.ins))
    y = einsum(f"{stack}{r}{ins},{letters}->{stack}{outs}{r}", a, self.base)
    return jax.lax.stop_gradient(y.reshape(*self.stack, -1, y.shape[-1]))

  def _along_outs(self, values: jax.Array) -> jax.Array:
    """`[*stack, out]` to the rank of the kernel, 1 on its input axes."""
    values = values.reshape(*self.stack, *self._dims(self.axes.outs))
    return jnp.expand_dims(values, tuple(axis % self.ndim for axis in self.axes.ins))


def squares(base: Any, axes: Any, stack: tuple[int, ...]) -> jax.Array:
  """‖base_o‖² for each output, `[*stack, out]` float32; a quantised stack layer by layer."""
  if isinstance(base, Weight) and stack:
    return jax.lax.map(lambda layer: squares(layer, axes, stack[1:]), base)
  dense = materialize(base).astype(jnp.float32)
  return jnp.square(dense).sum(axes.ins).reshape(*stack, -1)
