"""Activations of the feed-forward block and their derivatives in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core.fence import fence

_SQRT_HALF = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327
_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715

# f(z) and f'(z), elementwise. The compiler drops what only the unused one needs.
Curve = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def _identity(z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  return z, jnp.ones_like(z)


def _relu(z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  """ReLU; the slope at 0 is 0, as in `jax.nn.relu`."""
  return jnp.maximum(z, 0), (z > 0).astype(z.dtype)


def _sigmoid(z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  s = jax.nn.sigmoid(z)
  return s, s * (1 - s)


def _swish(z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  """z σ(βz); σ + βz σ(1 − σ)."""
  scaled = z if beta is None else beta * z
  s = jax.nn.sigmoid(scaled)
  return z * s, s + scaled * s * (1 - s)


def _gelu(z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  """z Φ(z); Φ + z φ."""
  cdf = 0.5 * (1.0 + jax.lax.erf(z * _SQRT_HALF))
  return z * cdf, cdf + z * (jnp.exp(-0.5 * z * z) * _INV_SQRT_2PI)


def _gelu_tanh(z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  """z p, p = (1 + tanh u)/2, u = √(2/π) (z + 0.044715 z³); p + z (1 − tanh² u) u'/2."""
  t = jnp.tanh(_SQRT_2_OVER_PI * z * (1 + _CUBIC * z * z))
  rise = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * z * z)
  return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * rise


# Activations by name. Only that of swish depends on β.
CURVES: Mapping[str, Curve] = {
  "identity": _identity,
  "relu": _relu,
  "sigmoid": _sigmoid,
  "gelu": _gelu,
  "gelu_tanh": _gelu_tanh,
  "swish": _swish,
}


def curve(name: str, z: jax.Array, beta: Any) -> tuple[jax.Array, jax.Array]:
  """f(z) and f'(z) of one of `CURVES`, computed in float32 at least, in that dtype."""
  wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  return CURVES[name](wide, None if beta is None else beta.astype(wide.dtype))


def hidden(name: str, z: jax.Array, gate: Any, beta: Any) -> jax.Array:
  """h = f(z) or, gated, f(gate) ⊙ z, in the dtype of z."""
  f = curve(name, z if gate is None else gate, beta)[0]
  return (f if gate is None else f * z).astype(z.dtype)


def hidden_gradients(name: str, z: jax.Array, gate: Any, beta: Any, g: jax.Array) -> Any:
  """∂L/∂z, ∂L/∂gate and ∂L/∂β for g = ∂L/∂h; None for arguments that are None."""
  inner = z if gate is None else gate
  f, slope = curve(name, inner, beta)
  df = g if gate is None else g * z
  dz = df * slope if gate is None else g * f
  dgate = None if gate is None else (df * slope).astype(z.dtype)
  return dz.astype(z.dtype), dgate, _beta_gradient(inner, beta, df)


def _beta_gradient(z: jax.Array, beta: Any, df: jax.Array) -> Any:
  """Σ ∂L/∂f ⊙ z² σ(βz) (1 − σ(βz)), for swish."""
  if beta is None:
    return None
  z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  s = jax.nn.sigmoid(beta.astype(z.dtype) * z)
  return (df * z * z * s * (1 - s)).sum().astype(beta.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(name: str, z: jax.Array, gate: Any = None, beta: Any = None) -> jax.Array:
  """f(z) or, with a gate, f(gate) ⊙ z, in the dtype of z. Keeps only its arguments.

  Args:
    name: one of `CURVES`.
    z: pre-activations of any shape.
    gate: those inside f, of the same shape, or None.
    beta: scalar array β of swish, z σ(βz) (Ramachandran et al. 2017, arXiv 1710.05941), or None
      for β = 1. No other activation has it.
  """
  return hidden(name, z, gate, beta)


def _forward(name: str, z: jax.Array, gate: Any, beta: Any) -> Any:
  z, gate = fence((z, gate))
  return fence(hidden(name, z, gate, beta)), (z, gate, beta)


def _backward(name: str, saved: Any, g: jax.Array) -> Any:
  z, gate, beta = saved
  z, gate, g = fence((z, gate, g))
  return fence(hidden_gradients(name, z, gate, beta, g))


activate.defvjp(_forward, _backward)


def gelu(x: jax.Array) -> jax.Array:
  """x Φ(x) with the exact Φ, by erf (Hendrycks & Gimpel 2016, eq. 1). Keeps only `x`."""
  return activate("gelu", x)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) · up, silu(z) = z σ(z) (Shazeer 2020, arXiv 2002.05202, eq. 6). Keeps its inputs."""
  return activate("swish", up, gate)


# Hugging Face's names of `hidden_act`.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_new": partial(activate, "gelu_tanh"),
  "gelu_pytorch_tanh": partial(activate, "gelu_tanh"),
  "relu": jax.nn.relu,
  "silu": partial(activate, "swish"),
  "swish": partial(activate, "swish"),
}
