"""Layer and root-mean-square normalisation with their closed-form derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core.fence import computed_once, fence


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
  x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """(x − mean) / √(var + eps) · scale + bias over the last axis (Ba et al. 2016).

  Statistics are float32, the result has the dtype of `x`. Keeps `x`, the mean and the reciprocal
  deviation for the backward pass.

  Args:
    x: `[..., D]`.
    scale, bias: `[D]`.
    eps: added to the variance.
  """
  return _forward(x, scale, bias, eps)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> Any:
  wide = x.astype(jnp.float32)
  mean = wide.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + eps)
  x, mean, inverse = fence((x, mean, inverse))
  y = (x.astype(jnp.float32) - mean) * inverse * _row(scale, x) + _row(bias, x)
  return fence(y.astype(x.dtype)), (x, mean, inverse, scale)


def _backward(eps: float, saved: Any, g: jax.Array) -> Any:
  x, mean, inverse, scale = saved
  g = fence(g)
  wide = g.astype(jnp.float32)
  normed = (x.astype(jnp.float32) - mean) * inverse
  gs = wide * _row(scale, x)
  across = (gs * normed).mean(-1, keepdims=True)
  dx = inverse * (gs - gs.mean(-1, keepdims=True) - normed * across)
  batch = tuple(range(x.ndim - 1))
  return computed_once(dx.astype(x.dtype)), (wide * normed).sum(batch), wide.sum(batch)


def _row(vector: jax.Array, x: jax.Array) -> jax.Array:
  """`[D]` with leading axes of size 1, as many as `x` has."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
  """`layer_norm` with its parameters."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    return layer_norm(x, scale, bias, self.eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
  x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
  """x / √(mean(x²) + eps) · scale over the last axis (Zhang & Sennrich 2019, eq. 4).

  Statistics are float32, the result has the dtype of `x`. Keeps `x` and the reciprocal root.

  Args:
    x: `[..., D]`.
    scale: `[D]`.
    eps: added to the mean square.
  """
  return _rms_forward(x, scale, eps)[0]


def _rms_forward(x: jax.Array, scale: jax.Array, eps: float) -> Any:
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  x, inverse = fence((x, inverse))
  y = x.astype(jnp.float32) * inverse * _row(scale, x)
  return fence(y.astype(x.dtype)), (x, inverse, scale)


def _rms_backward(eps: float, saved: Any, g: jax.Array) -> Any:
  x, inverse, scale = saved
  g = fence(g)
  wide = g.astype(jnp.float32)
  normed = x.astype(jnp.float32) * inverse
  gs = wide * _row(scale, x)
  dx = inverse * (gs - normed * (gs * normed).mean(-1, keepdims=True))
  batch = tuple(range(x.ndim - 1))
  return computed_once(dx.astype(x.dtype)), (wide * normed).sum(batch)


rms_norm.defvjp(_rms_forward, _rms_backward)


class RMSNorm(nn.Module):
  """`rms_norm` with its parameter, to which `offset` is added in float32 (1 in Gemma)."""

  eps: float
  offset: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.constant(1.0 - self.offset)
    scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
    if self.offset:
      scale = scale.astype(jnp.float32) + self.offset
    return rms_norm(x, scale, self.eps)
