"""Heads of encoders: what an encoder gives of a text, or of each token, to labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.core.dropout import dropout
from peftjax.nn.ffn import ACTIVATIONS
from peftjax.nn.linear import Linear


class DenseHead(nn.Module):
  """Dropout, dense, an activation, dropout, projection: RoBERTa's and ELECTRA's."""

  config: Any
  activation: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array, keys: Any) -> jax.Array:
    c = self.config
    x = Linear(c.width, name="dense")(dropout(keys[0], x, c.head_dropout))
    x = dropout(keys[1], self.activation(x), c.head_dropout)
    return Linear(c.labels, name="out_proj")(x)


def _dense(activation: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
  return lambda c, x, keys: DenseHead(c, activation, name="classifier")(x, keys)


def _plain(c: Any, x: jax.Array, keys: Any) -> jax.Array:
  """Dropout and a projection."""
  return Linear(c.labels, name="classifier")(dropout(keys[0], x, c.head_dropout))


def _relu(c: Any, x: jax.Array, keys: Any) -> jax.Array:
  """DistilBERT's: dense, ReLU, dropout, projection."""
  return _plain(c, jax.nn.relu(Linear(c.width, name="pre_classifier")(x)), keys)


class ContextPooler(nn.Module):
  """DeBERTa's: act(dense(dropout(first token)))."""

  config: Any

  @nn.compact
  def __call__(self, x_BD: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    y = Linear(c.width, name="dense")(dropout(key, x_BD, c.pooler_dropout))
    return ACTIVATIONS[c.pooler_activation](y)


def _context(c: Any, x: jax.Array, keys: Any) -> jax.Array:
  return _plain(c, ContextPooler(c, name="pooler")(x, keys[1]), keys)


# Heads of whole texts, by the name that `bert.KINDS` has for them. Tokens and images have the plain
# one.
HEADS: Mapping[str, Callable[..., jax.Array]] = {
  "plain": _plain,
  "tanh": _dense(jnp.tanh),
  "gelu": _dense(ACTIVATIONS["gelu"]),
  "relu": _relu,
  "context": _context,
}


class Head(nn.Module):
  """What the body gives, `[B, D]` or of each token `[B, T, D]`, to logits `[..., labels]`."""

  config: Any

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    return HEADS[c.kind.head if c.labels_of == "text" else "plain"](c, x, keys)
