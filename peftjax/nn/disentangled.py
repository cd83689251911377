"""Attention whose scores are a sum over contents and relative positions (DeBERTa)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from peftjax.core.dropout import dropout


def relative_rows(length: int, buckets: int, farthest: int) -> np.ndarray:
  """The row of a table of relative positions for each query t and key s: int32 `[T, T]`.

  With the distance d = t − s, half as many near ones as there are `buckets` have their own, and
  beyond m = buckets / 2 it is, rounded up,

    δ(d) = sign(d) (m + log(|d| / m) / log((farthest − 1) / m) · (m − 1))

  The row is δ(d) + rows / 2, cut to the table, whose 2 · buckets rows are, without buckets,
  2 · `farthest`. Source: He et al. 2021, arXiv 2006.03654, eq. 3, with the logarithm of the
  authors' second version, in float32 as there.
  """
  distance = np.arange(length)[:, None] - np.arange(length)[None, :]
  if buckets:
    half = buckets // 2
    far = np.maximum(np.abs(distance), half).astype(np.float32)
    reach = np.log(np.float32((farthest - 1) / half))
    grown = np.ceil(np.log(far / np.float32(half)) / reach * np.float32(half - 1)) + half
    distance = np.where(np.abs(distance) <= half, distance, np.sign(distance) * grown)
  span = buckets or farthest
  return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


def disentangled_attention(
  q_BTD: Float[Array, "B T D"],
  k_BTD: Float[Array, "B T D"],
  v_BTD: Float[Array, "B T D"],
  positions: tuple[jax.Array | None, jax.Array | None],
  rows_TT: Any,
  valid_BT: Bool[Array, "B T"],
  num_heads: int,
  *,
  key: jax.Array | None = None,
  rate: float = 0.0,
) -> Float[Array, "B T D"]:
  """dropout(softmax(A, where both tokens are valid)) v per head, `[B, T, D]`.

    A[t, s] = (q[t]·k[s] + q[t]·kʳ[δ(t, s)] + k[s]·qʳ[δ(t, s)]) / √(terms · H)

  Source: He et al. 2021, arXiv 2006.03654, eq. 4. Scores and softmax are float32; the result has
  the dtype of `q`. All scores are made at once, `[B, N, T, T]`.

  Args:
    q_BTD, k_BTD, v_BTD: projections, D = N·H.
    positions: qʳ and kʳ `[P, D]` of the table of relative positions; None leaves a term out.
    rows_TT: δ, see `relative_rows`; None if both terms are left out.
    valid_BT: false on padding. A padding query attends to all evenly, as in the reference.
    num_heads: N.
    key, rate: key and rate of the dropout.
  """
  heads = lambda x: x.reshape(*x.shape[:-1], num_heads, -1)
  dot = lambda eqn, x, y: jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)
  q, k, v = map(heads, (q_BTD, k_BTD, v_BTD))
  scores, terms = dot("btnh,bsnh->bnts", q, k), 1
  of_queries, of_keys = positions
  if of_keys is not None:
    each = dot("btnh,pnh->bntp", q, heads(of_keys))
    scores, terms = scores + jnp.take_along_axis(each, rows_TT[None, None], -1), terms + 1
  if of_queries is not None:  # a row for each key, then turned
    each = dot("bsnh,pnh->bnsp", k, heads(of_queries))
    turned = jnp.take_along_axis(each, rows_TT.T[None, None], -1)
    scores, terms = scores + turned.swapaxes(2, 3), terms + 1
  scores = scores * (terms * q.shape[-1]) ** -0.5
  allowed = (valid_BT[:, :, None] & valid_BT[:, None, :])[:, None]
  p = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)).astype(q.dtype)
  return jnp.einsum("bnts,bsnh->btnh", dropout(key, p, rate), v).reshape(q_BTD.shape)
