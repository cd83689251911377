"""`fence`: keep XLA:CPU from fusing across a point."""

from __future__ import annotations

from typing import TypeVar

import jax

T = TypeVar("T")


def fence(tree: T) -> T:
  """The identity, behind which XLA:CPU cannot fuse.

  XLA:CPU copies cheap producers into every consumer. In a backward pass a residual stream is a
  chain of cheap producers, so without fences each layer's gradient re-reads and recomputes the
  chain of all layers after it (measured on six BERT layers: 37 operands in one fusion, four times
  the time of reading the one array). Other backends decide well and get no fence.
  """
  return jax.lax.platform_dependent(
    tree, cpu=jax.lax.optimization_barrier, default=lambda values: values
  )
