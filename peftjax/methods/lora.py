"""LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA, PiSSA, LoRA-FA and LoRA+."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from peftjax.core import paths, ranges
from peftjax.core.layout import Axes, Layout
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import Positive
from peftjax.core.weight import Weight
from peftjax.methods import lora_init
from peftjax.methods.base import trainable_mask
from peftjax.methods.lora_codec import LoraCodec
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.low_rank import RankStabilized


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAMethod(RankStabilized):
  """LoRA: h = W x + (α/r) B A x, with W frozen (Hu et al. 2021, eq. 3).

  Args:
    rank, alpha, targets, dropout, rank_pattern, alpha_pattern, divide_rank, dtype: as in `LowRank`.
    rslora: as in `RankStabilized`.
    init: how A begins, with B = 0 (`lora_init.factors`): `"kaiming"`, U(±1/√in), or `"gaussian"`,
      N(0, 1/r²). `"pissa"`: the principal triplets of W make up B A and the base keeps the rest
      (Meng et al. 2024, arXiv 2404.02948, eq. 2-4).
    freeze_a: train B alone (LoRA-FA; Zhang et al. 2023, arXiv 2308.03303, section 3).
    b_rate: the learning rate of B over that of A (LoRA+; Hayou et al. 2024, arXiv 2402.12354,
      which advises 16); `method.optimizer` applies it.

  Raises:
    ValueError: on an unknown init, or a number out of range.
  """

  codec = LoraCodec()

  init: str = "kaiming"
  freeze_a: bool = False
  b_rate: Positive = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    ranges.one_of("init", self.init, lora_init.INITS)

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """See `LowRank.attach`.

    Raises:
      ValueError: as there; on a table with `freeze_a`; on a tied one with `init="pissa"`.
    """
    tied = {head.of for head in paths.tied(params).values()}
    if self.init == "pissa" and (both := tied & set(self.claims(params))):
      raise ValueError(
        f'init="pissa" moves a part of {", ".join(both)} into the factors, and the head that is '
        "tied to it would lose that part; write params = pj.tree.untie(params) first"
      )
    return super().attach(key, params, layout)

  def trainable(self, params: Params) -> Mask:
    frozen = frozenset("a") if self.freeze_a else frozenset()
    return trainable_mask(params, set(self.claims(params)), frozen)

  def varies(self) -> frozenset[str]:
    """See `Method.varies`; without the rank for PiSSA, whose base depends on it."""
    return super().varies() - ({"rank"} if self.init == "pissa" else set())

  def _init(self) -> str:
    return self.init

  def _finish(self, path: str, weight: Any) -> Any:
    weight = weight.replace(b_rate=self.b_rate)
    if self.init == "pissa":
      return _pissa(weight, path, self.dtype)
    if self.freeze_a and path.split("/")[-1] == "embedding":
      raise ValueError(
        f"{path} is a table, whose A starts at zero, and freeze_a=True would leave it there, with "
        "nothing to learn; write freeze_a=False for it, or target kernels"
      )
    return weight


lora = LoRAMethod


def _pissa(weight: LoRA, path: str, dtype: Any) -> LoRA:
  """Moves the principal part of the base into the factors: base = W − s·(B A)ᵀ."""
  if isinstance(weight.base, Weight) or weight.axes != Axes():
    raise ValueError(f"{path}: init='pissa' needs a plain matrix; attach before quantising")
  width = weight.a.shape[-2]
  a, b = lora_init.principal(weight.base, weight.rank, width, weight.scale)
  weight = weight.replace(a=a.astype(dtype), b=b.astype(dtype), residual=True)
  return weight.replace(base=weight.base - weight.delta().astype(weight.base.dtype))
