"""`layout`: the axes of every kernel and table of a function, found by tracing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from peftjax.core import paths
from peftjax.core.einsum import split_subscripts
from peftjax.core.factored import traced
from peftjax.core.layout import Axes, ConvAxes, TableAxes
from peftjax.core.view import Uses
from peftjax.core.weight import Weight


class _Found:
  """Axes by path; those of a lookup win over those of a product with the same table."""

  def __init__(self) -> None:
    self.axes: dict[str, Axes] = {}

  def product(self, path: str, eqn: str) -> None:
    x_s, w_s, out_s = split_subscripts(eqn)
    at = lambda keep: tuple(i - len(w_s) for i, c in enumerate(w_s) if keep(c))
    ins, outs = at(lambda c: c not in out_s), at(lambda c: c in out_s and c not in x_s)
    leading = len(w_s) - len(ins) - len(outs)
    # `Axes` has no place for a stack that does not come first.
    if ins and outs and all(axis >= leading - len(w_s) for axis in (*ins, *outs)):
      self.axes.setdefault(path, Axes(ins, outs))


class Probe(Weight):
  """An array whose uses are recorded."""

  array: Any
  path: str = flax.struct.field(pytree_node=False)
  found: _Found = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.array.shape)

  @property
  def dtype(self) -> Any:
    return self.array.dtype

  def materialize(self) -> jax.Array:
    return self.array

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    self.found.product(self.path, eqn)
    return super().einsum(eqn, x)

  def take(self, ids: jax.Array) -> jax.Array:
    self.found.axes[self.path] = TableAxes()
    return super().take(ids)

  def cut(self, axis: int, take: Callable[[jax.Array, int], jax.Array]) -> Probe:
    return self.replace(array=take(self.array, self.ndim + axis))

  def conv(self, x: jax.Array, **how: Any) -> jax.Array:
    out, *ins = how["dimension_numbers"].rhs_spec
    axes = sorted(axis - self.ndim for axis in ins)
    self.found.axes.setdefault(self.path, ConvAxes(tuple(axes), (out - self.ndim,)))
    return super().conv(x, **how)

  def ragged_dot(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    self.found.axes.setdefault(self.path, Axes())
    return super().ragged_dot(x, group_sizes)


def layout(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, Axes]:
  """Axes of every array of `params` with which `fn(params, ...)` multiplies or looks up.

  Inside a scan or a map a kernel has its own axes; the additional axes it has in `params` are a
  stack that lies before them.

  Args:
    fn: a function that could be traced by `jax.jit`.
    params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
    *args, **kwargs: its other arguments, likewise.

  Returns:
    A dict from path to axes, for `method.attach(key, params, layout)`.
  """
  found = _Found()

  def probed(path: str, leaf: Any) -> Any:
    several = not isinstance(leaf, Weight) and len(leaf.shape) >= 2
    floats = several and jnp.issubdtype(leaf.dtype, jnp.floating)
    return Probe(leaf, path, found) if floats else leaf

  uses = Uses(through_rules=True)

  def run(params: Any, *args: Any, **kwargs: Any) -> None:  # a result need not be an array
    traced(fn, uses, paths.map_leaves(probed, params), *args, **kwargs)

  shapes(run, params, *args, **kwargs)
  return found.axes


def shapes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """`jax.eval_shape` that traces array arguments and passes all others on as they are."""
  flat, treedef = jax.tree.flatten((args, kwargs))
  arrays = {i: x for i, x in enumerate(flat) if hasattr(x, "dtype")}

  def of(arrays: Any) -> Any:
    full = [arrays.get(i, x) for i, x in enumerate(flat)]
    args, kwargs = jax.tree.unflatten(treedef, full)
    return fn(*args, **kwargs)

  return jax.eval_shape(of, arrays)
