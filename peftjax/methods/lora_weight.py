"""The LoRA leaf: a weight plus a low-rank product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peftjax.core import mesh, paths, ragged
from peftjax.core.adapted import SKIPS_DROPOUT, Adapted
from peftjax.core.dropout import dropout
from peftjax.core.einsum import (
  attend,
  conv,
  einsum,
  free_letter,
  ragged_dot,
  split_subscripts,
  take,
)
from peftjax.core.fence import cast
from peftjax.core.layout import Axes
from peftjax.core.weight import Weight, materialize


class LoRA(Adapted):
  """W = base + scale · (b a)ᵀ (Hu et al. 2021, eq. 3), for a Flax kernel `[*stack, in, out]`.

  Attributes:
    base: the pretrained weight, an array or any `Weight`.
    a: `[*stack, R, in]`; several input axes are flattened into one.
    b: `[*stack, out, R]`; several output axes are flattened into one.
    scale: `[*stack]` float32, α/r or α/√r of each layer's own rank.
    rank: `[*stack]` int32, the true rank; rows of `a` and columns of `b` beyond it are zero, and
      a zero row meeting a zero column has no gradient, so they stay zero.
    key: `[*stack]` keys of the dropout on the branch's input while training, else None.
    axes: which axes of the kernel are inputs and outputs.
    dropout: rate of that dropout.
    residual: `base` is no longer the pretrained array (PiSSA took its principal part).
    b_rate: how many times faster B learns than A (LoRA+); for the optimizer of a method.
  """

  trained: ClassVar[frozenset[str]] = frozenset({"a", "b"})
  ranked: ClassVar[Mapping[str, int]] = {"a": -2, "b": -1}

  a: Any
  b: Any
  scale: Any
  rank: Any
  key: Any = None
  axes: Axes = flax.struct.field(pytree_node=False, default=Axes())
  dropout: float = flax.struct.field(pytree_node=False, default=0.0)
  residual: bool = flax.struct.field(pytree_node=False, default=False)
  b_rate: float = flax.struct.field(pytree_node=False, default=1.0)

  @property
  def pretrained(self) -> frozenset[str]:  # type: ignore[override]
    return frozenset() if self.residual else frozenset({"base"})

  @property
  def rates(self) -> Mapping[str, float]:
    return {} if self.b_rate == 1.0 else {"b": self.b_rate}

  @property
  def stack(self) -> tuple[int, ...]:
    return tuple(self.a.shape[:-2])

  def true_size(self) -> int:
    """The number of parameters of the base and the factors here (not None), padding left out."""
    return self.base_size() + self.ranked_size()

  def delta(self) -> jax.Array:
    """ΔW = scale · (b a)ᵀ in the kernel's shape and the factors' dtype."""
    return self.axes.as_kernel(self._up() @ mesh.whole(self.a), self.shape)

  def materialize(self) -> jax.Array:
    """base + scale · (b a)ᵀ.

    Raises:
      ValueError: with a dropout key inside: dropout acts on the branch's input, not on W.
    """
    if self.key is not None:
      raise ValueError(SKIPS_DROPOUT)
    base = materialize(self.base)
    return base + self.delta().astype(base.dtype)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """einsum(eqn, x, base) + s · B(A dropout(x)), in the dtype of `x`."""
    branch = self.branch(eqn)
    if branch is None:
      return super().einsum(eqn, x)
    down_eqn, up_eqn, transposed = branch
    with jax.named_scope("adapter"):
      a = mesh.whole(self.a).reshape(*self.a.shape[:-1], *self._dims(self.axes.ins))
      b = self._up().reshape(*self.stack, *self._dims(self.axes.outs), -1)
      down, up = (b, a) if transposed else (a, b)
      low = jnp.einsum(down_eqn, self.dropped(x), cast(down, x))
    y = einsum(eqn, x, self.base)
    with jax.named_scope("adapter"):
      return y + jnp.einsum(up_eqn, low, cast(up, x))

  def unmerged(self, dense: jax.Array) -> jax.Array:
    return dense - self.delta().astype(dense.dtype)

  def cut(self, axis: int, take: Callable[[jax.Array, int], jax.Array]) -> LoRA | None:
    """Part of the inputs, with those columns of A, or of the outputs, with those rows of B."""
    at, base = self.ndim + axis, self.base
    base = base.cut(axis, take) if isinstance(base, Weight) else take(base, at)
    if base is None or (axis,) not in self.axes:
      return None
    if self.axes.ins == (axis,):
      return self.replace(base=base, a=take(self.a, self.a.ndim - 1))
    return self.replace(base=base, b=take(self.b, self.b.ndim - 2))

  def take(self, ids: jax.Array) -> jax.Array:
    """base[ids] + s · A[:, ids]ᵀ Bᵀ: the branch's table is never built."""
    if self.axes != Axes():
      return super().take(ids)
    with jax.named_scope("adapter"):
      rows = jnp.take(mesh.whole(self.a).T, ids, axis=0)
    y = take(self.base, ids)
    with jax.named_scope("adapter"):
      return y + (rows @ self._up().T).astype(self.dtype)

  def conv(self, x: jax.Array, **how: Any) -> jax.Array:
    """conv(x, base) + s · B conv(dropout(x), A): A has the window and R channels, B is 1 x 1."""
    dims = how["dimension_numbers"]
    ungrouped = how["feature_group_count"] == how["batch_group_count"] == 1
    if self.stack or not ungrouped or self.axes.outs != (dims.rhs_spec[0] - self.ndim,):
      return super().conv(x, **how)
    shape = list(self.shape)
    shape[self.axes.outs[0]] = self.a.shape[-2]
    with jax.named_scope("adapter"):
      a = self.axes.as_kernel(mesh.whole(self.a), tuple(shape))
      low = jax.lax.conv_general_dilated(self.dropped(x), cast(a, x), **how)
    y = conv(x, self.base, **how)
    with jax.named_scope("adapter"):
      channels = dims.out_spec[1]
      up = jnp.moveaxis(low, channels, -1) @ cast(self._up(), x).T
      return y + jnp.moveaxis(up, -1, channels)

  def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """ragged_dot(x, base) + s · B(A dropout(x)), each row with the factors of its group."""
    if len(self.stack) != 1 or self.axes != Axes():
      return super().ragged_dot(x, group_sizes)
    with jax.named_scope("adapter"):
      a, b = (jnp.swapaxes(w, -1, -2) for w in (mesh.whole(self.a), self._up()))
      # A row is one expert's alone, so that the key of one of them draws for all rows.
      kept = x if self.key is None else dropout(self.key[0], x, self.dropout)
      low = ragged.product(kept, cast(a, x), group_sizes)
    y = ragged_dot(x, self.base, group_sizes)
    with jax.named_scope("adapter"):
      return y + ragged.product(low, cast(b, x), group_sizes)

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits of the *base* table: an adapter on a tied table changes the lookup only (as PEFT)."""
    return attend(self.base, x)

  def with_key(self, key: jax.Array, path: str) -> LoRA:
    keys = [paths.fold_in_path(key, p) for p in paths.layer_paths(path, self.stack)]
    return self.replace(key=jnp.stack(keys).reshape(self.stack))

  def child_specs(self, spec: P) -> LoRA:
    """Specs: A is split along its inputs as the kernel is, B along its outputs; the rank never."""
    stack, ins, outs = self.axes.places(spec, self.ndim)
    return self.replace(
      base=self.base_specs(spec),
      a=P(*stack, None, ins),
      b=P(*stack, outs, None),
      scale=P(*stack),
      rank=P(*stack),
      key=None if self.key is None else P(*stack),
    )

  def _up(self) -> jax.Array:
    """B with all that multiplies its columns."""
    return mesh.whole(self.b) * self.scale[..., None, None]

  def dropped(self, x: jax.Array) -> jax.Array:
    if self.key is None:
      return x
    if self.stack:
      raise ValueError("a whole stack of LoRA layers with dropout cannot be used in one einsum")
    return dropout(self.key, x, self.dropout)

  def _dims(self, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(self.shape[axis] for axis in axes)

  def branch(self, eqn: str) -> tuple[str, str, bool] | None:
    """Equations of the branch: `"...i,io->...o"` to (`"...i,ri->...r"`, `"...r,or->...o"`, False);
    None if there are none.
    """
    x_s, w_s, out_s = split_subscripts(eqn)
    ins, outs = ("".join(w_s[axis] for axis in axes) for axes in self.axes)
    stack = w_s[: len(self.stack)]
    contracted = set(w_s) - set(out_s)
    if contracted not in (set(ins), set(outs)) or not contracted <= set(x_s):
      return None
    r = free_letter(eqn)
    down, up = f"{stack}{r}{ins}", f"{stack}{outs}{r}"
    transposed = contracted == set(outs)
    if transposed:
      down, up = up, down
    batch = "".join(c for c in stack if c not in x_s)
    low = "".join(c for c in x_s if c not in contracted) + batch + r
    return f"{x_s},{down}->{low}", f"{low},{up}->{out_s}", transposed


class AsLoRA(Adapted):
  """A weight that is a LoRA whose factors are computed from its own children."""

  def as_lora(self) -> LoRA:
    """The same weight as a `LoRA`."""
    raise NotImplementedError

  def materialize(self) -> jax.Array:
    """See `LoRA.materialize`."""
    return self.as_lora().materialize()

  def conv(self, x: jax.Array, **how: Any) -> jax.Array:
    """See `LoRA.conv`."""
    return self.as_lora().conv(x, **how)

  def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `LoRA.ragged_dot`."""
    return self.as_lora().ragged_dot(x, group_sizes)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """See `LoRA.einsum`."""
    return self.as_lora().einsum(eqn, x)

  def unmerged(self, dense: jax.Array) -> jax.Array:
    """The base that this adapter was merged into: the inverse of `materialize`."""
    return self.as_lora().unmerged(dense)

  def with_key(self, key: jax.Array, path: str) -> AsLoRA:
    keys = [paths.fold_in_path(key, p) for p in paths.layer_paths(path, self.stack)]
    return self.replace(key=jnp.stack(keys).reshape(self.stack))
