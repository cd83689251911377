"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA of the direction, and a trained magnitude."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from peftjax.core.weight import Weight
from peftjax.methods.dora_weight import DoRA, squares
from peftjax.methods.lora_codec import DoraCodec
from peftjax.methods.low_rank import RankStabilized


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAMethod(RankStabilized):
  """DoRA: h = m · (W + (α/r) B A) x / ‖W + (α/r) B A‖ per output (Liu et al. 2024, eq. 5).

  m starts as ‖W‖, so outputs stay. The norm below is a constant to the gradient (section 4.3).

  Args:
    rank, alpha, targets, dropout, rank_pattern, alpha_pattern, divide_rank, dtype: as in `LowRank`.
    rslora: as in `RankStabilized`.
    from_quantised: take ‖W‖ of the dequantised weight where W is quantised.

  Raises:
    ValueError: on a number out of range; at `attach` as `LowRank`, on a table, or on a quantised
      weight without `from_quantised`.
  """

  leaf = DoRA
  codec = DoraCodec()

  from_quantised: bool = False

  def _finish(self, path: str, weight: Any) -> Any:
    if path.split("/")[-1] == "embedding":
      raise ValueError(f"{path} is a table, which DoRA is not made for; target kernels")
    if isinstance(weight.base, Weight) and weight.base.quantised and not self.from_quantised:
      raise ValueError(
        f"{path} is quantised, and DoRA starts from the norms of the columns of W; write "
        "pj.dora(..., from_quantised=True) to take those of the dequantised ones"
      )
    square = squares(weight.base, weight.axes, weight.stack)
    return weight.replace(m=jnp.sqrt(square).astype(self.dtype), square=square)


dora = DoRAMethod
