"""Heads of encoders: from a text's features, or each token's, to labels."""

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
  """Dropout, dense, an activation, dropout, projection: the head of RoBERTa and ELECTRA."""

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


def _plain(c: Any, x: jax.Array, keys: Any, name: str = "classifier") -> jax.Array:
  """Dropout and a projection."""
  return Linear(c.labels, name=name)(dropout(keys[0], x, c.head_dropout))


def _span(c: Any, x: jax.Array, keys: Any) -> jax.Array:
  """As transformers names it where the outputs are where an answer starts and ends."""
  return _plain(c, x, keys, "qa_outputs")


def _relu(c: Any, x: jax.Array, keys: Any) -> jax.Array:
  """DistilBERT's head: dense, ReLU, dropout, projection."""
  return _plain(c, jax.nn.relu(Linear(c.width, name="pre_classifier")(x)), keys)


class ContextPooler(nn.Module):
  """DeBERTa's pooler: act(dense(dropout(first token)))."""

  config: Any

  @nn.compact
  def __call__(self, x_BD: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    y = Linear(c.width, name="dense")(dropout(key, x_BD, c.pooler_dropout))
    return ACTIVATIONS[c.pooler_activation](y)


def _context(c: Any, x: jax.Array, keys: Any) -> jax.Array:
  return _plain(c, ContextPooler(c, name="pooler")(x, keys[1]), keys)


# Heads for whole texts, by the name that `bert.KINDS` has for them. Tokens have the same for all.
HEADS: Mapping[str, Callable[..., jax.Array]] = {
  "plain": _plain,
  "tanh": _dense(jnp.tanh),
  "gelu": _dense(ACTIVATIONS["gelu"]),
  "relu": _relu,
  "context": _context,
}
OF_TOKENS: Mapping[str, Callable[..., jax.Array]] = {"token": _plain, "span": _span}


class Head(nn.Module):
  """The body's features, `[B, D]` or for each token `[B, T, D]`, to logits `[..., labels]`."""

  config: Any

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    return OF_TOKENS.get(c.labels_of, HEADS[c.kind.head])(c, x, keys)
