"""Losses, averaged over the rows that are not padding."""

from __future__ import annotations

from collections.abc import Mapping

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


def next_token(logits_BTV: Float[Array, "B T V"], batch: Mapping[str, jax.Array]) -> jax.Array:
  """Mean −log p(token t | tokens before t) of the tokens with weight 1, in nats.

  Args:
    logits_BTV: at place t, of token t + 1.
    batch: "tokens" int `[B, T]`; "weights" float `[B, T]`, 1 where the token is to be predicted.
  """
  total, count = next_token_sums(logits_BTV, batch)
  return total / jnp.maximum(count, 1e-9)


def next_token_sums(
  logits_BTV: Float[Array, "B T V"], batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Numerator and denominator of `next_token`: the sum of −log p, and of the weights."""
  values = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits_BTV[:, :-1], batch["tokens"][:, 1:]
  )
  weights = batch["weights"][:, 1:]
  return (values * weights).sum(), weights.sum()
