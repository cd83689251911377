"""Attention on NVIDIA GPUs, by cuDNN through JAX's own function."""

from __future__ import annotations

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.nn.mask import AttentionMask

# The widest head that cuDNN computes on every GPU with tensor cores for bfloat16.
MAX_HEAD = 128


def here() -> bool:
  """Tells whether the devices are NVIDIA's of Ampere or later, the first that cuDNN supports."""
  capability = str(getattr(jax.devices()[0], "compute_capability", ""))
  return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


def fits(mask: AttentionMask, length: int, *, size: int, dtype: Any, dropout: bool = False) -> bool:
  """Tells whether cuDNN computes such a row, with heads of `size`, in `dtype`.

  It knows later tokens and padding, but no segments, no windows measured in positions, no columns
  that are seen by all, no dropout of ours, and no float32.
  """
  whole = mask.first is None and mask.valid.shape[1] == length
  plain = mask.segments is None and mask.window is None and mask.prefix == 0
  sized = size <= MAX_HEAD and size % 8 == 0
  return whole and plain and sized and jnp.dtype(dtype).itemsize == 2 and not dropout


def cudnn_attention(
  q_BTD: Float[Array, "B T D"],
  k_BSD: Float[Array, "B S KH"],
  v_BSD: Float[Array, "B S KH"],
  mask: AttentionMask,
  num_heads: int,
  kv_heads: int,
  key: jax.Array | None = None,
  rate: float = 0.0,
  *,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T D"]:
  """`attention` for masks that `fits` allows, in blocks in fast memory (Dao et al. 2022, arXiv
  2205.14135).

  cuDNN is told how many tokens a row has, so tokens are moved before padding, in their order, and
  back. At padding the result is 0.

  Args:
    key, rate: None, and not used.
    implementation: that of `jax.nn.dot_product_attention`; `"xla"` is the same on any platform.
  """
  del key, rate
  rows = mask.valid.shape[0], q_BTD.shape[1]
  order = jnp.argsort(~mask.valid, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  moved = lambda x, where: jnp.take_along_axis(x, where[..., None], axis=1)
  heads = lambda x, count: moved(x, order).reshape(*rows, count, -1)
  lengths = mask.valid.sum(1, dtype=jnp.int32)
  y = jax.nn.dot_product_attention(
    heads(q_BTD, num_heads),
    heads(k_BSD, kv_heads),
    heads(v_BSD, kv_heads),
    is_causal=mask.causal,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )
  y = moved(y.reshape(q_BTD.shape), back)
  return jnp.where(mask.valid[..., None], y, 0).astype(q_BTD.dtype)
