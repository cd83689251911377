"""Attention on TPUs, by JAX's own kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from peftjax.nn.mask import AttentionMask

# Queries and keys per block: for long rows, and else as many as a TPU has lanes.
BLOCK, LANES = 512, 128
# The segment of all tokens that nobody may attend to.
_PADDING = -(2**31)


def fits(mask: AttentionMask, length: int, *, dropout: bool = False) -> bool:
  """Tells whether the kernel computes such a row.

  It knows later tokens and segments, one of which is padding, but no columns that are seen by all
  segments, no windows that are measured in positions, and no dropout.
  """
  seen_by_all = mask.prefix > 0 or (mask.segments is not None and mask.common > 0)
  whole = mask.first is None and mask.valid.shape[1] == length
  return whole and mask.window is None and not seen_by_all and not dropout


def splash_attention(
  q_BTD: Float[Array, "B T D"],
  k_BSD: Float[Array, "B S KH"],
  v_BSD: Float[Array, "B S KH"],
  mask: AttentionMask,
  num_heads: int,
  kv_heads: int,
  key: jax.Array | None = None,
  rate: float = 0.0,
  *,
  interpret: bool = False,
) -> Float[Array, "B T D"]:
  """`attention` for masks that `fits` allows, in blocks in fast memory (Dao et al. 2022, arXiv
  2205.14135).

  Padding attends to padding: its results are finite, and nothing else is promised of them. Under
  `jax.set_mesh` each device computes its rows of the batch and its heads.

  Args:
    key, rate: None, and not used.
    interpret: run the kernel without a TPU, slowly.
  """
  del key, rate
  length, size = q_BTD.shape[1], q_BTD.shape[2] // num_heads
  block = BLOCK if length >= BLOCK else LANES
  segments = jnp.zeros(mask.valid.shape, jnp.int32) if mask.segments is None else mask.segments
  segments = jnp.where(mask.valid, segments.astype(jnp.int32), _PADDING)
  more = -length % block
  segments = jnp.pad(segments, [(0, 0), (0, more)], constant_values=_PADDING)

  def heads(x: jax.Array, count: int) -> jax.Array:
    x = jnp.pad(x, [(0, 0), (0, more), (0, 0)])
    return x.reshape(*x.shape[:2], count, size).transpose(0, 2, 1, 3)

  q, k, v = heads(q_BTD * size**-0.5, num_heads), heads(k_BSD, kv_heads), heads(v_BSD, kv_heads)
  run = lambda *a: _kernel(*a, causal=mask.causal, block=block, interpret=interpret)
  y = _on_mesh(run, kv_heads, q, k, v, segments)
  return y.transpose(0, 2, 1, 3)[:, :length].reshape(q_BTD.shape).astype(q_BTD.dtype)


def _kernel(q, k, v, segments, *, causal: bool, block: int, interpret: bool) -> jax.Array:
  """Queries `[B, N, T, H]`, keys and values `[B, K, T, H]` and segments `[B, T]`."""
  # Only TPUs need these modules, which take a second to import.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  shape = (q.shape[2],) * 2
  seen = masks.CausalMask(shape) if causal else masks.FullMask(shape)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  sizes: dict[str, Any] = {f"block_{name}": block for name in names}
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([seen] * q.shape[1]),
    block_sizes=splash.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))


def _on_mesh(run: Any, kv_heads: int, *args: jax.Array) -> jax.Array:
  """Runs `run` on every device of the ambient mesh for its rows and heads: XLA cannot split it."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(*args)
  ways = dict(mesh.shape)
  rows = tuple(axis for axis in ("data", "fsdp") if axis in ways)
  count = 1
  for axis in rows:
    count *= ways[axis]
  split_rows = rows if args[0].shape[0] % count == 0 else None
  split_heads = "tensor" if kv_heads % ways.get("tensor", kv_heads + 1) == 0 else None
  spec = P(split_rows, split_heads)
  return jax.shard_map(
    run, in_specs=(spec, spec, spec, P(split_rows)), out_specs=spec, check_vma=False
  )(*args)
