"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA of the direction, and a trained magnitude."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from peftjax.core.ranges import Fraction, Positive, Size, checked
from peftjax.core.weight import Weight
from peftjax.methods.dora_weight import DoRA, squares
from peftjax.methods.lora import LoRAMethod, lora
from peftjax.methods.lora_weight import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAMethod(LoRAMethod):
  """Attaches `DoRA` to the targeted weights and trains factors and magnitudes; see `dora`."""

  leaf: ClassVar[type[LoRA]] = DoRA
  trained: ClassVar[frozenset[str]] = frozenset({"a", "b", "m"})

  from_quantised: bool

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


@checked
def dora(
  rank: Size = 8,
  alpha: Positive = 16.0,
  targets: str | Sequence[str] = ("query", "value"),
  *,
  dropout: Fraction = 0.0,
  rslora: bool = False,
  rank_pattern: Mapping[str, Size] | None = None,
  alpha_pattern: Mapping[str, Positive] | None = None,
  from_quantised: bool = False,
  dtype: Any = jnp.float32,
) -> DoRAMethod:
  """DoRA: h = m · (W + (α/r) B A) x / ‖W + (α/r) B A‖ of each output (Liu et al. 2024, eq. 5).

  m starts as ‖W‖, so outputs stay. The norm below is a constant to the gradient (section 4.3).

  Args:
    rank, alpha, targets, dropout, rslora, rank_pattern, alpha_pattern, dtype: as of `lora`.
    from_quantised: take ‖W‖ of the dequantised weight where W is quantised.

  Raises:
    ValueError: as of `lora`; at `attach` on a table, or a quantised weight without
      `from_quantised`.
  """
  common = lora(
    rank,
    alpha,
    targets,
    dropout=dropout,
    rslora=rslora,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    dtype=dtype,
  )
  fields = {f.name: getattr(common, f.name) for f in dataclasses.fields(common)}
  return DoRAMethod(**fields, from_quantised=from_quantised)
