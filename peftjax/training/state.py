"""The state of a run: the contents of a checkpoint to go on from."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
  """Everything that a step changes.

  Attributes:
    step: int32 `[]`, batches consumed; with the seed it gives the data position and every key.
    train: the trained arrays, `None` elsewhere.
    opt_state: state of the optimizer on `train`.
  """

  step: Any
  train: Any
  opt_state: optax.OptState


def init(tx: optax.GradientTransformation, train: Any) -> TrainState:
  return TrainState(step=jnp.zeros((), jnp.int32), train=train, opt_state=tx.init(train))
