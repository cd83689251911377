"""Keys and values of the tokens a decoder has seen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from peftjax.nn import virtual
from peftjax.nn.mask import AttentionMask


class Cache(flax.struct.PyTreeNode):
  """The state that generation keeps between tokens, at most S of them per row.

  Attributes:
    layers: a (key, value) pair `[B, S, K·H]` for each layer, or one pair of `[L, B, S, K·H]`.
    valid: bool `[B, S]`, true where there is a token (and not the padding before a prompt).
    index: int32, where the next token goes, in every row.
    begun: there are tokens in it, and before them those of a prompt, if the model has one.
  """

  layers: Any
  valid: jax.Array
  index: jax.Array
  begun: bool = flax.struct.field(pytree_node=False, default=False)

  @classmethod
  def empty(cls, config: Any, batch: int, length: int) -> Cache:
    """A cache for `length` tokens of `batch` texts, in the compute dtype of a decoder's config."""
    shape = (batch, length, config.kv_heads * config.head_size)
    pair = lambda *stack: tuple(jnp.zeros((*stack, *shape), config.dtype) for _ in range(2))
    layers = (
      pair(config.layers) if config.scan_layers else tuple(pair() for _ in range(config.layers))
    )
    return cls(layers, jnp.zeros((batch, length), bool), jnp.int32(0))

  def advance(self, mask_BT: jax.Array) -> Cache:
    """This cache with the next T columns marked as tokens where the mask is true; index stays."""
    at = (jnp.int32(0), self.index)
    return self.replace(valid=jax.lax.dynamic_update_slice(self.valid, mask_BT, at))

  def after(self, layers: Any, count: int) -> Cache:
    """This cache with the layers' new pairs, `count` columns on."""
    return self.replace(layers=layers, index=self.index + count, begun=True)


def context(
  module: nn.Module,
  tokens: jax.Array,
  mask: jax.Array | None,
  positions: jax.Array | None,
  segments: jax.Array | None,
  cache: Cache | None,
  window: int | None = None,
) -> tuple[jax.Array, AttentionMask, Cache | None]:
  """Positions, the attention mask, and the cache with these tokens marked, for one call.

  The virtual tokens of a prompt come before the first tokens of a text, and are seen by all of its
  documents. Positions count them, and those of a prefix.

  Raises:
    ValueError: if there are more tokens than positions.
  """
  mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
  prompt = 0 if cache is not None and cache.begun else virtual.prompt_length(module)
  if prompt:
    mask = virtual.before(True, mask, prompt)
    segments = None if segments is None else virtual.before(-1, segments, prompt)
    if positions is not None:
      positions = virtual.before(jnp.arange(prompt), positions + prompt, prompt)
  if cache is None:
    virtual.check_length(module, tokens.shape[1], module.config.max_length)
    before = jnp.int32(0)
    visible = AttentionMask.of_decoder(
      mask, segments, window=window, positions=positions, common=prompt
    )
  else:
    before = cache.valid.sum(1, keepdims=True)
    cache = cache.advance(mask)
    visible = AttentionMask.of_decoder(cache.valid, first=cache.index, window=window)
  if positions is None:
    positions = jnp.maximum(before + jnp.cumsum(mask, 1) - 1, 0)
  return positions + virtual.prefix_length(module), visible, cache


def write(
  pair: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The (key, value) pair with `[B, T, K·H]` new entries from column `index` on."""
  at = (jnp.int32(0), index, jnp.int32(0))
  one, two = (jax.lax.dynamic_update_slice(old, x, at) for old, x in zip(pair, new, strict=True))
  return one, two
