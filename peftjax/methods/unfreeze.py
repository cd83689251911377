"""`unfreeze`: full fine-tuning, head only, BitFit, norms: a mask and nothing attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import paths
from peftjax.core.adapted import bare
from peftjax.core.layout import Layout
from peftjax.core.params import Mask, Params
from peftjax.methods.base import Method, claimed_mask


@dataclasses.dataclass(frozen=True)
class UnfreezeMethod(Method):
  """Trains the leaves that `targets` names, as they are, and freezes the rest.

  Full fine-tuning is `unfreeze(".*")`, the head `unfreeze("head/.*")`, BitFit
  `unfreeze([".*/bias", "head/.*"])` (Ben Zaken et al. 2022, section 3).

  Args:
    targets: a regex for whole paths, a module name, or several (`core.paths.select`).
  """

  targets: str | Sequence[str]

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    return paths.select(params, self.targets, arrays=True, layout=layout)

  def attach(self, key: jax.Array, params: Params, layout: Any = None) -> Params:
    flat = paths.leaves(params)
    for path in self.claims(params):
      leaf = bare(flat[path])  # a box stays: its names say where the array lies
      if paths.is_leaf(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
          f"pj.unfreeze cannot train {path}: it is {type(leaf).__name__}, not a float array. "
          "Train adapters on it with a method such as pj.lora, or leave it out of the regex."
        )
    return params

  def trainable(self, params: Params) -> Mask:
    return claimed_mask(self, params)


unfreeze = UnfreezeMethod
