"""Sums of several adapters' arrays: weighted, pruned, and by the sign of the majority.

Each takes `[N, ...]` arrays of N adapters and N weights, and gives one array. They compute in
NumPy, float32: an adapter is small, and made once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Takes (shape, name of the array); gives random numbers in [0, 1).
Draw = Callable[[tuple[int, ...]], np.ndarray]


def weighted(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Σ_i w_i x_i (Ilharco et al. 2023, arXiv 2212.04089, section 2)."""
  return np.tensordot(weights, x, axes=1).astype(np.float32)


def trimmed(x: np.ndarray, density: float) -> np.ndarray:
  """Each x_i with its ⌊density · size⌋ largest entries by magnitude, the others 0."""
  size = x[0].size
  kept = int(density * size)
  flat = x.reshape(len(x), size)
  order = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :kept]
  mask = np.zeros(flat.shape, bool)
  np.put_along_axis(mask, order, True, axis=1)
  return np.where(mask, flat, np.float32(0)).reshape(x.shape)


def dropped(x: np.ndarray, density: float, draw: Draw) -> np.ndarray:
  """Each entry kept with probability `density` and divided by it, else 0: E[dropped(x)] = x.

  DARE (Yu et al. 2023, arXiv 2311.03099, section 3.2).
  """
  return np.where(draw(x.shape) < density, x / np.float32(density), np.float32(0))


def elected(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Mean of w_i x_i over those with the majority's sign, that of Σ_i x_i, + where it is 0.

  TIES (Yadav et al. 2023, arXiv 2306.01708, section 3), whose election does without weights.
  """
  sign = np.where(x.sum(0) >= 0, 1, -1)
  agree = np.sign(x) == sign
  return weighted(x * agree, weights) / np.maximum(agree.sum(0), 1).astype(np.float32)


def truncated(up: np.ndarray, down: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The best product of a rank for up · down, `[out, K]` by `[K, in]`: `[rank, in]`, `[out, rank]`.

  The largest singular values of the product, which is never formed, lie in the second
  (Eckart & Young 1936). With K the inner size it takes O((out + in) K²).
  """
  q_up, r_up = np.linalg.qr(up)
  q_down, r_down = np.linalg.qr(down.T)
  return _cut(*np.linalg.svd(r_up @ r_down.T, full_matrices=False), rank, q_up, q_down)


def truncated_dense(x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The best product of a rank for `[out, in]`; see `truncated`."""
  return _cut(*np.linalg.svd(x, full_matrices=False), rank)


def _cut(
  u: np.ndarray,
  s: np.ndarray,
  vt: np.ndarray,
  rank: int,
  left: np.ndarray | None = None,
  right: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(V, U s) of the first `rank` triplets, turned by `left` and `right`, filled up with zeros."""
  b, a = u[:, :rank] * s[:rank], vt[:rank]
  b = b if left is None else left @ b
  a = a if right is None else a @ right.T
  more = rank - len(a)
  return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
