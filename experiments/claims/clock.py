"""How long calls take, measured turn by turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def medians(calls: Sequence[Callable[[], Any]], turns: int = 41) -> list[float]:
  """Median milliseconds of each call.

  They take turns in random orders, the same every time, so that a busy machine is so for all of
  them. Before it is timed each is called once, so that it finds its own weights in the cache and
  not those of the one before.
  """
  taken: list[list[float]] = [[] for _ in calls]
  orders = np.random.default_rng(0)
  for turn in range(-1, turns):  # one turn to compile
    for i in orders.permutation(len(calls)):
      jax.block_until_ready(calls[i]())
      begun = time.perf_counter()
      jax.block_until_ready(calls[i]())
      if turn >= 0:
        taken[i].append(1e3 * (time.perf_counter() - begun))
  return [statistics.median(kept) for kept in taken]
