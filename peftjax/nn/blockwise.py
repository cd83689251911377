"""Attention block by block, with memory that grows linearly in length."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core.dropout import drop, random_bytes
from peftjax.core.fence import fence
from peftjax.nn.mask import AttentionMask
from peftjax.nn.soft_cap import soft_cap, soft_cap_slope

# At most so many queries and keys make a block; where half of them are hidden, smaller blocks hide
# more. Measured on two cores of a CPU: experiments/benchmarks/attention.py.
ROWS, COLUMNS, CAUSAL_COLUMNS = 256, 512, 256
_HIDDEN = float(jnp.finfo(jnp.float32).min)
# Above _HIDDEN by so much that exp of the difference is 0, also where a row has seen no key yet.
_LOWEST = _HIDDEN / 2


class _Layout(NamedTuple):
  """The cut of queries and keys into blocks: everything static."""

  num_heads: int
  kv_heads: int
  length: int
  source: int
  rows: int  # of a block of queries
  columns: int  # of a block of keys
  cap: float | None  # of scores

  @property
  def row_blocks(self) -> int:
    return -(-self.length // self.rows)

  @property
  def column_blocks(self) -> int:
    return -(-self.source // self.columns)


def blockwise_attention(
  q_BTD: Float[Array, "B T D"],
  k_BSD: Float[Array, "B S KH"],
  v_BSD: Float[Array, "B S KH"],
  mask: AttentionMask,
  num_heads: int,
  kv_heads: int,
  key: jax.Array | None = None,
  rate: float = 0.0,
  cap: float | None = None,
  *,
  rows: int | None = None,
  columns: int | None = None,
) -> Float[Array, "B T D"]:
  """`attention` with a running softmax over blocks of keys, and a backward pass that recomputes.

  For a row of scores s in blocks j, m = max_j max(s_j), l = Σ_j exp(s_j - m), and the result is
  Σ_j exp(s_j - m) v_j / l, rescaled whenever m grows (Milakov & Gimelshein 2018, alg. 3; Rabe &
  Staats 2021, arXiv 2112.05682). For the backward pass only q, k, v, the result and m + log l are
  kept, and exp(s - (m + log l)) is computed again block by block (Dao 2023, arXiv 2307.08691,
  alg. 2). Blocks that lie wholly after their queries are skipped; with segments or a window also
  the blocks in which no query sees anything.

  A query that sees no key has the result 0 and no gradient. The masks of dropout are drawn by
  block, and differ from those of `dense_attention` with the same key.

  Args:
    rows, columns: the most queries and keys per block, by default as measured to be fast.
  """
  length, source = q_BTD.shape[1], k_BSD.shape[1]
  columns = columns or (CAUSAL_COLUMNS if mask.causal else COLUMNS)
  sizes = _even(length, rows or ROWS), _even(source, columns)
  layout = _Layout(num_heads, kv_heads, length, source, *sizes, cap)
  more_rows = layout.row_blocks * layout.rows - length
  more_columns = layout.column_blocks * layout.columns - source
  mask = mask.padded(source + max(more_rows, more_columns))
  return _attention(q_BTD, k_BSD, v_BSD, mask, key, layout, rate)


def _even(length: int, most: int) -> int:
  """The size of the fewest equal blocks, a multiple of 8."""
  blocks = -(-length // most)
  return -(-length // (8 * blocks)) * 8


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, mask, key, layout, rate):
  return _forward(q, k, v, mask, key, layout, rate)[0]


def _cut(x_BTD: jax.Array, size: int, heads: int, kv_heads: int) -> jax.Array:
  """`[B, T, N·H]` to blocks `[T/size, B, K, N/K·size, H]`: heads of a group are more rows."""
  batch, length, width = x_BTD.shape
  blocks, group = -(-length // size), heads // kv_heads
  x = jnp.pad(x_BTD, [(0, 0), (0, blocks * size - length), (0, 0)])
  x = x.reshape(batch, blocks, size, kv_heads, group, width // heads).transpose(1, 0, 3, 4, 2, 5)
  return fence(x.reshape(blocks, batch, kv_heads, group * size, width // heads))


def _join(x: jax.Array, length: int, heads: int, dtype: Any) -> jax.Array:
  """Undoes `_cut`."""
  blocks, batch, kv_heads, rows, size = x.shape
  group = heads // kv_heads
  x = x.reshape(blocks, batch, kv_heads, group, rows // group, size).transpose(1, 0, 4, 2, 3, 5)
  return fence(x.reshape(batch, -1, heads * size)[:, :length].astype(dtype))


def _allowed(mask: AttentionMask, layout: _Layout, i: Any, j: Any) -> jax.Array:
  """True where query block i may attend to key block j: `[B, 1, 1, rows or 1, columns]`."""
  allowed = mask.block(i * layout.rows, layout.rows, j * layout.columns, layout.columns)
  return allowed[:, None, None]


def _scores(
  q: jax.Array, k: jax.Array, allowed: jax.Array, layout: _Layout
) -> tuple[jax.Array, jax.Array | float]:
  """float32 scores `[B, K, N/K·rows, columns]`, very negative where hidden, and the cap's slope."""
  products = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
  scores = soft_cap(products, layout.cap)
  by_head = scores.reshape(*scores.shape[:2], -1, layout.rows, layout.columns)
  hidden = jnp.where(allowed, by_head, _HIDDEN).reshape(scores.shape)
  return hidden, soft_cap_slope(scores, layout.cap)


def _dropper(key: jax.Array | None, layout: _Layout, i: Any, j: Any, rate: float) -> Any:
  """The dropout of one block's probabilities, the same whenever it is asked for."""
  if key is None:
    return lambda p: p
  key = jax.random.fold_in(key, i * layout.column_blocks + j)
  return lambda p: drop(p, random_bytes(key, p.shape), rate)


def _where_seen(mask: AttentionMask, allowed: jax.Array, compute: Any, otherwise: Any) -> Any:
  """`compute()`, or `otherwise` if all is hidden: worth asking where whole blocks may be."""
  if mask.segments is None and mask.window is None:
    return compute()
  return jax.lax.cond(allowed.any(), compute, lambda: otherwise)


def _forward(q_BTD, k_BSD, v_BSD, mask, key, layout, rate) -> Any:
  n, kv, rows, columns = layout.num_heads, layout.kv_heads, layout.rows, layout.columns
  q = _cut(q_BTD * (q_BTD.shape[-1] // n) ** -0.5, rows, n, kv)
  k, v = (_cut(x, columns, kv, kv) for x in (k_BSD, v_BSD))

  def of_queries(i, q):
    def visit(j, carry):
      allowed = _allowed(mask, layout, i, j)

      def update():
        top, total, out = carry
        scores, _ = _scores(q, k[j], allowed, layout)
        new = jnp.maximum(top, scores.max(-1))
        p = fence(jnp.exp(scores - new[..., None]))
        shrink = jnp.exp(top - new)
        dropped = _dropper(key, layout, i, j, rate)(p).astype(q.dtype)
        more = jnp.einsum("bnts,bnsh->bnth", dropped, v[j], preferred_element_type=jnp.float32)
        return new, total * shrink + p.sum(-1), out * shrink[..., None] + more

      return _where_seen(mask, allowed, update, carry)

    row = jnp.zeros(q.shape[:-1], jnp.float32)
    start = row + _LOWEST, row, jnp.zeros(q.shape, jnp.float32)
    top, total, out = jax.lax.fori_loop(0, _last(mask, layout, i), visit, start)
    total = jnp.where(total > 0, total, 1.0)  # 0 where a query has seen no key
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

  blocks = jnp.arange(layout.row_blocks)
  out, lse = jax.lax.map(lambda x: of_queries(*x), (blocks, q))
  out = _join(out, layout.length, n, q.dtype)
  return out, (q, k, v, mask, key, out, lse)


def _last(mask: AttentionMask, layout: _Layout, i: jax.Array) -> Any:
  """The number of key blocks, from the first on, that query block i may see."""
  if not mask.causal:
    return layout.column_blocks
  stop = mask.offset + (i + 1) * layout.rows
  return jnp.clip(-(-stop // layout.columns), 0, layout.column_blocks)


def _start(mask: AttentionMask, layout: _Layout, j: jax.Array) -> Any:
  """The first block of queries that may see key block j."""
  if not mask.causal:
    return 0
  # The first of a prefix: the queries begin after it.
  return jnp.clip((j * layout.columns - mask.offset) // layout.rows, 0, layout.row_blocks)


def _backward(layout, rate, saved, g_BTD) -> Any:
  q, k, v, mask, key, out, lse = saved
  n, kv = layout.num_heads, layout.kv_heads
  g, out = (_cut(x, layout.rows, n, kv) for x in (fence(g_BTD), out))
  delta = (g.astype(jnp.float32) * out).sum(-1)

  def of_keys(dq, x):
    j, k, v = x

    def visit(i, carry):
      dq, dk, dv = carry
      allowed = _allowed(mask, layout, i, j)

      def update():
        scores, slope = _scores(q[i], k, allowed, layout)
        p = fence(jnp.exp(scores - lse[i][..., None]))
        dropout = _dropper(key, layout, i, j, rate)
        add = partial(jnp.einsum, preferred_element_type=jnp.float32)
        more_v = add("bnts,bnth->bnsh", dropout(p).astype(g.dtype), g[i])
        dp = dropout(add("bnth,bnsh->bnts", g[i], v))
        ds = fence((p * (dp - delta[i][..., None]) * slope).astype(g.dtype))
        more_k = add("bnts,bnth->bnsh", ds, q[i])
        return add("bnts,bnsh->bnth", ds, k), dk + more_k, dv + more_v

      skipped = jnp.zeros(q.shape[1:], jnp.float32), dk, dv
      more_q, dk, dv = _where_seen(mask, allowed, update, skipped)
      return dq.at[i].add(more_q), dk, dv

    empty = jnp.zeros(k.shape, jnp.float32)
    start = _start(mask, layout, j)
    dq, dk, dv = jax.lax.fori_loop(start, layout.row_blocks, visit, (dq, empty, empty))
    return dq, (dk, dv)

  blocks = jnp.arange(layout.column_blocks)
  dq, (dk, dv) = jax.lax.scan(of_keys, jnp.zeros(q.shape, jnp.float32), (blocks, k, v))
  dq = _join(dq * q.shape[-1] ** -0.5, layout.length, n, q.dtype)
  dk, dv = (_join(x, layout.source, kv, q.dtype) for x in (dk, dv))
  return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)
