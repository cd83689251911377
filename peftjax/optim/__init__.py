"""Optimizers on ordinary optax."""

from peftjax.optim.accumulate import accumulated
from peftjax.optim.adamw8bit import Moment, adamw8bit
from peftjax.optim.base import (
  Epsilon,
  accumulator_state,
  adamw,
  allocator_state,
  at_rate,
  check_allocated,
  decay_mask,
  freeze,
  schedule,
  wrap,
)
from peftjax.optim.paged import decide_paging, paged
from peftjax.optim.placement import state_shardings

__all__ = [
  "Epsilon",
  "Moment",
  "accumulated",
  "accumulator_state",
  "adamw",
  "adamw8bit",
  "allocator_state",
  "at_rate",
  "check_allocated",
  "decay_mask",
  "decide_paging",
  "freeze",
  "paged",
  "schedule",
  "state_shardings",
  "wrap",
]
