"""Optimizers on ordinary optax."""

from peftjax.optim.accumulate import accumulated
from peftjax.optim.adamw8bit import Moment, adamw8bit
from peftjax.optim.base import (
  Epsilon,
  Owner,
  accumulator_state,
  adamw,
  at_rate,
  check_owned,
  decay_mask,
  freeze,
  metrics,
  nodes,
  schedule,
  wrap,
)
from peftjax.optim.paged import decide_paging, paged
from peftjax.optim.placement import state_shardings

__all__ = [
  "Epsilon",
  "Moment",
  "Owner",
  "accumulated",
  "accumulator_state",
  "adamw",
  "adamw8bit",
  "at_rate",
  "check_owned",
  "decay_mask",
  "decide_paging",
  "freeze",
  "metrics",
  "nodes",
  "paged",
  "schedule",
  "state_shardings",
  "wrap",
]
