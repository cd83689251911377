"""Masks of the keys that each query may attend to: a few vectors, not a matrix."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


class AttentionMask(flax.struct.PyTreeNode):
  """A mask by which query t may attend to key s, in column s, if all hold, or s is in the prefix:

  - s is valid,
  - causal: s is not after t,
  - window: pos[t] - pos[s] < window,
  - segments: t and s are of the same one, or s is among the first `common` columns.

  Attributes:
    valid: bool `[B, S]`, true on tokens, false on padding.
    segments: int `[B, S]`, the document of each token, where several share a row; or None.
    positions: int `[B, S]`, where each token is in its text, if there is a window; or None.
    first: int32, the column of the first query, where the queries are a part of the columns; by
      default they begin with the first column after the prefix.
    window: size of sliding attention, or None; an array where scanned layers have several.
    causal: True if later keys are hidden.
    common: how many columns, before all others, tokens of every segment may see.
    prefix: how many columns, before all others, every query sees.
  """

  valid: jax.Array
  segments: jax.Array | None = None
  positions: jax.Array | None = None
  first: jax.Array | None = None
  window: jax.Array | int | None = None
  causal: bool = flax.struct.field(pytree_node=False, default=False)
  common: int = flax.struct.field(pytree_node=False, default=0)
  prefix: int = flax.struct.field(pytree_node=False, default=0)

  @classmethod
  def of_decoder(
    cls,
    valid: jax.Array,
    segments: jax.Array | None = None,
    *,
    first: jax.Array | None = None,
    window: int | None = None,
    positions: jax.Array | None = None,
    common: int = 0,
  ) -> AttentionMask:
    """A causal mask; the fields are those of the class.

    Positions are by default counted along `valid`: a window then counts neither padding nor, where
    they are given, other documents.
    """
    if positions is None and window is not None:
      # Counted along the columns, no two tokens are further apart than there are columns.
      window = window if window < valid.shape[1] else None
      positions = jnp.cumsum(valid, 1)
    positions = None if window is None else positions
    return cls(valid, segments, positions, first, causal=True, window=window, common=common)

  def without_window(self, where: jax.Array | bool | None) -> AttentionMask:
    """This mask with no window where a scalar is true, which need not be known before the run."""
    if where is None or self.window is None:
      return self
    return self.replace(window=jnp.where(where, jnp.iinfo(jnp.int32).max, self.window))

  @property
  def by_row(self) -> bool:
    """True if queries of one row of the batch see different keys."""
    return self.causal or self.segments is not None or self.window is not None

  @property
  def offset(self) -> jax.Array | int:
    """The column of the first query."""
    return self.prefix if self.first is None else self.prefix + self.first

  def behind_prefix(self, length: int) -> AttentionMask:
    """This mask with `length` more columns before all others, which every query sees."""
    widths = [(0, 0), (length, 0)]
    pad = lambda x: None if x is None else jnp.pad(x, widths)
    return self.replace(
      valid=jnp.pad(self.valid, widths, constant_values=True),
      segments=pad(self.segments),
      positions=pad(self.positions),
      common=self.common and self.common + length,
      prefix=self.prefix + length,
    )

  def padded(self, columns: int) -> AttentionMask:
    """This mask padded to `columns`; padding sees, as queries, what the last column does."""
    widths = [(0, 0), (0, columns - self.valid.shape[1])]
    repeat = lambda x: None if x is None else jnp.pad(x, widths, mode="edge")
    segments, positions = repeat(self.segments), repeat(self.positions)
    return self.replace(valid=jnp.pad(self.valid, widths), segments=segments, positions=positions)

  def block(
    self, row: jax.Array | int, rows: int, column: jax.Array | int, columns: int
  ) -> jax.Array:
    """True where a query may attend: bool `[B, rows, columns]`, or `[B, 1, columns]` if all equal.

    Args:
      row, rows: the first query, and how many.
      column, columns: the first key, and how many. Both ranges have to be inside the columns.
    """
    at = row + self.offset
    keys = lambda x: jax.lax.dynamic_slice_in_dim(x, column, columns, 1)[:, None, :]
    queries = lambda x: jax.lax.dynamic_slice_in_dim(x, at, rows, 1)[:, :, None]
    s = column + jnp.arange(columns)[None, None, :]
    allowed = keys(self.valid)
    if self.causal:
      allowed = allowed & (s <= at + jnp.arange(rows)[None, :, None])
    if self.window is not None:
      allowed = allowed & (queries(self.positions) - keys(self.positions) < self.window)
    if self.segments is not None:
      same = queries(self.segments) == keys(self.segments)
      allowed = allowed & (same | (s < self.common) if self.common else same)
    return allowed | (s < self.prefix) if self.prefix else allowed

  def bias(self, length: int) -> jax.Array:
    """Terms to add to the scores of `length` queries: 0 where they may attend, else very negative.

    Returns:
      float32 `[B, 1, T, S]`, or `[B, 1, 1, S]` if all queries see the same.
    """
    allowed = self.block(0, length, 0, self.valid.shape[1])
    return jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)[:, None]
