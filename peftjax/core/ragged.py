"""`lax.ragged_dot` that `vmap` takes over any of its operands, where JAX's own asks for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.lax import RaggedDotDimensionNumbers as Dimensions


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """x W_e of the rows of each group: `[M, in]` by `[E, in, out]` to `[M, out]`.

  Args:
    x: rows that lie group by group.
    w: a matrix for each group, in the dtype of x.
    sizes: `[E]` integers, the rows of each group; their sum is M.
  """
  return _forth(x, w, sizes)


def _forward(x: Any, w: Any, sizes: Any) -> Any:
  """Keeps what the gradients that will be asked for need, and no more."""
  kept = (x.value if w.perturbed else None, w.value if x.perturbed else None, sizes.value)
  return _forth(x.value, w.value, sizes.value), kept


def _backward(kept: Any, g: Any) -> Any:
  x, w, sizes = kept
  if isinstance(g, SymbolicZero):
    g = jnp.zeros(g.shape, g.dtype)
  dx = None if w is None else back(g, w, sizes)
  return dx, None if x is None else _groups(x, g, sizes), None


product.defvjp(_forward, _backward, symbolic_zeros=True)


def _rows(axis: int) -> Callable[..., jax.Array]:
  """The product with W over that axis of it."""
  dims = Dimensions((((1,), (axis,)), ((), ())), [0], [0])
  rows = custom_vmap(lambda x, w, sizes: jax.lax.ragged_dot_general(x, w, sizes, dims))

  @rows.def_vmap
  def mapped(n: int, by: Any, x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
    x, sizes = _wide(x, n, by[0]), _wide(sizes, n, by[2])
    if by[1]:
      return jax.vmap(rows.fun)(x, w, sizes), True
    # One matrix a group for all: the rows of all lie side by side, sorted by their group again.
    each = jnp.arange(x.shape[1])
    group_of = lambda sizes: jnp.searchsorted(jnp.cumsum(sizes), each, side="right")
    order = jnp.argsort(jax.vmap(group_of)(sizes).reshape(-1))
    y = rows(x.reshape(-1, x.shape[-1])[order], w, sizes.sum(0))
    return y[jnp.argsort(order)].reshape(*x.shape[:2], -1), True

  return rows


# By W, and by the transpose of each.
_forth, back = _rows(1), _rows(2)


@custom_vmap
def _groups(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
  """xᵀ g over the rows of each group: `[M, in]` and `[M, out]` to `[E, in, out]`."""
  dims = Dimensions((((0,), (0,)), ((), ())), [0], [])
  return jax.lax.ragged_dot_general(x, g, sizes, dims)


@_groups.def_vmap
def _groups_mapped(n: int, by: Any, *args: jax.Array) -> Any:
  wide = (_wide(x, n, is_mapped) for x, is_mapped in zip(args, by, strict=True))
  return jax.vmap(_groups.fun)(*wide), True


def _wide(x: jax.Array, n: int, is_mapped: bool) -> jax.Array:
  return x if is_mapped else jnp.broadcast_to(x, (n, *x.shape))
