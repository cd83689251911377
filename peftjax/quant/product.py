"""The product with a quantised weight: dequantised at use, forward and again backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.einsum import split_subscripts
from peftjax.core.fence import tied
from peftjax.quant.formats import Format


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(
  eqn: str, fmt: Format, axis: int, x: jax.Array, codes: jax.Array, scales: Any
) -> jax.Array:
  """einsum(eqn, x, W) with W = fmt.dequantize(codes, scales) in the dtype of x.

  The dense W lives for the one product. Keeping only the codes does not ensure it: XLA merges the
  forward and the backward dequantisation, hoists them out of a decoding loop, and on CPUs runs
  them all before the first product. So W is made to depend on data: in the forward pass on x, in
  the backward pass on the cotangent (`tied`).

  Args:
    eqn: two operands; every axis of x is in W or in the result.
    fmt, axis: of the weight.
    x: activations. The gradient is with respect to them alone.
    codes, scales: of the frozen weight.
  """
  return jnp.einsum(eqn, x, fmt.dequantize(tied(codes, x), scales, axis, x.dtype))


def _forward(eqn: str, fmt: Format, axis: int, x: Any, codes: Any, scales: Any) -> Any:
  return product(eqn, fmt, axis, x, codes, scales), (codes, scales)


def _backward(eqn: str, fmt: Format, axis: int, saved: Any, g: jax.Array) -> Any:
  codes, scales = saved
  x_s, w_s, out_s = split_subscripts(eqn)
  dense = fmt.dequantize(tied(codes, g), scales, axis, g.dtype)
  dx = jnp.einsum(f"{out_s},{w_s}->{x_s}", g, dense)
  return dx, _no_gradient(codes), jax.tree.map(_no_gradient, scales)


product.defvjp(_forward, _backward)


def _no_gradient(x: jax.Array) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)
