"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): one budget of ranks for all matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import paths, ranges
from peftjax.core.layout import Layout
from peftjax.core.params import Params
from peftjax.core.ranges import Count, Fraction, NotNegative, Size
from peftjax.methods import adalora_ranks, budget
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.allocator import Allocator
from peftjax.methods.base import Outer
from peftjax.methods.lora_codec import AdaLoraCodec
from peftjax.methods.low_rank import LowRank
from peftjax.methods.orthogonality import PENALTIES

# Allowed values of its fields.
_NAMES = {
  "penalty": PENALTIES,
  "score": ("full", "sensitivity", "magnitude"),
  "regrow": ("kept", "random", "zero"),
  "form": ("svd", "lora"),
}


@dataclasses.dataclass(frozen=True)
class AdaLoRAMethod(LowRank):
  """AdaLoRA: h = W x + (α/r) P diag(λ) Q x, keeping the best b triplets (P_i, λ_i, Q_i).

  The loss is C + γ R(P, Q). After every ΔT-th step the triplets of all matrices are ranked by
  S_i = s(λ_i) + mean s(P_i) + mean s(Q_i), and λ_i of all but the first b(t) is set to zero; its
  P_i and Q_i stay and learn, so a triplet may come back. s(w) = Ī(w) Ū(w) are moving averages of
  the sensitivity |w ∂L/∂w| and of how far it strays from its average (equations 3 to 13). b falls
  from r to `target_rank` per matrix on a cubic curve; in the final steps the choice is fixed.

  Train with `method.optimizer(tx, total_steps)`: any other optimizer raises.

  Args:
    rank, alpha, targets, dropout, rank_pattern, alpha_pattern, divide_rank, dtype: as in `LowRank`;
      r is the initial rank of each matrix, and the scale stays α/r for this r.
    target_rank: b(T) divided by the number of matrices; None prunes nothing (SVD-LoRA).
    warmup, final: t_i and t_f, updates before pruning starts and after it has ended; below 1,
      fractions of all updates.
    interval: ΔT.
    penalty: R: `"squared"`, the paper's sum of squares, or `"norm"`, the released code's mean of
      norms (`orthogonality.penalty`).
    gamma: γ; 0 for none.
    beta1, beta2: decay rates of Ī and Ū.
    score: `"full"`; for the ablations of the paper's table 4 `"sensitivity"`, s(w) = |w ∂L/∂w|
      for this step, or `"magnitude"`, S_i = |λ_i|.
    regrow: the fate of P_i and Q_i when λ_i is masked. `"kept"`: they stay (the paper).
      `"random"`: they are drawn anew. `"zero"`: they are zeroed, after which no part of the triplet
      has a gradient, so that only an optimizer's momentum can bring it back.
    form: `"svd"`, or `"lora"` for LoRA's own B A with penalty (LoRA_regu, with target_rank=None) or
      pruned by pairs (Prune-LoRA), which never come back.
    seed: seed of the draws for `regrow="random"`.

  Raises:
    ValueError: on an unknown name, a number out of range, or a target above the rank.
  """

  leaf = SVDLoRA
  codec = AdaLoraCodec()

  rank: Size = 12
  targets: str | Sequence[str] = "all-linear"
  _: dataclasses.KW_ONLY
  target_rank: NotNegative | None = 8.0
  warmup: NotNegative = 0.1
  final: NotNegative = 0.4
  interval: Size = 10
  penalty: str = "squared"
  gamma: NotNegative = 0.1
  beta1: Fraction = 0.85
  beta2: Fraction = 0.85
  score: str = "full"
  regrow: str = "kept"
  form: str = "svd"
  seed: Count = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, allowed in _NAMES.items():
      ranges.one_of(name, getattr(self, name), allowed)
    if self.form == "lora" and self.score == "magnitude":
      raise ValueError('score "magnitude" is that of λ, which form "lora" does not have')
    for name, number in (("warmup", self.warmup), ("final", self.final)):
      if number >= 1 and number != int(number):
        raise ValueError(f"{name}={number}: write a fraction below 1 or a whole number of updates")
    top_rank = max([self.rank, *self.rank_pattern.values()])
    if self.target_rank is not None and self.target_rank > top_rank:
      raise ValueError(
        f"target_rank {self.target_rank} is not between 0 and the initial rank {top_rank}; raise "
        "rank (1.5 times the target is usual) or lower target_rank"
      )

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """Puts an `SVDLoRA` around every targeted weight, with λ = 0, so outputs stay.

    Raises:
      ValueError: as `LowRank`; and if the ranks are fewer than the target asks for.
    """
    attached, claimed = super().attach(key, params, layout), set(self.claims(params, layout))
    flat = paths.leaves(attached).items()
    made = [w for p, w in flat if p in claimed and isinstance(w, SVDLoRA)]
    ranks = [r for w in made for r in _ranks(w)]
    if self.target_rank is not None and self.target_rank * len(ranks) > sum(ranks):
      raise ValueError(
        f"target_rank {self.target_rank} on {len(ranks)} matrices is more than the "
        f"{sum(ranks)} triplets that rank and rank_pattern give them; raise rank (1.5 times the "
        f"target is usual) or write target_rank={sum(ranks) / len(ranks):g} or less"
      )
    return attached

  def outer(self, total_steps: int) -> Outer:
    """The allocator over `total_steps` updates.

    Raises:
      ValueError: if warm-up and final steps leave none between them.
    """
    return Allocator(self, self._schedule(total_steps)).wrap

  def settled(self, total_steps: int) -> int:
    """The update after step T − t_f, from which on every matrix keeps its triplets."""
    return 0 if self.target_rank is None else self._schedule(total_steps).end + 1

  def varies(self) -> frozenset[str]:
    """See `Method.varies`: `target_rank` is among them unless it is None, and the rank unless
    triplets are redrawn, in the rank's shape.
    """
    own = set() if self.target_rank is None else {"target_rank"}
    return super().varies() - ({"rank"} if self.regrow == "random" else set()) | own

  def summary(self, params: Params) -> dict[str, Any]:
    return {"ranks": adalora_ranks.ranks(params)}

  def _schedule(self, total_steps: int) -> budget.Schedule:
    if self.target_rank is None:
      return budget.NEVER
    return budget.schedule(total_steps, self.warmup, self.final, self.interval)

  def _init(self) -> str:
    return "kaiming" if self.form == "lora" else "triplets"

  def _finish(self, path: str, weight: Any) -> Any:
    if self.form == "lora":
      return weight
    return weight.replace(e=jnp.zeros((*weight.stack, weight.a.shape[-2]), self.dtype))


adalora = AdaLoRAMethod


def _ranks(weight: Any) -> list[int]:
  """The rank of each layer; from shapes alone, also inside jit, as many as there are rows."""
  if isinstance(weight.rank, jax.ShapeDtypeStruct | jax.core.Tracer):
    return [weight.a.shape[-2]] * max(weight.rank.size, 1)
  return [int(r) for r in weight.rank.ravel()]
