"""Attention over whole rows, with a backward pass that keeps the probabilities once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core.dropout import drop, random_bytes
from peftjax.core.fence import fence
from peftjax.nn.mask import AttentionMask
from peftjax.nn.soft_cap import soft_cap, soft_cap_slope


def dense_attention(
  q_BTD: Float[Array, "B T D"],
  k_BSD: Float[Array, "B S KH"],
  v_BSD: Float[Array, "B S KH"],
  mask: AttentionMask,
  num_heads: int,
  kv_heads: int,
  key: jax.Array | None,
  rate: float,
  cap: float | None = None,
  bias_NTS: Float[Array, "N T S"] | None = None,
) -> Float[Array, "B T D"]:
  """`attention`; a query that sees no key attends to all evenly, as in the reference."""
  batch, length, source = *q_BTD.shape[:2], k_BSD.shape[1]
  random = None
  if key is not None:
    random = random_bytes(key, (batch, num_heads, length, source))
    random = random.reshape(batch, kv_heads, -1, source)
  hidden = mask.bias(length)
  if num_heads > kv_heads and hidden.shape[2] > 1:  # the heads of a group are more rows of queries
    hidden = jnp.tile(hidden, (1, 1, num_heads // kv_heads, 1))
  bias = None
  if bias_NTS is not None:
    bias = bias_NTS.astype(jnp.float32).reshape(1, kv_heads, -1, source)
  return _attention(q_BTD, k_BSD, v_BSD, hidden, bias, random, num_heads, kv_heads, rate, cap)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, hidden, bias, random, num_heads, kv_heads, rate, cap):
  return _forward(q, k, v, hidden, bias, random, num_heads, kv_heads, rate, cap)[0]


def _heads(x_BTD: jax.Array, num_heads: int, kv_heads: int) -> jax.Array:
  """`[B, T, N·H]` as `[B, K, N/K·T, H]`: every product then runs over one batch of matrices."""
  batch, length, width = x_BTD.shape
  if num_heads == kv_heads:
    return x_BTD.reshape(batch, length, num_heads, width // num_heads).transpose(0, 2, 1, 3)
  x = x_BTD.reshape(batch, length, kv_heads, num_heads // kv_heads, width // num_heads)
  return x.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width // num_heads)


def _join(x_BKTH: jax.Array, num_heads: int, kv_heads: int) -> jax.Array:
  """Undoes `_heads`."""
  batch, _, rows, size = x_BKTH.shape
  group = num_heads // kv_heads
  if group == 1:
    return fence(x_BKTH.transpose(0, 2, 1, 3).reshape(batch, rows, num_heads * size))
  x = x_BKTH.reshape(batch, kv_heads, group, rows // group, size).transpose(0, 3, 1, 2, 4)
  return fence(x.reshape(batch, rows // group, num_heads * size))


def _scores(q: jax.Array, k: jax.Array, cap: float | None) -> jax.Array:
  products = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
  return soft_cap(products, cap)


def _forward(q_BTD, k_BSD, v_BSD, hidden, bias, random, num_heads, kv_heads, rate, cap) -> Any:
  scale = (q_BTD.shape[-1] // num_heads) ** -0.5
  q = _heads(q_BTD * scale, num_heads, kv_heads)
  q, k, v = fence((q, _heads(k_BSD, kv_heads, kv_heads), _heads(v_BSD, kv_heads, kv_heads)))
  scores = _scores(q, k, cap) + (hidden if bias is None else hidden + bias)
  p = fence(jax.nn.softmax(scores).astype(q.dtype))
  dropped = p if random is None else drop(p, random, rate)
  out = _join(fence(jnp.einsum("bnts,bnsh->bnth", dropped, v)), num_heads, kv_heads)
  return out, (q, k, v, p, random, None if bias is None else ())


def _backward(num_heads, kv_heads, rate, cap, saved, g_BTD) -> Any:
  q, k, v, p, random, biased = saved
  undrop = lambda x: x if random is None else drop(x, random, rate)
  g = fence(_heads(fence(g_BTD), num_heads, kv_heads))
  dv = jnp.einsum("bnts,bnth->bnsh", fence(undrop(p)), g)
  dp = fence(undrop(jnp.einsum("bnth,bnsh->bnts", g, v)))
  wide = dp.astype(jnp.float32)
  ds = p * (wide - (wide * p).sum(-1, keepdims=True))
  d_bias = None if biased is None else ds.sum(0, keepdims=True)
  if cap is not None:  # scores are computed again: they would take as much memory as p
    ds = ds * soft_cap_slope(_scores(q, k, cap), cap)
  ds = fence(ds.astype(p.dtype))
  dq = jnp.einsum("bnts,bnsh->bnth", ds, k) * (q.shape[-1] ** -0.5)
  dk = jnp.einsum("bnts,bnth->bnsh", ds, q)
  joined = (_join(x, kv_heads, kv_heads) for x in (dk, dv))
  return _join(dq, num_heads, kv_heads), *joined, None, d_bias, None


_attention.defvjp(_forward, _backward)
