"""Losses, averaged over the rows that are not padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def weighted_mean(values: Float[Array, " B"], weights: Float[Array, " B"]) -> jax.Array:
  """Σ w·v / Σ w, and 0 where every weight is 0."""
  return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def classification(
  logits: Float[Array, "B K"], labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> jax.Array:
  """Mean cross entropy −log softmax(logits)[label] of the rows with weight 1, in nats."""
  return weighted_mean(
    optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), weights
  )


def regression(
  logits: Float[Array, "B 1"], labels: Float[Array, " B"], weights: Float[Array, " B"]
) -> jax.Array:
  """Mean squared error of the rows with weight 1."""
  return weighted_mean(jnp.square(logits[:, 0] - labels), weights)
