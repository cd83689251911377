"""The AdaLoRA leaf: a weight plus a product in the form of a singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import PartitionSpec as P

from peftjax.core.weight import children
from peftjax.methods.lora_weight import LoRA


class SVDLoRA(LoRA):
  """W = base + scale · (P diag(λ) Q)ᵀ (Zhang et al. 2023, eq. 3), for a Flax kernel.

  P is `b`, `[*stack, out, R]`, and Q is `a`, `[*stack, R, in]`. A column of P, a row of Q and their
  λ are a triplet. Which triplets stay is decided over all matrices (`allocator`).

  Attributes:
    e: λ, `[*stack, R]`; None for LoRA's own form, W = base + scale · (P Q)ᵀ, where pairs are
      pruned.
  """

  trained: ClassVar[frozenset[str]] = frozenset({"a", "b", "e"})

  e: Any = None

  owned: ClassVar[bool] = True

  @property
  def ranked(self) -> Mapping[str, int]:  # type: ignore[override]
    return LoRA.ranked if self.e is None else {**LoRA.ranked, "e": -1}

  def child_specs(self, spec: P) -> SVDLoRA:
    made = super().child_specs(spec)
    e = None if self.e is None else P(*made.scale, None)
    return self.replace(**{**children(made), "e": e})

  def _up(self) -> jax.Array:
    up = super()._up()
    return up if self.e is None else up * self.e[..., None, :]
