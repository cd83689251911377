"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from peftjax.core import tree
from peftjax.linen import apply
from peftjax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  loss: Loss,
  state: TrainState,
  frozen: Any,
  batch: Batch,
  key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """train ← train + tx(∇ loss); only the trained tree is differentiated.

  Args:
    model, tx, loss: static; `loss(logits, labels, weights)` is a scalar.
    state: donated by the caller's jit.
    frozen: the other half of the parameters, as an argument and not a closure.
    batch: "tokens" `[B, T]`, "mask", "types", "labels" `[B]`, "weights" `[B]`.
    key: of the run; the step folds its number in.

  Returns:
    The next state, and "loss" and "grad_norm" (before clipping), float32 scalars.
  """
  rngs = {"dropout": jax.random.fold_in(key, state.step)}

  def objective(train: Any) -> jax.Array:
    params = tree.combine(train, frozen)
    logits = apply(model, params, *inputs(batch), train=True, rngs=rngs)
    return loss(logits, batch["labels"], batch["weights"])

  value, grads = jax.value_and_grad(objective)(state.train)
  updates, opt_state = tx.update(grads, state.opt_state, state.train)
  train = optax.apply_updates(state.train, updates)
  metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
  return TrainState(step=state.step + 1, train=train, opt_state=opt_state), metrics


def eval_step(model: nn.Module, train: Any, frozen: Any, batch: Batch) -> jax.Array:
  """Logits `[B, K]`, float32, without dropout."""
  return apply(model, tree.combine(train, frozen), *inputs(batch)).astype(jnp.float32)


def inputs(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  return batch["tokens"], batch["mask"], batch["types"]
