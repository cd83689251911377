"""A bias of attention by relative position, with distances in buckets (T5)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_buckets(
  distances: np.ndarray, buckets: int, farthest: int, *, causal: bool
) -> np.ndarray:
  """The row of a table of `buckets` for distances d = s − t of a key s from a query t, int32.

  Of n rows for one direction the first m = n / 2 are of one distance each, and

    row(a) = min(m + ⌊log(a / m) / log(farthest / m) · (n − m)⌋, n − 1)

  of those from m on. A causal table has all rows for a = max(−d, 0). Else a = |d|, and the second
  half of the rows is that of keys after the query. Source: Raffel et al. 2020, arXiv 1910.10683,
  section 2.1, with the logarithm of the authors' code, in float32 as there.
  """
  first: Any = 0
  count = buckets
  if causal:
    away = np.maximum(-distances, 0)
  else:
    count = buckets // 2
    away, first = np.abs(distances), np.where(distances > 0, count, 0)
  exact = count // 2
  ratio = np.maximum(away, exact).astype(np.float32) / np.float32(exact)
  far = np.log(ratio) / np.float32(math.log(farthest / exact)) * np.float32(count - exact)
  far = np.minimum(exact + far.astype(np.int32), count - 1)
  return (first + np.where(away < exact, away, far)).astype(np.int32)


def distances(source: int) -> np.ndarray:
  """The distances of `source` columns from one another: −(S − 1) to S − 1."""
  return np.arange(1 - source, source)


def spread(line_MN: jax.Array, length: int, source: int, first: Any = 0) -> jax.Array:
  """The bias of each head at every query and key, `[N, T, S]`, from that of each of `distances`.

  Args:
    line_MN: M = 2 S − 1.
    length, source: T queries and S keys.
    first: the column of the first query; T + first is at most S.
  """
  queries = jnp.arange(length)[:, None] + first
  return line_MN[jnp.arange(source)[None, :] - queries + source - 1].transpose(2, 0, 1)
