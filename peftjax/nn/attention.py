"""Multi-head attention with a backward pass that keeps the probabilities once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core.dropout import drop, keep_level, random_bytes
from peftjax.core.fence import fence


def attention(
  q_BTD: jax.Array,
  k_BSD: jax.Array,
  v_BSD: jax.Array,
  bias: jax.Array,
  num_heads: int,
  *,
  key: jax.Array | None = None,
  rate: float = 0.0,
) -> jax.Array:
  """dropout(softmax(q kᵀ/√H + bias)) v per head (Vaswani et al. 2017, eq. 1), `[B, T, D]`.

  Scores and softmax are float32; the result has the dtype of `q`. With a key, the probabilities
  are dropped at `rate`.

  Args:
    q_BTD, k_BSD, v_BSD: projections, D = N·H.
    bias: added to the scores, broadcastable to `[B, N, T, S]`: 0 to attend, very negative not to.
    num_heads: N.
    key, rate: of the dropout.
  """
  random = None
  if key is not None and keep_level(rate) < 256:
    batch, length, source = *q_BTD.shape[:2], k_BSD.shape[1]
    random = random_bytes(key, (batch, num_heads, length, source))
  return _attention(q_BTD, k_BSD, v_BSD, bias, random, num_heads, rate)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, bias, random, num_heads, rate):
  return _forward(q, k, v, bias, random, num_heads, rate)[0]


def _heads(x_BTD: jax.Array, num_heads: int) -> jax.Array:
  """`[B, T, D]` to `[B, N, T, H]`: every product then runs over one batch of matrices."""
  batch, length, width = x_BTD.shape
  return x_BTD.reshape(batch, length, num_heads, width // num_heads).transpose(0, 2, 1, 3)


def _join(x_BNTH: jax.Array) -> jax.Array:
  batch, heads, length, size = x_BNTH.shape
  return fence(x_BNTH.transpose(0, 2, 1, 3).reshape(batch, length, heads * size))


def _forward(q_BTD, k_BSD, v_BSD, bias, random, num_heads, rate) -> Any:
  scale = (q_BTD.shape[-1] // num_heads) ** -0.5
  q, k, v = fence(tuple(_heads(x, num_heads) for x in (q_BTD * scale, k_BSD, v_BSD)))
  scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32) + bias
  p = fence(jax.nn.softmax(scores).astype(q.dtype))
  dropped = p if random is None else drop(p, random, rate)
  out = _join(fence(jnp.einsum("bnts,bnsh->bnth", dropped, v)))
  return out, (q, k, v, p, random)


def _backward(num_heads, rate, saved, g_BTD) -> Any:
  q, k, v, p, random = saved
  undrop = lambda x: x if random is None else drop(x, random, rate)
  g = fence(_heads(fence(g_BTD), num_heads))
  dv = jnp.einsum("bnts,bnth->bnsh", fence(undrop(p)), g)
  dp = fence(undrop(jnp.einsum("bnth,bnsh->bnts", g, v)))
  wide = dp.astype(jnp.float32)
  ds = fence((p * (wide - (wide * p).sum(-1, keepdims=True))).astype(p.dtype))
  dq = jnp.einsum("bnts,bnsh->bnth", ds, k) * (q.shape[-1] ** -0.5)
  dk = jnp.einsum("bnts,bnth->bnsh", ds, q)
  return _join(dq), _join(dk), _join(dv), None, None


_attention.defvjp(_forward, _backward)
