"""`Program`: the jitted functions of a run, of arrays or of their shapes alone."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax import optim, sharding
from peftjax.methods.base import Method
from peftjax.training import state, step
from peftjax.training.settings import OPTIMIZERS, Settings
from peftjax.training.task import Kind


class Program:
  """The step of a run, the outputs that evaluation needs of a batch, and the initial state.

  Attributes:
    schedule, tx: parts of the optimizer.
    step: `(state, frozen, batch, key)` to the next state, which takes the memory of the one before,
      and numbers; see `step.train_step`.
    predict: `(train, frozen, batch)` to the outputs that evaluation needs; see `step.eval_step`.
  """

  def __init__(
    self,
    settings: Settings,
    kind: Kind,
    module: nn.Module,
    method: Method,
    train: Any,
    total: int,
    mesh: Mesh | None,
    *,
    paged: bool = False,
    rate_in_state: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      settings: settings of the optimizer.
      kind, module, method: parts of the run.
      train: the trained arrays, or their shapes, dtypes and, on a mesh, shardings.
      total: number of batches.
      mesh: the mesh for all of it, or None for one device.
      paged: keep the optimizer's state in host memory.
      rate_in_state: the learning rate is an array in the optimizer's state, so that the step is the
        same program whatever it is.
    """
    self.schedule, self.tx = _optimizer(
      settings, method, total, paged=paged, rate_in_state=rate_in_state
    )
    self._init = functools.partial(state.init, self.tx)
    self._first: state.TrainState | None = None
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    self._places = None
    if mesh is not None:
      # No shape alone tells which arrays lie in host memory.
      like = jax.jit(self._init)(train) if paged else jax.eval_shape(self._init, train)
      self._first = like if paged else None
      self._places = _state_shardings(like, train, mesh)
    self.step = jax.jit(
      sharding.on(mesh, functools.partial(step.train_step, module, self.tx, kind)),
      donate_argnums=0,
      out_shardings=None if mesh is None else (self._places, everywhere),
    )
    self.predict = jax.jit(
      sharding.on(mesh, functools.partial(step.eval_step, module, kind)), out_shardings=everywhere
    )

  def start(self, train: Any) -> state.TrainState:
    """The state before the first step, each array made in its place."""
    if self._first is not None:
      return jax.device_put(self._first, self._places)
    return jax.jit(self._init, out_shardings=self._places)(train)

  def abstract(self, train: Any) -> state.TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._init, train)
    if self._places is None:
      return shapes
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, self._places
    )


def _optimizer(
  settings: Settings, method: Method, total: int, *, paged: bool, rate_in_state: bool
) -> tuple[optax.Schedule, Any]:
  o = settings.optimizer
  updates = o.updates(total)
  warmup = o.warmup_steps(updates)
  schedule = optim.schedule(o.schedule, o.learning_rate, updates, warmup)
  make = OPTIMIZERS[o.name]
  used = optim.schedule(o.schedule, 1.0, updates, warmup) if rate_in_state else schedule
  tx = make(used, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
  tx = optim.at_rate(tx, o.learning_rate) if rate_in_state else tx
  tx = optim.paged(tx) if paged else tx
  return schedule, method.optimizer(
    tx, updates, clip_norm=o.clip_norm, accumulate=o.accumulate, batches=total
  )


def _state_shardings(current: state.TrainState, train: Any, mesh: Mesh) -> Any:
  """Moments lie where their parameters do; counters everywhere."""
  places = jax.tree.map(lambda x: x.sharding, train)
  opt = optim.state_shardings(current.opt_state, train, mesh)
  return state.TrainState(step=NamedSharding(mesh, P()), train=places, opt_state=opt)
