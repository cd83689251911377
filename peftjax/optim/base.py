"""Schedules, AdamW, freezing, and the wrapper that every method shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from msgspec import Meta

from peftjax.core import paths
from peftjax.core.adapted import Adapted
from peftjax.core.params import Mask
from peftjax.core.ranges import Fraction, NotNegative, Positive, Size, check_one, checked
from peftjax.core.weight import Weight
from peftjax.optim.accumulate import AccumulatedState, accumulated

# Last names of paths: biases, and factors of activations (IA3's l, DoRA's m).
_UNDECAYED = ("bias", "down_bias", "up_bias", "scale", "l", "m")

# At 0 an array without gradients divides by zero; above 1 no gradient would be normalised.
Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]

_MULTI_STEPS = "pass the inner optimizer and accumulate=N instead of an optax.MultiSteps"


@checked
def schedule(
  kind: str, peak: NotNegative, total_steps: Size, warmup_steps: int = 0
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then linear or cosine decay to 0, or constant.

  Args:
    kind: `"linear"`, `"cosine"` or `"constant"`.
    peak: the learning rate after warm-up.
    total_steps: updates in all, warm-up included.
    warmup_steps: updates of warm-up, fewer than `total_steps`.

  Raises:
    ValueError: on an unknown kind, a number out of range, or a warm-up that does not fit.
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(f"warm-up of {warmup_steps} steps does not fit in {total_steps} steps")
  rest = total_steps - warmup_steps
  if kind == "linear":
    after = optax.linear_schedule(peak, 0.0, rest)
  elif kind == "cosine":
    after = optax.cosine_decay_schedule(peak, rest)
  elif kind == "constant":
    after = optax.constant_schedule(peak)
  else:
    raise ValueError(f'schedule {kind[:80]!r} is not one of "linear", "cosine", "constant"')
  if not warmup_steps:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
  )


def decay_mask(train: Any) -> Any:
  """True where weight decay applies: on all but biases and scales, those of adapters, IA3 and DoRA
  included (the usual convention).
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: paths.name(path).split("/")[-1] not in _UNDECAYED, train
  )


@checked
def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: Fraction = 0.9,
  b2: Fraction = 0.999,
  eps: Epsilon = 1e-8,
  weight_decay: NotNegative = 0.0,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019) that decays neither biases nor scales.

  Moments, arithmetic and updates are float32 whatever the parameters are. Parameters of 16 bits
  still lose the part of an update that is below half a unit of their last place.

  Raises:
    ValueError: on a number out of range.
  """
  check_rate(learning_rate)
  tx = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
  return _in_float32(tx)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` with its 16-bit inputs cast to float32.

  In bfloat16 0.999 ν + 0.001 g² would be ν again: the second moment would never fall.
  """
  short = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32) if short(x) else x, tree)
  return optax.GradientTransformation(
    lambda params: tx.init(wide(params)),
    lambda grads, state, params=None: tx.update(wide(grads), state, wide(params)),
  )


class Rate(NamedTuple):
  """A learning rate as an array: float32 `[]`."""

  rate: jax.Array


def check_rate(learning_rate: optax.ScalarOrSchedule) -> None:
  """Raises ValueError on a number that is no learning rate; schedules and arrays may be one."""
  if not callable(learning_rate) and not isinstance(learning_rate, jax.Array):
    check_one("learning_rate", learning_rate, NotNegative)


@checked
def at_rate(tx: optax.GradientTransformation, rate: NotNegative) -> optax.GradientTransformation:
  """`tx` with its updates times `rate`, which lies in the state.

  States of several rates are then states of one optimizer, which `vmap` or `lax.map` runs on all
  of them; `tx` itself is made with a rate of 1.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params: Any) -> tuple[Any, Rate]:
    return tx.init(params), Rate(jnp.float32(rate))

  def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    updates, inner = tx.update(grads, state[0], params, **extra)
    scaled = jax.tree.map(lambda u: (state[1].rate * u).astype(u.dtype), updates)
    return scaled, (inner, state[1])

  return optax.GradientTransformationExtraArgs(init, update)


@checked
def wrap(
  tx: optax.GradientTransformation,
  *,
  clip_norm: Positive | None,
  accumulate: Size,
  batches: Size | None = None,
  outer: Callable[..., optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`tx` after clipping by the global norm, once every `accumulate` calls on the mean gradient.

  Args:
    accumulate, batches: see `accumulated`.
    outer: makes one transformation of clipping and `tx`; by default the one after the other.

  Raises:
    ValueError: on a number out of range; here or from its init, if `tx` is or holds an
      `optax.MultiSteps`: its calls would be counted as updates; from its init, if there are weights
      that another method's optimizer has to train.
  """
  if isinstance(tx, optax.MultiSteps):
    raise ValueError(_MULTI_STEPS)
  tx = _once_a_call(tx)
  if outer is not None:
    clip = optax.identity() if clip_norm is None else _clip(clip_norm)
    tx = outer(clip, tx)
  elif clip_norm is not None:
    tx = optax.chain(_clip(clip_norm), tx)
  return accumulated(_at_own_rates(_checked(tx)), accumulate, batches)


def _clip(norm: float) -> optax.GradientTransformation:
  init, update = optax.clip_by_global_norm(norm)
  return optax.GradientTransformation(init, jax.named_scope("clip")(update))


def _once_a_call(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx`; its init raises if it accumulates gradients itself."""
  tx = optax.with_extra_args_support(tx)

  def init(train: Any) -> Any:
    state = tx.init(train)
    if nodes(state, (optax.MultiStepsState, AccumulatedState)):
      raise ValueError(_MULTI_STEPS)
    return state

  return optax.GradientTransformationExtraArgs(init, jax.named_scope("update")(tx.update))


def _checked(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with `check_owned` in its init."""
  tx = optax.with_extra_args_support(tx)

  def init(train: Any) -> Any:
    state = tx.init(train)
    check_owned(train, state)
    return state

  return optax.GradientTransformationExtraArgs(init, tx.update)


def _at_own_rates(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with the rates that children of weights have of their own: see `Adapted.rates`."""
  tx = optax.with_extra_args_support(tx)

  def of(path: str, update: Any) -> Any:
    return update.at_own_rates() if isinstance(update, Adapted) else update

  def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    updates, state = tx.update(grads, state, params, **extra)
    return paths.map_leaves(of, updates), state

  return optax.GradientTransformationExtraArgs(tx.init, update)


class Owner(flax.struct.PyTreeNode):
  """The state of a method's part around an optimizer; it alone may train `owned` weights."""

  def metrics(self) -> dict[str, jax.Array]:
    """Numbers `[]` about the last update, for the log."""
    return {}


def check_owned(train: Any, state: Any) -> None:
  """Raises ValueError if there are `owned` weights, and no `Owner` in the optimizer's state."""
  trained = lambda x: isinstance(x, Weight) and x.owned and jax.tree.leaves(x)
  found = {path: x for path, x in paths.leaves(train).items() if trained(x)}
  if found and not nodes(state, Owner):
    path, weight = next(iter(found.items()))
    raise ValueError(
      f"{path} ({type(weight).__name__}) is to be trained by the optimizer of its own method "
      "alone; write tx = method.optimizer(tx, total_steps) with the method that attached it"
    )


def metrics(state: Any) -> dict[str, jax.Array]:
  """The metrics of the last update, from the methods' parts of an optimizer state."""
  return {name: x for owner in nodes(state, Owner) for name, x in owner.metrics().items()}


def accumulator_state(state: Any) -> AccumulatedState | None:
  """The accumulator's part of an optimizer state, or None.

  Raises:
    ValueError: if gradients are accumulated by `optax.MultiSteps`, to which a batch of two tokens
      is worth as much as one of two thousand.
  """
  if nodes(state, optax.MultiStepsState):
    raise ValueError(f"optax.MultiSteps weighs all batches alike; {_MULTI_STEPS}")
  return next(iter(nodes(state, AccumulatedState)), None)


def nodes(state: Any, kind: Any) -> list[Any]:
  """The parts of an optimizer state that are of a kind."""
  found = lambda node: isinstance(node, kind)
  return [node for node in jax.tree.leaves(state, is_leaf=found) if found(node)]


def freeze(tx: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformationExtraArgs:
  """`tx` on the leaves where `mask` holds, and no update nor state for the rest.

  `tx` sees a tree of the trained leaves alone, so global-norm clipping and weight decay cannot
  reach a frozen one. (`optax.masked` alone would pass the raw gradients of the rest through.)
  The update of a frozen leaf is the scalar -0.0, the one float that changes no bit when added, or
  the integer 0: a float would take integers through float32, which does not hold them all.
  """
  tx = _checked(tx)
  chosen = lambda tree: jax.tree.map(lambda m, leaf: leaf if m else None, mask, tree)

  def update(updates, state, params=None, **extra):
    trained = None if params is None else chosen(params)
    new, state = tx.update(chosen(updates), state, trained, **extra)
    if params is None:
      return jax.tree.map(lambda m, u: u if m else -0.0, mask, new), state
    still = lambda p: 0 if jnp.issubdtype(p.dtype, jnp.integer) else -0.0
    return jax.tree.map(lambda m, p, u: u if m else still(p), mask, params, new), state

  return optax.GradientTransformationExtraArgs(lambda params: tx.init(chosen(params)), update)
