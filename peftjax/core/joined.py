"""`Joined`: weights and arrays side by side, as a program that concatenates kernels sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from peftjax.core import contraction
from peftjax.core.view import View, dense


class Joined(flax.struct.PyTreeNode):
  """The concatenation of views and arrays along an axis.

  Attributes:
    parts: two or more, at least one of them a `View`.
    axis: the axis along which they are joined.
  """

  parts: tuple[Any, ...]
  axis: int = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.parts[0].shape)
    shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
    return tuple(shape)

  @property
  def dtype(self) -> Any:
    return self.parts[0].dtype

  def dense(self, primitive: str) -> jax.Array:
    """The dense array; see `View.dense`."""
    return jnp.concatenate([dense(part, primitive) for part in self.parts], axis=self.axis)

  def cast(self, dtype: Any) -> Joined:
    cast = lambda part: part.cast(dtype) if isinstance(part, View) else part.astype(dtype)
    return self.replace(parts=tuple(map(cast, self.parts)))

  def transpose(self, permutation: Sequence[int]) -> Joined:
    turned = tuple(part.transpose(permutation) for part in self.parts)
    return self.replace(parts=turned, axis=tuple(permutation).index(self.axis))


def dot_general(
  x: jax.Array, w: Any, dims: contraction.Dimensions, *, view_left: bool, dtype: Any, precision: Any
) -> jax.Array:
  """`contraction.dot_general` of an array and a view, or of each joined part."""
  if isinstance(w, View):
    how: Any = dict(view_left=view_left, dtype=dtype, precision=precision)
    y = contraction.dot_general(x, w, dims, **how)
    if y is not None:
      w.uses.note(w.path, "factored")
      return y
    w = w.dense("dot_general")
  if not isinstance(w, Joined):
    pair = (w, x) if view_left else (x, w)
    return jax.lax.dot_general(
      pair[0], pair[1], dims, precision=precision, preferred_element_type=dtype
    )
  (left, right), (left_batch, right_batch) = dims
  x_axes, w_axes = (right, left) if view_left else (left, right)
  x_batch, w_batch = (right_batch, left_batch) if view_left else (left_batch, right_batch)
  at = dict(zip((*w_axes, *w_batch), (*x_axes, *x_batch), strict=True)).get(w.axis)
  pieces = [x] * len(w.parts)
  if at is not None:
    sizes = [part.shape[w.axis] for part in w.parts]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pieces = jnp.split(x, ends[:-1], axis=at)
  ys = [
    dot_general(piece, part, dims, view_left=view_left, dtype=dtype, precision=precision)
    for piece, part in zip(pieces, w.parts, strict=True)
  ]
  if w.axis in w_axes:
    return sum(ys[1:], ys[0])
  if w.axis in w_batch:
    return jnp.concatenate(ys, axis=list(w_batch).index(w.axis))
  free = [i for i in range(len(w.shape)) if i not in (*w_axes, *w_batch)]
  before = len(w_batch) + (0 if view_left else x.ndim - len(x_axes) - len(x_batch))
  return jnp.concatenate(ys, axis=before + free.index(w.axis))
