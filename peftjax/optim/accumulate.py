"""Gradients of several batches, averaged by the weight of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AccumulatedState(NamedTuple):
  """The gradients collected since the last update.

  Attributes:
    mini_step: int32 `[]`, calls since the last update.
    gradient_step: int32 `[]`, updates so far.
    inner_opt_state: state of the optimizer within.
    acc_grads: Σ w g, float32, shaped like the gradients.
    weight: float32 `[]`, Σ w.
    norm: float32 `[]`, norm of Σ w g / Σ w after the last call, also if that made an update.
  """

  mini_step: jax.Array
  gradient_step: jax.Array
  inner_opt_state: Any
  acc_grads: Any
  weight: jax.Array
  norm: jax.Array


def accumulated(
  tx: optax.GradientTransformation, every: int, batches: int | None = None
) -> optax.GradientTransformationExtraArgs:
  """`tx` on every `every`-th call, with the mean Σ w g / Σ w of the gradients since the last.

      updates, state = tx.update(grads, state, params, weight=w)

  g is the gradient of the mean loss of a batch, and w how many tokens (or rows) that mean is over,
  so that the average is over all tokens, as in one large batch: w g is the gradient of the sum.
  Without `weight` every batch counts alike. A batch of weight 0 is one of the `every`, and adds
  nothing; if all are such batches the mean is 0. Calls without an update return zeros.

  With `every=1` this is `tx`, state and all, except for an argument `weight` that has no effect.

  Args:
    batches: calls in all; the last one makes an update of all that is left, even if that is fewer
      than `every`.
  """
  tx = optax.with_extra_args_support(tx)
  if every == 1:

    def pass_on(grads: Any, state: Any, params: Any = None, *, weight: Any = None, **extra: Any):
      return tx.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, pass_on)

  def init(params: Any) -> AccumulatedState:
    return AccumulatedState(
      mini_step=jnp.zeros((), jnp.int32),
      gradient_step=jnp.zeros((), jnp.int32),
      inner_opt_state=tx.init(params),
      acc_grads=optax.tree.zeros_like(params, dtype=jnp.float32),
      weight=jnp.zeros(()),
      norm=jnp.zeros(()),
    )

  def update(
    grads: Any, state: AccumulatedState, params: Any = None, *, weight: Any = None, **extra: Any
  ) -> tuple[Any, AccumulatedState]:
    weight = jnp.asarray(1.0 if weight is None else weight, jnp.float32)
    if weight.ndim:
      raise ValueError(f"weight is one number for the whole batch, not an array {weight.shape}")
    sums = jax.tree.map(lambda s, g: s + weight * g.astype(s.dtype), state.acc_grads, grads)
    total = state.weight + weight
    share = jnp.where(total > 0, total, 1.0)
    calls = state.mini_step + 1
    due = calls == every
    if batches is not None:
      due |= every * state.gradient_step + calls == batches
    norm = optax.tree.norm(sums) / share

    # The branches' operands are arguments, so that their memory is used again.
    def apply(sums: Any, old: Any, params: Any) -> tuple[Any, Any, Any]:
      mean = jax.tree.map(lambda s, g: (s / share).astype(g.dtype), sums, grads)
      updates, new = tx.update(mean, old, params, **extra)
      new = jax.tree.map(lambda x, y: x.astype(y.dtype) if x.dtype != y.dtype else x, new, old)
      return updates, new, jax.tree.map(jnp.zeros_like, sums)

    def wait(sums: Any, old: Any, params: Any) -> tuple[Any, Any, Any]:
      shapes, _, _ = jax.eval_shape(apply, sums, old, params)
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), old, sums

    updates, inner, sums = jax.lax.cond(due, apply, wait, sums, state.inner_opt_state, params)
    return updates, AccumulatedState(
      mini_step=jnp.where(due, 0, calls),
      gradient_step=state.gradient_step + due,
      inner_opt_state=inner,
      acc_grads=sums,
      weight=jnp.where(due, 0.0, total),
      norm=norm,
    )

  return optax.GradientTransformationExtraArgs(init, update)
