"""How long calls take, measured turn by turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def medians(calls: Sequence[Callable[[], Any]], turns: int = 41) -> list[float]:
  """Median milliseconds of each call.

  They take turns, each time in another order, so that a busy machine is so for all of them.
  """
  taken: list[list[float]] = [[] for _ in calls]
  for turn in range(-2, turns):  # two rounds to compile and to warm up
    for i in range(len(calls)):
      at = (turn + i) % len(calls)
      begun = time.perf_counter()
      jax.block_until_ready(calls[at]())
      if turn >= 0:
        taken[at].append(1e3 * (time.perf_counter() - begun))
  return [statistics.median(kept) for kept in taken]
