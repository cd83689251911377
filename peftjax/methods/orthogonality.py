"""AdaLoRA's penalty on P and Q that are not orthogonal, and its gradient in closed form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

PENALTIES = ("squared", "norm")


def penalty(
  kind: str, p: jax.Array, q: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """R(P, Q) and its gradients, in float32.

  `"squared"`: ‖PᵀP − I‖² + ‖QQᵀ − I‖², the paper's (Zhang et al. 2023, eq. 4), with the gradients
  4 P (PᵀP − I) and 4 (QQᵀ − I) Q. `"norm"`: ‖PᵀP − I‖ + ‖QQᵀ − I‖, the released code's, which are
  those over 2 ‖·‖. Norms are Frobenius' and summed over a stack.

  Args:
    p: `[*stack, out, R]`.
    q: `[*stack, R, in]`.
    valid: bool `[*stack, R]`; padding is in no norm.
  """
  p, q = p.astype(jnp.float32), q.astype(jnp.float32)
  identity = jnp.broadcast_to(jnp.eye(valid.shape[-1]), (*valid.shape, valid.shape[-1]))
  identity *= valid[..., None, :]
  # Accelerators would multiply in fewer bits than what the trained P and Q are off by.
  gram = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  value_p, weight_p = _of_gram(kind, gram(jnp.swapaxes(p, -1, -2), p) - identity)
  value_q, weight_q = _of_gram(kind, gram(q, jnp.swapaxes(q, -1, -2)) - identity)
  return value_p + value_q, p @ weight_p, weight_q @ q


def _of_gram(kind: str, off: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The penalty of PᵀP − I, summed, and the factor of P in its gradient."""
  squares = jnp.square(off).sum((-1, -2))
  if kind == "squared":
    return squares.sum(), 4.0 * off
  norms = jnp.sqrt(squares)
  inverse = jnp.where(norms > 0, 1.0 / jnp.where(norms > 0, norms, 1.0), 0.0)
  return norms.sum(), 2.0 * off * inverse[..., None, None]
