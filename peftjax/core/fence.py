"""`fence`: a point across which XLA:CPU does not merge or move work."""

from __future__ import annotations

from typing import TypeVar

import jax

T = TypeVar("T")


def fence(tree: T) -> T:
  """The identity, across which XLA:CPU neither merges nor moves computations.

  Without fences it merges what a backward pass would recompute with the forward pass, so it keeps
  wide intermediates, and it moves transposes into products (six BERT layers with LoRA, a step:
  650 ms without, 590 with). The barrier is gone before fusion, so cheap producers are still copied
  into their consumers. Other backends decide well and get no fence.
  """
  return jax.lax.platform_dependent(
    tree, cpu=jax.lax.optimization_barrier, default=lambda values: values
  )
