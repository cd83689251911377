"""Dropout by bytes: one byte of random bits an element."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from peftjax.core.fence import fence


def keep_level(rate: float) -> int:
  """How many of 256 byte values keep an element: `rate` rounded to 1/256."""
  return min(max(round(256 * (1.0 - rate)), 1), 256)


def random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Uniform uint8 of `shape`.

  `jax.random.bits(..., uint8)` spends a whole threefry block on each byte, and its 32-bit draw
  half of one; counting through the blocks ourselves uses all of it (18.9 M bytes on two cores:
  205, 36 and 11 ms). Other key types than threefry fall back to `jax.random.bits`.
  """
  size = math.prod(shape)
  words = -(-size // 4)
  if jax.random.key_impl(key) == "threefry2x32":
    bits = threefry_2x32(jax.random.key_data(key), jax.lax.iota(jnp.uint32, words))
  else:
    bits = jax.random.bits(key, (words,), jnp.uint32)
  flat = jax.lax.bitcast_convert_type(fence(bits), jnp.uint8).reshape(-1)
  return fence(flat if size == 4 * words else flat[:size]).reshape(shape)


def drop(x: jax.Array, random: jax.Array, rate: float) -> jax.Array:
  """`x / keep` where the byte is below `keep · 256`, else 0, for keep = `keep_level(rate)/256`."""
  level = keep_level(rate)
  return jnp.where(random < level, x * (256 / level), 0).astype(x.dtype)


def dropout(key: jax.Array | None, x: jax.Array, rate: float) -> jax.Array:
  """Inverted dropout (Srivastava et al. 2014): E[dropout(x)] = x.

  The rate is rounded to 1/256 and the kept values are scaled by the rounded rate, so the
  expectation is exact. No key, or a rate of 0, is the identity.
  """
  if key is None or keep_level(rate) == 256:
    return x
  return drop(x, random_bytes(key, x.shape), rate)
