"""The cost of a compiled program, as its compiler counts it: the same on a busy machine."""

from __future__ import annotations

from typing import Any, NamedTuple


class Cost(NamedTuple):
  """The cost of one call.

  Attributes:
    flops: operations, those of transcendental functions left out.
    transcendentals: exponentials, error functions and the like, entry by entry.
    memory: bytes of arguments and temporaries.
  """

  flops: float
  transcendentals: float
  memory: int


def of(compiled: Any) -> Cost:
  """The cost of a program that `jax.jit(fn).lower(...).compile()` gives."""
  counts, sizes = compiled.cost_analysis(), compiled.memory_analysis()
  return Cost(
    counts["flops"],
    counts.get("transcendentals", 0.0),
    sizes.argument_size_in_bytes + sizes.temp_size_in_bytes,
  )
