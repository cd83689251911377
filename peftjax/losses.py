"""Losses as a sum and a count over the rows or tokens that are not padding, and their mean.

Batches are averaged by adding both and dividing once: a mean of means would weigh a token by how
few others there are beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Sums = tuple[Float[Array, ""], Float[Array, ""]]  # Σ w·v and Σ w, float32 scalars


def mean(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
  """total / count, and 0 where nothing counts."""
  return total / jnp.where(count > 0, count, 1.0)


@jax.named_scope("loss")
def classification_sums(
  logits: Float[Array, "B K"], labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> Sums:
  """Numerator and denominator of `classification`."""
  logits = logits.astype(jnp.float32)
  return _sums(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), weights)


@jax.named_scope("loss")
def regression_sums(
  logits: Float[Array, "B 1"], labels: Float[Array, " B"], weights: Float[Array, " B"]
) -> Sums:
  """Numerator and denominator of `regression`."""
  return _sums(jnp.square(logits[:, 0].astype(jnp.float32) - labels), weights)


@jax.named_scope("loss")
def next_token_sums(logits_BTV: Float[Array, "B T V"], batch: Mapping[str, jax.Array]) -> Sums:
  """Numerator and denominator of `next_token`: the sum of −log p, and of the weights."""
  values = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits_BTV[:, :-1].astype(jnp.float32), batch["tokens"][:, 1:]
  )
  return _sums(values, batch["weights"][:, 1:])


def classification(
  logits: Float[Array, "B K"], labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> Float[Array, ""]:
  """Mean cross entropy −log softmax(logits)[label] of the rows with weight 1, in nats."""
  return mean(*classification_sums(logits, labels, weights))


def regression(
  logits: Float[Array, "B 1"], labels: Float[Array, " B"], weights: Float[Array, " B"]
) -> Float[Array, ""]:
  """Mean squared error of the rows with weight 1."""
  return mean(*regression_sums(logits, labels, weights))


def next_token(
  logits_BTV: Float[Array, "B T V"], batch: Mapping[str, jax.Array]
) -> Float[Array, ""]:
  """Mean −log p(token t | tokens before t) of the tokens with weight 1, in nats.

  Args:
    logits_BTV: at place t, the logits of token t + 1.
    batch: "tokens" int `[B, T]`; "weights" float `[B, T]`, 1 where the token is to be predicted.
  """
  return mean(*next_token_sums(logits_BTV, batch))


def _sums(values: jax.Array, weights: jax.Array) -> Sums:
  weights = jnp.asarray(weights, jnp.float32)
  return (values * weights).sum(), weights.sum()
