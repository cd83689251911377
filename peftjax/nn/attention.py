"""Multi-head attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core import tracing
from peftjax.core.dropout import keep_level
from peftjax.nn import cudnn, splash
from peftjax.nn.blockwise import blockwise_attention
from peftjax.nn.dense_attention import dense_attention
from peftjax.nn.mask import AttentionMask

# From so many scores per head on blocks are faster than whole rows, on CPUs too, and take less
# memory: experiments/benchmarks/attention.py.
MANY_SCORES = 512 * 512

KERNELS: dict[str, Any] = {
  "dense": dense_attention,
  "blockwise": blockwise_attention,
  "cudnn": cudnn.cudnn_attention,
  "splash": splash.splash_attention,
}


def kernel_name(
  mask: AttentionMask,
  length: int,
  *,
  size: int = 64,
  dtype: Any = jnp.float32,
  dropout: bool = False,
  capped: bool = False,
  biased: bool = False,
) -> str:
  """The key in `KERNELS` of the kernel that `attention` takes for `length` queries.

  Few scores, those after a cache and those with a bias take whole rows. Many scores take cuDNN on
  a GPU if it can, and on a TPU, where the mesh is known (`jax.set_mesh`) or there is one device,
  JAX's splash attention; otherwise blocks, as do capped scores.

  Args:
    size, dtype: size and dtype of a head.

  >>> kernel_name(AttentionMask(jax.ShapeDtypeStruct((1, 128), bool), causal=True), 128)
  'dense'
  """
  if biased or mask.first is not None or length * mask.valid.shape[1] < MANY_SCORES:
    return "dense"
  if capped:
    return "blockwise"
  if _on_tpu() and splash.fits(mask, length, dropout=dropout):
    return "splash"
  if cudnn.here() and cudnn.fits(mask, length, size=size, dtype=dtype, dropout=dropout):
    return "cudnn"
  return "blockwise"


def _on_tpu() -> bool:
  """Tells whether this is traced for TPUs, as far as can be known before compilation."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend() == "tpu" and jax.device_count() == 1
  return mesh.abstract_device.platform == "tpu"


def attention(
  q_BTD: Float[Array, "B T D"],
  k_BSD: Float[Array, "B S KH"],
  v_BSD: Float[Array, "B S KH"],
  mask: AttentionMask,
  num_heads: int,
  num_kv_heads: int | None = None,
  *,
  key: jax.Array | None = None,
  rate: float = 0.0,
  cap: float | None = None,
  bias_NTS: Float[Array, "N T S"] | None = None,
) -> Float[Array, "B T D"]:
  """dropout(softmax(q kᵀ/√H + bias, where `mask` allows)) v per head, `[B, T, D]`.

  Source: Vaswani et al. 2017, eq. 1. Scores and softmax are float32; the result has the dtype of
  `q`. With a key, the probabilities are dropped at `rate`.

  Args:
    q_BTD: projection, D = N·H.
    k_BSD, v_BSD: projections, D = K·H.
    mask: which keys each query may attend to.
    num_heads: N.
    num_kv_heads: K, a divisor of N, by default N: N/K heads in a row share keys and values
      (Ainslie et al. 2023, arXiv 2305.13245).
    key, rate: key and rate of the dropout.
    cap: cap of the scores, which become `soft_cap(scores, cap)`.
    bias_NTS: added to the (capped) scores of each head, of every text; it gets a gradient.
  """
  key = None if keep_level(rate) == 256 else key
  size = q_BTD.shape[2] // num_heads
  biased = bias_NTS is not None
  how: dict[str, Any] = dict(size=size, dropout=key is not None, capped=cap is not None)
  name = kernel_name(mask, q_BTD.shape[1], dtype=q_BTD.dtype, biased=biased, **how)
  if (used := tracing.current().kernels) is not None:
    used.add(name)
  heads = num_heads, num_kv_heads or num_heads
  more: dict[str, Any] = {} if cap is None else dict(cap=cap)
  more |= dict(bias_NTS=bias_NTS) if biased else {}
  return KERNELS[name](q_BTD, k_BSD, v_BSD, mask, *heads, key, rate, **more)
