"""Soft caps of scores and logits (Gemma 2, arXiv 2408.00118, section 2)."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap · tanh(x / cap), of any shape, between -cap and cap; x itself if the cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(y: jax.Array, cap: float | None) -> jax.Array | float:
  """∂y/∂x = 1 - (y / cap)² for y = `soft_cap(x, cap)`."""
  return 1.0 if cap is None else 1.0 - jnp.square(y / cap)
