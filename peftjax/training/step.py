"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import optax

from peftjax import losses, optim
from peftjax.core import tree
from peftjax.core.params import Params
from peftjax.linen import apply
from peftjax.nnx.pure import Pure
from peftjax.training.state import TrainState
from peftjax.training.task import Batch, Kind


def train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  kind: Kind,
  state: TrainState,
  frozen: Any,
  batch: Batch,
  key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """train ← train + tx(∇ Σ loss / Σ count); only the trained tree is differentiated.

  Args:
    model, tx, kind: static. Where `tx` accumulates gradients, it is told how many tokens (rows)
      this batch counts; one that counts none is a step with a gradient of 0.
    state: donated by the caller's jit.
    frozen: the other half of the parameters, as an argument and not a closure.
    batch: the arrays that `kind` reads.
    key: key of the run; the step folds its number in.

  Returns:
    The next state and float32 scalars: "loss", the mean over this batch; "grad_norm", norm of the
    mean gradient before clipping, with accumulation over all batches since the last update, this
    one included; and the metrics of the method's optimizer for its update (`optim.metrics`).

  Raises:
    ValueError: weights that only their method's optimizer may train have another one, or gradients
      are accumulated by `optax.MultiSteps`, which cannot be told what a batch counts.
  """
  optim.check_owned(state.train, state.opt_state)
  rngs = {"dropout": jax.random.fold_in(key, state.step)}

  def objective(train: Any) -> tuple[jax.Array, jax.Array]:
    params = tree.combine(train, frozen)
    result, summed = _forward(model, kind, params, batch, train=True, rngs=rngs)
    total, count = result if summed else kind.loss(result, batch)
    return losses.mean(total, count), count

  (value, count), grads = jax.value_and_grad(objective, has_aux=True)(state.train)
  update = optax.with_extra_args_support(tx).update
  with jax.named_scope("optimizer"):
    updates, opt_state = update(grads, state.opt_state, state.train, weight=count)
    train = optax.apply_updates(state.train, updates)
  collected = optim.accumulator_state(opt_state)
  norm = optax.tree.norm(grads) if collected is None else collected.norm
  metrics = {"loss": value, "grad_norm": norm, **optim.metrics(opt_state)}
  return TrainState(step=state.step + 1, train=train, opt_state=opt_state), metrics


def eval_step(model: nn.Module, kind: Kind, train: Any, frozen: Any, batch: Batch) -> Any:
  """The `outputs` for the two halves of the parameters."""
  return outputs(model, kind, tree.combine(train, frozen), batch)


def outputs(model: nn.Module, kind: Kind, params: Params, batch: Batch) -> Any:
  """`kind.output` of the logits, without dropout."""
  result, summed = _forward(model, kind, params, batch)
  return result if summed else kind.output(result, batch)


def _forward(
  model: nn.Module, kind: Kind, params: Any, batch: Batch, **how: Any
) -> tuple[Any, bool]:
  """The module's result, and whether it is already the sums of the loss instead of logits."""
  more = kind.summed(batch) if kind.summed else {}
  summed = bool(more) and more.keys() <= takes(model)
  how |= more if summed else {}
  first, rest = arguments(model, kind.inputs(batch))
  return apply(model, params, first, **rest, **how), summed


def arguments(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """A task's arguments for a model: the first, and by name those others that the model takes."""
  (_, first), *rest = inputs.items()
  names = takes(model)
  return first, {name: x for name, x in rest if name in names}


def takes(model: Any) -> set[str]:
  """The names of the arguments of a module's call."""
  cls = model.cls if isinstance(model, Pure) else type(model)
  return set(inspect.signature(cls.__call__).parameters)
