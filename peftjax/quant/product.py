"""The product with a quantised weight: dequantised at use, forward and again backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import mesh, ragged
from peftjax.core.einsum import free_letter, split_subscripts
from peftjax.core.fence import tied
from peftjax.quant.formats import Format


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def product(
  eqn: str, fmt: Format, axis: int, spec: tuple[Any, ...], x: jax.Array, codes: Any, scales: Any
) -> jax.Array:
  """einsum(eqn, x, W) with W = fmt.dequantize(codes, scales) in the dtype of x.

  The dense W lives for the one product. Keeping only the codes does not ensure it: XLA merges the
  forward and the backward dequantisation, hoists them out of a decoding loop, and on CPUs runs
  them all before the first product. So W is made to depend on data: in the forward pass on x, in
  the backward pass on the cotangent (`tied`).

  Args:
    eqn: two operands; every axis of x is in W or in the result.
    fmt, axis: format and block axis of the weight.
    spec: the mesh axes that its last axes are split over; () if that is not known. Parts split
      over the data axes are gathered for the product as codes, a byte for two weights.
    x: activations. The gradient is with respect to them alone.
    codes, scales: arrays of the frozen weight.
  """
  return _product(eqn, fmt, axis, spec, x, codes, scales)


def _forward(eqn: str, fmt: Format, axis: int, spec: Any, x: Any, codes: Any, scales: Any) -> Any:
  return product(eqn, fmt, axis, spec, x, codes, scales), (codes, scales)


def _backward(eqn: str, fmt: Format, axis: int, spec: Any, saved: Any, g: jax.Array) -> Any:
  codes, scales = saved
  x_s, w_s, out_s = split_subscripts(eqn)
  dx = _product(f"{out_s},{w_s}->{x_s}", fmt, axis, spec, g, codes, scales)
  return dx, _no_gradient(codes), jax.tree.map(_no_gradient, scales)


product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ragged_product(
  fmt: Format, axis: int, x: jax.Array, codes: Any, scales: Any, sizes: jax.Array
) -> jax.Array:
  """`core.ragged.product` with W `[E, in, out]`, all of which lives for the one product."""
  return ragged.product(x, opened(fmt, axis, (), codes, scales, x), sizes)


def _ragged_forward(fmt: Format, axis: int, x: Any, codes: Any, scales: Any, sizes: Any) -> Any:
  return ragged_product(fmt, axis, x, codes, scales, sizes), (codes, scales, sizes)


def _ragged_backward(fmt: Format, axis: int, saved: Any, g: jax.Array) -> Any:
  codes, scales, sizes = saved
  dx = ragged.back(g, opened(fmt, axis, (), codes, scales, g), sizes)
  return dx, *jax.tree.map(_no_gradient, saved)


ragged_product.defvjp(_ragged_forward, _ragged_backward)


def _product(
  eqn: str, fmt: Format, axis: int, spec: Any, x: jax.Array, codes: Any, scales: Any
) -> jax.Array:
  codes, scales = _closed(spec, codes, scales, x)

  def whole(x: jax.Array, codes: Any, scales: Any) -> jax.Array:
    return jnp.einsum(eqn, x, fmt.dequantize(codes, scales, axis, x.dtype))

  def by_halves(x: jax.Array, codes: Any, scales: Any) -> jax.Array:
    return _einsum_of_pairs(eqn, x, fmt.halves(codes, scales, axis, x.dtype), axis)

  if fmt.bits == 8:
    return whole(x, codes, scales)
  return jax.lax.platform_dependent(x, codes, scales, tpu=by_halves, default=whole)


def _einsum_of_pairs(eqn: str, x: jax.Array, halves: jax.Array, axis: int) -> jax.Array:
  """einsum(eqn, x, W), where entry 2i+j of W along `axis` is entry i of `halves[j]`."""
  x_s, w_s, out_s = split_subscripts(eqn)
  i, j = w_s[axis], free_letter(eqn)
  if i in x_s:
    at = _place(i, x_s, x.ndim)
    x = x.reshape(*x.shape[:at], -1, 2, *x.shape[at + 1 :])
  pair = lambda subscripts: subscripts.replace(i, i + j)
  y = jnp.einsum(f"{pair(x_s)},{j}{w_s}->{pair(out_s)}", x, halves)
  if i in out_s:
    at = _place(i, out_s, y.ndim - 1)
    y = y.reshape(*y.shape[:at], -1, *y.shape[at + 2 :])
  return y


def _place(letter: str, subscripts: str, ndim: int) -> int:
  """The axis, of `ndim`, that a letter names; an ellipsis may stand for some."""
  before, _, after = subscripts.partition(letter)
  return ndim - 1 - len(after) if "." in before else len(before)


def opened(fmt: Format, axis: int, spec: Any, codes: Any, scales: Any, x: jax.Array) -> jax.Array:
  """The dense W in the dtype of x, and not before x is there."""
  return fmt.dequantize(*_closed(spec, codes, scales, x), axis, x.dtype)


def _closed(spec: tuple[Any, ...], codes: Any, scales: Any, x: jax.Array) -> tuple[Any, Any]:
  """Codes and scales, not before x is there; whole along the parts of "data" and "fsdp"."""
  arrays: tuple[Any, Any] = tied((codes, scales), x)
  if not spec:
    return arrays
  # "tensor" goes on splitting them.
  kept = [tuple(name for name in mesh.group(names) if name not in mesh.DATA) for names in spec]
  near = lambda x: mesh.constrain(x, [None] * (x.ndim - len(kept)) + kept)
  arrays = jax.tree.map(lambda x: near(x) if x.ndim >= len(kept) else x, arrays)
  return arrays


def _no_gradient(x: jax.Array) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)
