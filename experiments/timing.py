"""Timing of calls, measured turn by turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def seconds(
  calls: Sequence[Callable[[], Any]], turns: int, steps: int = 1, uncounted: int = 0
) -> list[list[float]]:
  """Seconds of each call by turn, the mean over a turn's steps.

  They take turns in random orders, the same every time, so that a busy machine slows all of
  them alike; one more turn comes first, in which they compile.

  Args:
    calls: each returns arrays, which are waited for.
    turns: how often each has its turn.
    steps: calls per turn.
    uncounted: calls before them, so that one finds its own weights in the cache and not another's.
  """
  taken: list[list[float]] = [[] for _ in calls]
  orders = np.random.default_rng(0)
  for turn in range(1 + turns):
    for i in orders.permutation(len(calls)):
      for _ in range(uncounted):
        jax.block_until_ready(calls[i]())
      begun = time.perf_counter()
      for _ in range(steps):
        jax.block_until_ready(calls[i]())
      if turn:
        taken[i].append((time.perf_counter() - begun) / steps)
  return taken


def least(calls: Sequence[Callable[[], Any]], turns: int, **given: int) -> list[float]:
  """The least milliseconds of each call, as others may use the machine; `given` as of `seconds`."""
  return [1e3 * min(own) for own in seconds(calls, turns, **given)]


def medians(calls: Sequence[Callable[[], Any]], turns: int = 41, **given: int) -> list[float]:
  """Median milliseconds of each call; `given` as in `seconds`."""
  return [1e3 * statistics.median(own) for own in seconds(calls, turns, **given)]
