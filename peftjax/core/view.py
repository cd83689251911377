"""`View`: a weight as a traced program sees it, through casts, transposes, reshapes and slices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from peftjax.core.weight import Weight


class Factor(NamedTuple):
  """A part of an axis of a weight: an index i along it adds `i * stride` to the axis's index."""

  axis: int
  stride: int
  size: int


# The factors that an axis of a view runs over, major first; () for an axis of size 1.
Group = tuple[Factor, ...]


class Uses:
  """The record of each weight's fate by path: "factored", or the primitives that made it dense.

  Attributes:
    by_path: that record.
    through_rules: look into functions with a rule of their own for gradients, which then is
      ignored; for those who want no gradients.
  """

  def __init__(self, *, through_rules: bool = False) -> None:
    self.by_path: dict[str, set[str]] = {}
    self.through_rules = through_rules

  def note(self, path: str, use: str) -> None:
    self.by_path.setdefault(path, set()).add(use)


class View(flax.struct.PyTreeNode):
  """An array of `shape` and `dtype` whose entries are those of a weight, in another order.

  Attributes:
    weight: any `Weight`.
    groups: for each axis of the view the factors of the weight's axes that it runs over.
    as_dtype: the dtype that the program has cast the weight to.
    path: path of the weight among the arguments.
    uses: the record to write to.
  """

  weight: Any
  groups: tuple[Group, ...] = flax.struct.field(pytree_node=False)
  as_dtype: Any = flax.struct.field(pytree_node=False)
  path: str = flax.struct.field(pytree_node=False)
  uses: Uses = flax.struct.field(pytree_node=False)

  @classmethod
  def whole(cls, weight: Weight, path: str, uses: Uses) -> View:
    """A view of the weight as it is."""
    return cls(weight, _groups(weight.shape), jnp.dtype(weight.dtype), path, uses)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(math.prod(factor.size for factor in group) for group in self.groups)

  @property
  def dtype(self) -> Any:
    return self.as_dtype

  @property
  def is_whole(self) -> bool:
    """Tells whether no axis was moved, split or merged."""
    return self.groups == _groups(self.weight.shape)

  def dense(self, primitive: str) -> jax.Array:
    """The dense array, for a primitive that cannot use the factors.

    Raises:
      ValueError: if the weight has a key of dropout, which has no dense form.
    """
    if getattr(self.weight, "key", None) is not None:
      raise ValueError(
        f"{self.path} has dropout and is used by {primitive!r} as a dense array, which would skip "
        "it: write dropout=0.0 for its method"
      )
    if self.weight.quantised and self.uses.by_path.get(self.path, set()) <= {"factored"}:
      warnings.warn(
        f"{self.path} is quantised and {primitive!r} makes it a dense array "
        f"{self.weight.shape}, which then may stay in memory from the forward to the backward "
        "pass; quantise without it (where=), or multiply by it in another way",
        stacklevel=2,
      )
    self.uses.note(self.path, primitive)
    parts = sorted({factor for group in self.groups for factor in group}, key=_order)
    flat = self.weight.materialize().astype(self.dtype).reshape([part.size for part in parts])
    order = [parts.index(factor) for group in self.groups for factor in group]
    return jnp.transpose(flat, order).reshape(self.shape)

  def transpose(self, permutation: Sequence[int]) -> View:
    return self.replace(groups=tuple(self.groups[i] for i in permutation))

  def squeeze(self, dimensions: Sequence[int]) -> View:
    return self.replace(groups=tuple(g for i, g in enumerate(self.groups) if i not in dimensions))

  def expand(self, shape: Sequence[int], dimensions: Sequence[int]) -> View | None:
    """Axis i as axis `dimensions[i]` of `shape`, the others of size 1; None if rows repeat."""
    groups: list[Group] = [()] * len(shape)
    for group, axis in zip(self.groups, dimensions, strict=True):
      groups[axis] = group
    view = self.replace(groups=tuple(groups))
    return view if view.shape == tuple(shape) else None

  def reshape(self, shape: Sequence[int]) -> View | None:
    """The same entries in the same order; None if an axis would be cut unevenly."""
    rest = [factor for group in reversed(self.groups) for factor in reversed(group)]
    groups = []
    for size in shape:
      group = []
      while size > 1:
        factor = rest.pop()
        if size % factor.size == 0:
          size //= factor.size
        elif factor.size % size == 0:
          minor = factor.size // size
          rest.append(factor._replace(size=minor))
          factor = factor._replace(size=size, stride=factor.stride * minor)
          size = 1
        else:
          return None
        group.append(factor)
      groups.append(tuple(group))
    return self.replace(groups=tuple(groups))

  def along(self, axis: int) -> int | None:
    """The axis of the weight that an axis of the view is, whole; None if it is none."""
    group = self.groups[axis]
    whole = len(group) == 1 and group[0].size == self.weight.shape[group[0].axis]
    return group[0].axis if whole else None

  def along_stack(self, axis: int) -> bool:
    """Tells whether an axis of the view is one of the weight's layers."""
    of = self.along(axis)
    return of is not None and of < len(self.weight.stack)

  def cut(self, axis: int, take: Callable[[jax.Array, int], jax.Array]) -> View | None:
    """The view with `take(array, axis)`, a part of one axis, applied to it; None if it cannot.

    A single layer is then no longer part of a stack.
    """
    of = self.along(axis)
    if of is None:
      return None
    if of >= len(self.weight.stack):
      weight = self.weight.cut(of - self.weight.ndim, take)
    else:
      weight = jax.tree.map(lambda child: take(child, of), self.weight)
    if weight is None:
      return None
    size = weight.shape[of]
    group = (Factor(of, 1, size),) if size > 1 else ()
    view = self.replace(
      weight=weight, groups=(*self.groups[:axis], group, *self.groups[axis + 1 :])
    )
    if size > 1 or of >= len(self.weight.stack):
      return view
    return view.without(of, jax.tree.map(lambda child: jnp.squeeze(child, of), weight))

  def without(self, axis: int, weight: Any) -> View:
    """The view of a weight that has lost an axis, which the view loses too."""
    moved = lambda f: f._replace(axis=f.axis - 1) if f.axis > axis else f
    return self.replace(
      weight=weight, groups=tuple(tuple(map(moved, group)) for group in self.groups)
    )

  def layers(self, ids: jax.Array, batch: Sequence[int]) -> View | None:
    """The view whose axis 0 is the layers `ids` of a stack, and gets the axes of `batch`."""
    if self.along(0) != 0 or not self.weight.stack:
      return None
    weight = jax.tree.map(lambda child: jnp.take(child, ids, axis=0), self.weight)
    moved = lambda f: f._replace(axis=f.axis + ids.ndim - 1)
    groups = [tuple(map(moved, group)) for group in self.groups[1:]]
    own = _groups(ids.shape)
    for axis, group in zip(batch, own, strict=True):
      groups.insert(axis, group)
    return self.replace(weight=weight, groups=tuple(groups))

  def row(self) -> View:
    """The view inside a scan over the first axis, when its weight has been sliced already."""
    return self.replace(groups=self.groups[1:]).without(0, self.weight)

  def cast(self, dtype: Any) -> View:
    return self.replace(as_dtype=jnp.dtype(dtype))


def dense(x: Any, primitive: str) -> Any:
  """The array of a view; anything else as it is."""
  return x.dense(primitive) if hasattr(x, "dense") else x


def _groups(shape: Sequence[int]) -> tuple[Group, ...]:
  return tuple((Factor(i, 1, n),) if n != 1 else () for i, n in enumerate(shape))


def _order(factor: Factor) -> tuple[int, int]:
  return factor.axis, -factor.stride


def factors_of(view: View, axis: int) -> list[Factor]:
  """The factors of an axis of the weight, major first."""
  found = {factor for group in view.groups for factor in group if factor.axis == axis}
  return sorted(found, key=_order)
