"""Parts that layers of encoders share, with a norm before or after them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from peftjax.nn import virtual
from peftjax.nn.attention import attention
from peftjax.nn.ffn import ACTIVATIONS
from peftjax.nn.linear import Linear
from peftjax.nn.mask import AttentionMask


class SelfAttention(nn.Module):
  """Projections to query, key and value, and attention among them, `[B, T, D]`."""

  config: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask: AttentionMask, key: jax.Array | None) -> jax.Array:
    c = self.config
    made = (Linear(c.width, self.use_bias, name=name) for name in ("query", "key", "value"))
    q, k, v = (project(x_BTD) for project in made)
    k, v, mask = virtual.with_prefix(self, k, v, mask)
    return attention(q, k, v, mask, c.heads, key=key, rate=c.attention_dropout)


class Intermediate(nn.Module):
  """act(dense(x)), `[B, T, F]`."""

  config: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return ACTIVATIONS[self.config.activation](Linear(self.config.ffn, name="dense")(x))
