"""`product`: `lax.ragged_dot` that `vmap` takes over any of its operands, which JAX's own does not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """x W_e of the rows of each group: `[M, in]` by `[E, in, out]` to `[M, out]`.

  Args:
    x: rows that lie group by group.
    w: a matrix for each group, in the dtype of x.
    sizes: `[E]` integers, the rows of each group; their sum is M.
  """
  return _rows(x, w, sizes)


def _forward(x: Any, w: Any, sizes: Any) -> Any:
  """Keeps what the gradients that will be asked for need, and no more."""
  kept = (x.value if w.perturbed else None, w.value if x.perturbed else None, sizes.value)
  return _rows(x.value, w.value, sizes.value), kept


def _backward(kept: Any, g: Any) -> Any:
  x, w, sizes = kept
  if isinstance(g, SymbolicZero):
    g = jnp.zeros(g.shape, g.dtype)
  dx = None if w is None else _rows(g, jnp.swapaxes(w, -1, -2), sizes)
  return dx, None if x is None else _groups(x, g, sizes), None


product.defvjp(_forward, _backward, symbolic_zeros=True)


@custom_vmap
def _rows(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  return jax.lax.ragged_dot(x, w, sizes)


@_rows.def_vmap
def _(n: int, mapped: Any, x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
  x, sizes = (_wide(a, n, is_mapped) for a, is_mapped in ((x, mapped[0]), (sizes, mapped[2])))
  if mapped[1]:
    return jax.vmap(jax.lax.ragged_dot)(x, w, sizes), True
  # One matrix a group for all: the rows of all go side by side, sorted by their group again.
  rows = jnp.arange(x.shape[1])
  of_row = lambda sizes: jnp.searchsorted(jnp.cumsum(sizes), rows, side="right")
  order = jnp.argsort(jax.vmap(of_row)(sizes).reshape(-1))
  y = _rows(x.reshape(-1, x.shape[-1])[order], w, sizes.sum(0))
  return y[jnp.argsort(order)].reshape(*x.shape[:2], -1), True


@custom_vmap
def _groups(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
  """xᵀ g over the rows of each group: `[M, in]` and `[M, out]` to `[E, in, out]`."""
  dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return jax.lax.ragged_dot_general(x, g, sizes, dims)


@_groups.def_vmap
def _(n: int, mapped: Any, *args: jax.Array) -> Any:
  wide = (_wide(x, n, is_mapped) for x, is_mapped in zip(args, mapped, strict=True))
  return jax.vmap(_groups.fun)(*wide), True


def _wide(x: jax.Array, n: int, is_mapped: bool) -> jax.Array:
  return x if is_mapped else jnp.broadcast_to(x, (n, *x.shape))
