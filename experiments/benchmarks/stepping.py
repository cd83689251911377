"""The training step of this library, for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

import peftjax as pj
from peftjax.methods.base import Method
from peftjax.training import state, step
from peftjax.training.task import Kind


def stepping(
  model: nn.Module,
  params: Any,
  method: Method,
  kind: Kind,
  batch: Any,
  *,
  total: int,
  tx: optax.GradientTransformation | None = None,
) -> Callable[[], dict[str, jax.Array]]:
  """A function that takes one step on a batch, `total` at most, and returns its numbers.

  Args:
    params: parameters without adapters, which the method attaches.
    tx: the optimizer, by default AdamW at 1e-3.
  """
  layout = pj.linen.layout(model, next(iter(kind.inputs(batch).values())))
  params = method.attach(jax.random.key(1), params, layout)
  train, frozen = pj.partition(params, method.trainable(params))
  tx = method.optimizer(tx or optax.adamw(1e-3, weight_decay=0.01), total_steps=total)
  current = jax.jit(lambda t: state.init(tx, t))(train)
  run = jax.jit(lambda s, f, b, k: step.train_step(model, tx, kind, s, f, b, k), donate_argnums=0)
  key = jax.random.key(2)

  def once() -> dict[str, jax.Array]:
    nonlocal current
    current, out = run(current, frozen, batch, key)
    return out

  return once
