"""AdaLoRA's budget: how many triplets there are at each step, and which."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A schedule from all triplets to the target, on a cubic curve.

  Attributes:
    start: t_i, the last step with all triplets.
    end: T − t_f, the first step with the target; from there on nothing is allocated anew.
    interval: ΔT, steps from one allocation to the next.
  """

  start: int
  end: int
  interval: int

  def budget(self, step: jax.Array, initial: jax.Array, target: jax.Array) -> jax.Array:
    """b(t) = b_T + (b_0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³, rounded down, int32.

    So the released code has it. Equation 14 of the paper subtracts t_f from t as well, which is
    neither b_0 at t_i nor b_T at T − t_f. In float32: a millionth is added, so that numbers whole
    in exact arithmetic are not rounded down.
    """
    left = jnp.clip((self.end - step) / (self.end - self.start), 0.0, 1.0)
    over = (initial - target).astype(jnp.float32) * left**3
    return target + jnp.floor(over * (1.0 + 1e-6)).astype(jnp.int32)

  def phase(self, step: jax.Array) -> jax.Array:
    """The phase after this step: 0, all triplets learn; 1, they are allocated, every ΔT from
    t_i on and last at T − t_f; 2, the last choice is masked again.
    """
    due = (step > self.start) & ((step % self.interval == 0) | (step == self.end))
    return jnp.where(step > self.end, 2, due.astype(jnp.int32))


# For a run that prunes nothing, however long it is.
NEVER = Schedule(2**31 - 3, 2**31 - 2, 1)


def schedule(total_steps: int, warmup: float, final: float, interval: int) -> Schedule:
  """The schedule of a run.

  Args:
    total_steps: T, updates in all.
    warmup, final: t_i and t_f; below 1 they are fractions of T. t_f is at least 1: the last step
      leaves no more than the target.

  Raises:
    ValueError: if nothing is left between them.
  """
  start, last = (round(x * total_steps) if x < 1 else int(x) for x in (warmup, final))
  last = max(last, 1)
  if start + last >= total_steps:
    raise ValueError(
      f"AdaLoRA's schedule: a warm-up of {start} and {last} final steps do not fit into "
      f"{total_steps} steps. Train longer, or write fractions of the whole: warmup=0.1, final=0.4."
    )
  return Schedule(start, total_steps - last, interval)


def largest(
  scores: Mapping[str, jax.Array], valid: Mapping[str, jax.Array], budget: jax.Array
) -> dict[str, jax.Array]:
  """Masks, in the scores' shapes, of the `budget` largest of all; among equal ones the first win.

  Args:
    scores: float `[*stack, R]` for each matrix, by path.
    valid: bool of the same shapes; padding is not kept and does not count.
  """
  order = sorted(valid)
  flat = jnp.concatenate([jnp.where(valid[p], scores[p], -jnp.inf).ravel() for p in order])
  best = jnp.argsort(-flat, stable=True)
  place = jnp.zeros(flat.shape, jnp.int32).at[best].set(jnp.arange(flat.size, dtype=jnp.int32))
  kept, masks, begin = place < budget, {}, 0
  for path in order:
    v = valid[path]
    masks[path] = kept[begin : begin + v.size].reshape(v.shape) & v
    begin += v.size
  return masks
