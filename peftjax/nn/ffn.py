"""Activations of the feed-forward block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core.fence import fence

_SQRT_HALF = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """x Φ(x) with the exact Φ, by erf (Hendrycks & Gimpel 2016, eq. 1). Keeps only `x`."""
  return x * (0.5 * (1.0 + jax.lax.erf(x * _SQRT_HALF)))


def _gelu_forward(x: jax.Array) -> Any:
  x = fence(x)
  return fence(gelu(x)), x


def _gelu_backward(x: jax.Array, g: jax.Array) -> Any:
  x, g = fence((x, g))
  cdf = 0.5 * (1.0 + jax.lax.erf(x * _SQRT_HALF))
  pdf = jnp.exp(-0.5 * x * x) * _INV_SQRT_2PI
  return (fence(g * (cdf + x * pdf)),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) · up, silu(z) = z σ(z) (Shazeer 2020, arXiv 2002.05202, eq. 6). Keeps its inputs."""
  return jax.nn.silu(gate) * up


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> Any:
  gate, up = fence((gate, up))
  return fence(swiglu(gate, up)), (gate, up)


def _swiglu_backward(saved: Any, g: jax.Array) -> Any:
  gate, up, g = fence((*saved, g))
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  return fence((g * up * (sigmoid + silu * (1 - sigmoid)), g * silu))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)

# Hugging Face's names of `hidden_act`.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
}
