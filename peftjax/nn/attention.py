"""Multi-head attention."""

from __future__ import annotations

import jax

from peftjax.core.dropout import keep_level
from peftjax.nn.blockwise import blockwise_attention
from peftjax.nn.dense_attention import dense_attention
from peftjax.nn.mask import AttentionMask

# From that many scores a head on blocks are faster than whole rows, on CPUs too, and take less
# memory: experiments/benchmarks/attention.py.
MANY_SCORES = 512 * 512

KERNELS = {"dense": dense_attention, "blockwise": blockwise_attention}


def kernel_name(length: int, source: int | None = None, *, cached: bool = False) -> str:
  """The key in `KERNELS` of what `attention` computes with.

  Args:
    length: T, the queries.
    source: S, the keys, by default T.
    cached: the queries continue a cache.
  """
  many = length * (source or length) >= MANY_SCORES
  return "blockwise" if many and not cached else "dense"


def attention(
  q_BTD: jax.Array,
  k_BSD: jax.Array,
  v_BSD: jax.Array,
  mask: AttentionMask,
  num_heads: int,
  num_kv_heads: int | None = None,
  *,
  key: jax.Array | None = None,
  rate: float = 0.0,
) -> jax.Array:
  """dropout(softmax(q kᵀ/√H, where `mask` allows)) v per head, `[B, T, D]`.

  Source: Vaswani et al. 2017, eq. 1. Scores and softmax are float32; the result has the dtype of
  `q`. With a key, the probabilities are dropped at `rate`.

  Args:
    q_BTD: projection, D = N·H.
    k_BSD, v_BSD: projections, D = K·H.
    mask: which keys each query may attend to.
    num_heads: N.
    num_kv_heads: K, a divisor of N, by default N: N/K heads in a row share keys and values
      (Ainslie et al. 2023, arXiv 2305.13245).
    key, rate: of the dropout.
  """
  key = None if keep_level(rate) == 256 else key
  name = kernel_name(q_BTD.shape[1], k_BSD.shape[1], cached=mask.first is not None)
  return KERNELS[name](q_BTD, k_BSD, v_BSD, mask, num_heads, num_kv_heads or num_heads, key, rate)
