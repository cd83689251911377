"""AdaLoRA's optimizer: any optimizer, and around it the penalty, the scores and the budget."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from peftjax import optim
from peftjax.core import paths
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.budget import Schedule, largest
from peftjax.methods.lora_init import TRIPLET_STD
from peftjax.methods.orthogonality import penalty

if TYPE_CHECKING:
  from peftjax.methods.adalora import AdaLoRAMethod


class AllocatorState(optim.Owner):
  """The allocator's state; `mean` and `spread` hold, by path, weights of averages.

  Attributes:
    step: int32 `[]`, updates so far.
    inner: the state of the optimizer within.
    mean: Ī, the moving average of the sensitivity of every entry of P, λ and Q.
    spread: Ū, the moving average of its uncertainty.
    valid: bool `[*stack, R]` by path: which triplets are not padding.
    penalty: float32 `[]`, R(P, Q) before the last update, without γ.
    budget: int32 `[]`, how many triplets there may be after it.
    target: int32 `[]`, b(T), how many there may be in the end.
    kept: bool `[*stack, R]` by path: triplets of the last allocation, for the final steps; pairs of
      LoRA's form stay within it.
    seed: int32 `[]`, seed of the triplets that are drawn anew.
  """

  step: jax.Array
  inner: Any
  mean: dict[str, SVDLoRA]
  spread: dict[str, SVDLoRA]
  valid: dict[str, jax.Array]
  penalty: jax.Array
  budget: jax.Array
  target: jax.Array
  kept: dict[str, jax.Array]
  seed: jax.Array

  def metrics(self) -> dict[str, jax.Array]:
    return {"orthogonality": self.penalty, "budget": self.budget}


def weights(train: Any) -> dict[str, SVDLoRA]:
  """The AdaLoRA weights of a trained tree, by path: they hold P, λ and Q alone. Frozen weights, of
  which the tree holds nothing, are not among them.
  """
  trained = lambda leaf: isinstance(leaf, SVDLoRA) and leaf.a is not None
  return {p: leaf for p, leaf in paths.leaves(train).items() if trained(leaf)}


@dataclasses.dataclass(frozen=True)
class Allocator:
  """AdaLoRA's part of an optimizer, over the updates of a schedule."""

  method: AdaLoRAMethod
  schedule: Schedule

  @property
  def _target(self) -> float:
    """Triplets per matrix in the end; 0 for a schedule that never gets there."""
    return self.method.target_rank or 0.0

  def wrap(
    self, clip: optax.GradientTransformation, tx: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """`tx` with, in this order: g + γ∇R, clipped; the update; scores of the result; the mask.

    Raises (at `update`):
      ValueError: without the trained tree, or without an AdaLoRA weight in it.
    """
    tx = optax.with_extra_args_support(tx)

    def init(train: Any) -> AllocatorState:
      found = weights(train)
      zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), found)
      valid = {path: _valid(weight) for path, weight in found.items()}
      matrices = sum(v.any(-1).sum() for v in valid.values())
      return AllocatorState(
        step=jnp.zeros((), jnp.int32),
        inner=tx.init(train),
        mean=zeros(),
        spread=zeros(),
        valid=valid,
        penalty=jnp.zeros(()),
        budget=_total(valid),
        target=jnp.round((self.method.target_rank or 0.0) * jnp.asarray(matrices)).astype(
          jnp.int32
        ),
        kept=jax.tree.map(jnp.array, valid),  # a copy: the step donates its state
        seed=jnp.asarray(self.method.seed, jnp.int32),
      )

    def update(
      grads: Any, state: AllocatorState, params: Any = None, **extra: Any
    ) -> tuple[Any, AllocatorState]:
      if params is None or not state.valid:
        raise ValueError(
          "AdaLoRA's optimizer needs the trained tree, with an AdaLoRA weight in it; write "
          "tx.update(grads, state, train)"
        )
      value, grads = self._regularised(grads, weights(params), state.valid)
      grads, _ = clip.update(grads, clip.init(params), params)
      updates, inner = tx.update(grads, state.inner, params, **extra)
      new = weights(optax.apply_updates(params, updates))
      # In float32: in 16 bits w g may be 0 where neither factor is.
      f32 = lambda x: x.astype(jnp.float32)
      now = jax.tree.map(lambda w, g: jnp.abs(f32(w) * f32(g)), new, weights(grads))
      mean, spread = self._averages(state, now)
      budget = self.schedule.budget(state.step, _total(state.valid), state.target)
      # A pair of LoRA's form is zero on both sides once pruned: momentum must not bring it back.
      pairs = {path: w.e is None for path, w in new.items()}
      may = {path: state.kept[path] if pairs[path] else v for path, v in state.valid.items()}
      free = {path: v if pairs[path] else jnp.ones_like(v) for path, v in state.kept.items()}
      masks, kept = jax.lax.switch(
        self.schedule.phase(state.step),
        (
          lambda: (free, state.kept),
          lambda: 2 * (largest(self._scores(now, mean, spread, new), may, budget),),
          lambda: (state.kept, state.kept),
        ),
      )
      updates = self._masked(updates, weights(params), masks, state)
      state = state.replace(
        step=state.step + 1,
        inner=inner,
        mean=mean,
        spread=spread,
        penalty=value,
        budget=budget,
        kept=kept,
      )
      return updates, state

    return optax.GradientTransformationExtraArgs(init, update)

  def _regularised(
    self, grads: Any, found: dict[str, SVDLoRA], valid: dict[str, jax.Array]
  ) -> tuple[jax.Array, Any]:
    """R(P, Q) of all matrices, and the gradients with γ times its own."""
    factors = 2 * sum(v.size // v.shape[-1] for v in valid.values())
    kind, gamma = self.method.penalty, self.method.gamma
    share = 1.0 if kind == "squared" else 1.0 / factors
    parts = {path: penalty(kind, w.b, w.a, valid[path]) for path, w in found.items()}

    def of(path: str, g: Any) -> Any:
      if path not in parts:
        return g
      add = lambda x, y: x + (gamma * share * y).astype(x.dtype)
      _, to_p, to_q = parts[path]
      return g.replace(b=add(g.b, to_p), a=add(g.a, to_q))

    value = share * sum((part[0] for part in parts.values()), jnp.zeros(()))
    return value, paths.map_leaves(of, grads)

  def _averages(self, state: AllocatorState, now: Any) -> tuple[Any, Any]:
    """Ī and Ū (equations 11 and 12) with a step's sensitivities; in the final steps they stay."""
    learns = state.step < self.schedule.end

    def ema(beta: float, old: Any, new: Any) -> Any:
      return jax.tree.map(lambda o, n: jnp.where(learns, beta * o + (1.0 - beta) * n, o), old, new)

    mean = ema(self.method.beta1, state.mean, now)
    off = jax.tree.map(lambda n, m: jnp.abs(n - m), now, mean)
    return mean, ema(self.method.beta2, state.spread, off)

  def _scores(self, now: Any, mean: Any, spread: Any, new: Any) -> dict[str, jax.Array]:
    """S of each triplet: s(λ) + mean s(P) + mean s(Q) with s = Ī · Ū (equations 9 and 13)."""
    score = self.method.score
    if score == "magnitude":
      return {path: jnp.abs(w.e).astype(jnp.float32) for path, w in new.items()}
    s = now if score == "sensitivity" else jax.tree.map(jnp.multiply, mean, spread)
    alone = lambda w: 0.0 if w.e is None else w.e
    return {path: alone(w) + w.b.mean(-2) + w.a.mean(-1) for path, w in s.items()}

  def _masked(
    self,
    updates: Any,
    found: dict[str, SVDLoRA],
    keep: dict[str, jax.Array],
    state: AllocatorState,
  ) -> Any:
    """The updates, those of pruned triplets leading to zero or, with "random", to new P and Q."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    final, regrow = state.step >= self.schedule.end, self.method.regrow

    def of(path: str, u: Any) -> Any:
      if path not in found:
        return u
      w, on = found[path], keep[path]
      keep_a, keep_b = on[..., :, None], on[..., None, :]
      made = u if w.e is None else u.replace(e=jnp.where(on, u.e, -w.e))
      if regrow == "zero" or w.e is None:
        return made.replace(a=jnp.where(keep_a, u.a, -w.a), b=jnp.where(keep_b, u.b, -w.b))
      if regrow == "random":
        keys = jax.random.split(paths.fold_in_path(key, path))
        drawn = lambda key, x: TRIPLET_STD * jax.random.normal(key, x.shape, x.dtype) - x
        return made.replace(
          a=jnp.where(keep_a | final | ~state.valid[path][..., :, None], u.a, drawn(keys[0], w.a)),
          b=jnp.where(keep_b | final | ~state.valid[path][..., None, :], u.b, drawn(keys[1], w.b)),
        )
      return made

    return paths.map_leaves(of, updates)


def _valid(weight: SVDLoRA) -> jax.Array:
  """True on triplets that are not padding, zero on both sides; any other has one side random."""
  return (weight.a != 0).any(-1) | (weight.b != 0).any(-2)


def _total(valid: dict[str, jax.Array]) -> jax.Array:
  return sum((v.sum() for v in valid.values()), jnp.zeros((), jnp.int32)).astype(jnp.int32)
