"""Initial factors of LoRA: A random and B zero, or the principal part of W (PiSSA)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

# Standard deviation of AdaLoRA's P and Q.
TRIPLET_STD = 0.02

INITS = ("kaiming", "gaussian", "pissa")


def factors(
  key: jax.Array, init: str, rank: int, n_in: int, n_out: int, is_table: bool, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """A `[rank, in]` and B `[out, rank]` whose product is zero, except for AdaLoRA's.

  A is U(±1/√in) for `"kaiming"`, which is torch's kaiming_uniform(√5), N(0, 1/rank²) for
  `"gaussian"`. A table looks rows of A up, so there A is zero and B ~ N(0, 1), as in PEFT.
  `"triplets"` are AdaLoRA's Q and P, both N(0, 0.02²), with a λ of zero between them.
  """
  if is_table and init != "triplets":
    return jnp.zeros((rank, n_in), dtype), jax.random.normal(key, (n_out, rank), dtype)
  bound = 1.0 / math.sqrt(n_in)
  if init == "triplets":
    of_p, of_q = jax.random.split(key)
    draw = lambda key, *shape: TRIPLET_STD * jax.random.normal(key, shape, dtype)
    return draw(of_q, rank, n_in), draw(of_p, n_out, rank)
  if init == "gaussian":
    a = jax.random.normal(key, (rank, n_in), dtype) / rank
  else:
    a = jax.random.uniform(key, (rank, n_in), dtype, -bound, bound)
  return a, jnp.zeros((n_out, rank), dtype)


def principal(
  w: jax.Array, rank: jax.Array, width: int, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """PiSSA (Meng et al. 2024, eq. 2-3): A = √(S/s) Vᵀ, B = U √(S/s) of the top triplets of Wᵀ.

  Args:
    w: `[*stack, in, out]`.
    rank, scale: `[*stack]`; triplets beyond `rank` are zero.
    width: rows of A, at least the largest rank.

  Returns:
    A `[*stack, width, in]` and B `[*stack, out, width]`, with s·B A the best rank-r part of Wᵀ.
  """
  u, s, vt = jnp.linalg.svd(jnp.swapaxes(w.astype(jnp.float32), -1, -2), full_matrices=False)
  kept = jax.lax.broadcasted_iota(jnp.int32, (*rank.shape, width), rank.ndim) < rank[..., None]
  root = jnp.where(kept, jnp.sqrt(s[..., :width] / scale[..., None]), 0.0)
  return root[..., :, None] * vt[..., :width, :], u[..., :, :width] * root[..., None, :]
