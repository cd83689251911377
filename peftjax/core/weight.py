"""`Weight`: a pytree node that stands for one dense array."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import PartitionSpec as P

from peftjax.core import ragged, tracing

# Kinds of weights that were read without the bridge.
_told: set[str] = set()

_DENSE = (
  "a quantised weight {} is read as a dense array, which then may stay in memory from the forward "
  "to the backward pass. Call pj.apply(model, params, ...) instead of model.apply or nn.unbox."
)


class Unboxed(Exception):
  """A module reads a `Weight` as an array."""


class Weight(flax.struct.PyTreeNode, meta.AxisMetadata):
  """One dense array in another form. A weight *is* its `materialize()`; all else is speed.

  Invariants that every subclass keeps:

  * `einsum(eqn, x) == jnp.einsum(eqn, x, materialize())` and `take(ids) == materialize()[ids]`
    (a weight that holds a dropout `key` excepted: it has no dense form and raises).
  * `shape` is computed from the children, never stored, so it survives `vmap` and `nn.scan`.
  * Static fields describe every slice of a stack alike and count axes from the end; whatever
    varies by layer, adapter or trial is an array child.
  * Nodes never validate themselves: masks, shardings, `None` and vmap axes pass through them.

  Being a Flax box (`meta.AxisMetadata`) makes a weight work inside unmodified linen modules:
  `self.param(...)` unboxes it, which materialises.
  """

  # Names of the mesh (or logical) axes of the dense array, where a model annotated them.
  names: tuple[str | None, ...] | None = flax.struct.field(
    pytree_node=False, default=None, kw_only=True
  )

  # Children that came from the pretrained files; a method's `attach` made the rest.
  pretrained: ClassVar[frozenset[str]] = frozenset({"base"})

  # True if only the optimizer of its own method may train it, whose state is an `optim.Owner`.
  owned: ClassVar[bool] = False

  @property
  def shape(self) -> tuple[int, ...]:
    raise NotImplementedError

  @property
  def dtype(self) -> Any:
    raise NotImplementedError

  @property
  def quantised(self) -> bool:
    """True if the dense array is larger than the stored one, and has lost precision."""
    return False

  @property
  def cuts(self) -> tuple[int, ...]:
    """A number for each axis, which can be split over as many devices as divide that number."""
    return self.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def stack(self) -> tuple[int, ...]:
    """The leading axes, of layers; the rest of the shape is one layer's matrix."""
    return self.shape[:-2]

  def true_size(self) -> int:
    """The number of parameters in the children here; padding, scales and keys are not counted."""
    raise NotImplementedError

  def materialize(self) -> jax.Array:
    """The dense array this weight stands for, of `shape` and `dtype`."""
    raise NotImplementedError

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """`einsum(eqn, x, W)` in the dtype of `x`."""
    return jnp.einsum(eqn, x, self.materialize().astype(x.dtype))

  def linear(self, x: jax.Array) -> jax.Array:
    """x W over the last axis, `[..., out]`; the leading axes are one while multiplying."""
    y = self.einsum("ti,io->to", x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])

  def shift(self, y: jax.Array) -> jax.Array:
    """y + b of a bias `[out]`, along the last axis, in the dtype of y."""
    return y + self.materialize().astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `W[ids]` of a `[V, D]` table: `[..., D]` for integer ids `[...]`."""
    return jnp.take(self.materialize(), ids, axis=0)

  def cut(self, axis: int, take: Callable[[jax.Array, int], jax.Array]) -> Weight | None:
    """The weight of `take(W, axis)`, a part of one axis; None if it is no such weight.

    Args:
      axis: an axis that is not in the stack, counted from the end.
      take: function of an array and an axis, counted from its beginning.
    """
    return None

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits `x Wᵀ` of a tied `[V, D]` table: `[..., V]` for x `[..., D]`."""
    return self.einsum("...d,vd->...v", x)

  def conv(self, x: jax.Array, **how: Any) -> jax.Array:
    """`lax.conv_general_dilated(x, W, **how)` in the dtype of `x`."""
    return jax.lax.conv_general_dilated(x, self.materialize().astype(x.dtype), **how)

  def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`lax.ragged_dot(x, W, group_sizes)` in the dtype of `x`: `[M, in]` by `[E, in, out]`."""
    return ragged.product(x, self.materialize().astype(x.dtype), group_sizes)

  def transposed(self) -> Weight:
    """The kernel `[D, V]` of a table `[V, D]`, in the same form.

    Raises:
      ValueError: if this kind of weight has none.
    """
    raise ValueError(f"a {type(self).__name__} cannot be a head of its own; merge it first")

  def __getitem__(self, at: Any) -> Any:
    raise ValueError(
      f"a {type(self).__name__} stands for an array and is none, but is read as one: call the "
      "model by pj.apply or pj.factored, or adapt one of NNX by pj.nnx.attach(key, model, method)"
    )

  # The Flax box protocol. A slice of a stack needs no bookkeeping: shapes are computed.

  def unbox(self) -> jax.Array:
    if tracing.current().unboxing == "refuse" and self.ndim >= 2:
      raise Unboxed
    warn_unbridged(self, f"of shape {self.shape}")
    if self.quantised:
      warnings.warn(_DENSE.format(self.shape), stacklevel=2)
    return self.materialize()

  def replace_boxed(self, val: Any) -> Any:
    raise TypeError(
      f"{type(self).__name__} cannot be overwritten with a dense array; "
      "write to its children with .replace(...), or pj.merge(params) first"
    )

  def add_axis(self, index: int, params: dict[Any, Any]) -> Weight:
    return self

  def remove_axis(self, index: int, params: dict[Any, Any]) -> Weight:
    return self

  def child_specs(self, spec: P) -> Weight:
    """This node with a `PartitionSpec` for each child, derived from the dense array's `spec`."""
    raise NotImplementedError

  def get_partition_spec(self) -> Any:
    return self.child_specs(P(*(self.names or ())))

  def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
      lambda spec: jax.sharding.NamedSharding(mesh, spec),
      self.get_partition_spec(),
      is_leaf=lambda spec: isinstance(spec, P),
    )


def children(weight: Weight) -> dict[str, Any]:
  """The pytree children of a weight by field name (static fields left out)."""
  fields = dataclasses.fields(weight)
  return {f.name: getattr(weight, f.name) for f in fields if f.metadata.get("pytree_node", True)}


def warn_unbridged(weight: Weight, where: str) -> None:
  """Warns, once per kind of weight, if a module reads it outside of `pj.apply`."""
  kind = type(weight).__name__
  if tracing.current().unboxing == "warn" and kind not in _told:
    _told.add(kind)
    warnings.warn(
      f"a {kind} {where} was read without pj.apply, by model.apply or nn.unbox: most modules then "
      "compute with a dense array, and an adapter's dropout and shared arrays are left out. "
      "Write pj.apply(model, params, ...)",
      stacklevel=3,
    )


def is_weight(leaf: Any) -> bool:
  return isinstance(leaf, Weight)


def materialize(leaf: Any) -> jax.Array:
  """The dense array of a leaf: the leaf itself, or the array the weight stands for."""
  return leaf.materialize() if isinstance(leaf, Weight) else leaf
