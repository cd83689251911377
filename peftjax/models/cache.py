"""Keys and values of the tokens a decoder has seen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from peftjax.nn import virtual


class Cache(flax.struct.PyTreeNode):
  """What generation keeps between tokens, at most S of them a row.

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
    """For `length` tokens of `batch` texts, in the compute dtype of a decoder's config."""
    shape = (batch, length, config.kv_heads * config.head_size)
    pair = lambda *stack: tuple(jnp.zeros((*stack, *shape), config.dtype) for _ in range(2))
    layers = (
      pair(config.layers) if config.scan_layers else tuple(pair() for _ in range(config.layers))
    )
    return cls(layers, jnp.zeros((batch, length), bool), jnp.int32(0))

  def advance(self, mask_BT: jax.Array) -> Cache:
    """With the next T columns marked as tokens where the mask is true; index stays."""
    at = (jnp.int32(0), self.index)
    return self.replace(valid=jax.lax.dynamic_update_slice(self.valid, mask_BT, at))

  def after(self, layers: Any, count: int) -> Cache:
    """With the layers' new pairs, `count` columns on."""
    return self.replace(layers=layers, index=self.index + count, begun=True)


def context(
  module: nn.Module,
  tokens: jax.Array,
  mask: jax.Array | None,
  positions: jax.Array | None,
  segments: jax.Array | None,
  cache: Cache | None,
  window: int | None = None,
) -> tuple[jax.Array, jax.Array, Cache | None]:
  """Positions, the bias of the scores, and the cache with these tokens marked, of a decoder's call.

  The virtual tokens of a prompt come before the first tokens of a text, and are seen by all of its
  documents. Positions count them, and those of a prefix.

  Raises:
    ValueError: there are more tokens than positions.
  """
  mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
  prompt = 0 if cache is not None and cache.begun else virtual.prompt_length(module)
  if prompt:
    mask = virtual.before(True, mask, prompt)
    segments = None if segments is None else virtual.before(-1, segments, prompt)
    if positions is not None:
      positions = virtual.before(jnp.arange(prompt), positions + prompt, prompt)
  length = mask.shape[1]
  if cache is None:
    virtual.check_length(module, tokens.shape[1], module.config.max_length)
    before = jnp.int32(0)
    bias = causal_bias(mask, segments, window=window, positions=positions, common=prompt)
  else:
    before = cache.valid.sum(1, keepdims=True)
    cache = cache.advance(mask)
    bias = causal_bias(cache.valid, first=cache.index, length=length, window=window)
  if positions is None:
    positions = jnp.maximum(before + jnp.cumsum(mask, 1) - 1, 0)
  return positions + virtual.prefix_length(module), bias, cache


def write(
  pair: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The (key, value) pair with `[B, T, K·H]` new entries from column `index` on."""
  at = (jnp.int32(0), index, jnp.int32(0))
  one, two = (jax.lax.dynamic_update_slice(old, x, at) for old, x in zip(pair, new, strict=True))
  return one, two


def causal_bias(
  mask: jax.Array,
  segments: jax.Array | None = None,
  *,
  first: jax.Array | int = 0,
  length: int | None = None,
  window: int | None = None,
  positions: jax.Array | None = None,
  common: int = 0,
) -> jax.Array:
  """What a decoder adds to its scores: 0 where token t may see token s, else very negative.

  It may if s is a token, not after t, of the same segment, and less than `window` before t.

  Args:
    mask: bool `[B, S]`, true on tokens.
    segments: int `[B, S]`, the document each token is of, where several share a row.
    first: the column of the first query.
    length: T, the number of queries, by default S.
    window: of sliding attention.
    positions: int `[B, S]`, where each token is in its text, by default counted along the mask:
      what a window is measured in, so that it counts neither padding nor other documents.
    common: the first columns, which later tokens of every segment may see.

  Returns:
    float32 `[B, 1, T, S]`.
  """
  source = mask.shape[1]
  s = jnp.arange(source)[None, :]
  t = first + jnp.arange(length or source)[:, None]
  allowed = (s <= t)[None] & mask[:, None, :].astype(bool)
  if window is not None:
    at = jnp.cumsum(mask, 1) if positions is None else positions
    of_queries = jax.lax.dynamic_slice_in_dim(at, first, length or source, 1)
    allowed &= of_queries[:, :, None] - at[:, None, :] < window
  if segments is not None:
    allowed &= (segments[:, :, None] == segments[:, None, :]) | (s < common)[None]
  return jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)[:, None]
