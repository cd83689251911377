"""Formulas in 64-bit numbers, compared with autodiff."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.claims.claim import Finding

CLOSE = 1e-12


def in_float64(run: Callable[[], Finding]) -> Callable[[], Finding]:
  """Runs a claim with 64-bit numbers."""

  @functools.wraps(run)
  def wide() -> Finding:
    with jax.enable_x64(True):
      return run()

  return wide


def error(one: Any, other: Any) -> float:
  """‖one − other‖ / ‖other‖."""
  return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
