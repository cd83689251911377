"""Products of arrays with views of weights, as one `einsum` of the weight."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core.einsum import einsum, linear
from peftjax.core.view import Factor, View, factors_of

# For `dot_general`: contracted axes of both operands, and batch axes of both.
Dimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot_general(
  x: jax.Array, view: View, dims: Dimensions, *, view_left: bool, dtype: Any, precision: Any
) -> jax.Array | None:
  """`lax.dot_general` of an array and a view; None if an axis of the weight is used in two ways.

  Args:
    x, view: the operands.
    dims: as passed to `lax.dot_general`.
    view_left: the view is the first operand.
    dtype: dtype of the result. Where it is wider than that of x, x is multiplied in it.
    precision: precision of all products.
  """
  (left, right), (left_batch, right_batch) = dims
  x_axes, view_axes = (right, left) if view_left else (left, right)
  x_batch, view_batch = (right_batch, left_batch) if view_left else (left_batch, right_batch)
  free = [j for j in range(len(view.groups)) if j not in {*view_axes, *view_batch}]
  parts = [factors_of(view, axis) for axis in range(view.weight.ndim)]
  uses = [{f for j in axes for f in view.groups[j]} for axes in (view_axes, view_batch, free)]
  if any(sum(not use.isdisjoint(axis) for use in uses) > 1 for axis in parts):
    return None

  letters = iter(string.ascii_letters)
  of_axis = [next(letters) for _ in parts]  # of each axis of the weight
  letter_of = lambda name: of_axis[name.axis] if isinstance(name, Factor) else name
  matched = dict(zip((*x_axes, *x_batch), (*view_axes, *view_batch), strict=True))
  # Axes of x: each of its own has a letter, the others are factors of the weight.
  own = {i: next(letters) for i in range(x.ndim) if i not in matched}
  names = [n for i in range(x.ndim) for n in ([own[i]] if i in own else view.groups[matched[i]])]
  size_of = {letter: x.shape[i] for i, letter in own.items()}
  size = lambda name: name.size if isinstance(name, Factor) else size_of[name]
  order = _side_by_side(names, parts)
  x = jnp.transpose(x.reshape(list(map(size, names))), [names.index(name) for name in order])
  x_s = list(dict.fromkeys(map(letter_of, order)))
  size_of |= dict(zip(of_axis, view.weight.shape, strict=True))
  x = x.reshape([size_of[letter] for letter in x_s]).astype(jnp.promote_types(x.dtype, dtype))

  batch = [factor for j in view_batch for factor in view.groups[j]]
  theirs = [factor for j in free for factor in view.groups[j]]
  wanted = [*batch, *([*theirs, *own.values()] if view_left else [*own.values(), *theirs])]
  ones = [letter for letter, axis in zip(of_axis, parts, strict=True) if not axis]
  out_s = [*dict.fromkeys(map(letter_of, wanted)), *ones]
  with at(precision):
    y = _product("".join(x_s), "".join(of_axis), "".join(out_s), x, view.weight)

  mine = set(own.values())
  split = [n for c in out_s for n in ([c] if c in mine else parts[of_axis.index(c)])]
  y = jnp.transpose(y.reshape(list(map(size, split))), [split.index(name) for name in wanted])
  own_shape, their_shape = [size_of[c] for c in own.values()], [view.shape[j] for j in free]
  rest = their_shape + own_shape if view_left else own_shape + their_shape
  return y.reshape([view.shape[j] for j in view_batch] + rest).astype(dtype)


def at(precision: Any) -> Any:
  """A context in which products have the precision that an equation names, if it names one."""
  found = {
    p for p in (precision if isinstance(precision, tuple) else (precision,)) if p is not None
  }
  if not found:
    return contextlib.nullcontext()
  if all(isinstance(p, jax.lax.Precision) for p in found):
    return jax.default_matmul_precision(max(found, key=lambda p: p.value).name.lower())
  return jax.default_matmul_precision(found.pop().name)


def _side_by_side(names: list[Any], parts: list[list[Factor]]) -> list[Any]:
  """`names` with the factors of each axis of the weight together, at the place of its last one."""
  last = {name.axis: name for name in names if isinstance(name, Factor)}
  order: list[Any] = []
  for name in names:
    if not isinstance(name, Factor):
      order.append(name)
    elif last[name.axis] == name:
      order += parts[name.axis]
  return order


def _product(x_s: str, w_s: str, out_s: str, x: jax.Array, weight: Any) -> jax.Array:
  plain = len(w_s) == 2 and x_s[-1:] == w_s[0] and out_s == x_s[:-1] + w_s[1]
  return linear(x, weight) if plain else einsum(f"{x_s},{w_s}->{out_s}", x, weight)
