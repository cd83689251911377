"""The ranks that AdaLoRA has allocated, by matrix, and the same weights as plain LoRA."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.core.params import Params
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.lora_weight import LoRA


def kept(weight: SVDLoRA) -> np.ndarray:
  """Mask of contributing triplets: bool `[*stack, R]`, λ ≠ 0; in LoRA's form those with any B A."""
  if weight.e is not None:
    return np.asarray(weight.e) != 0
  return (np.asarray(weight.a) != 0).any(-1) & (np.asarray(weight.b) != 0).any(-2)


def ranks(params: Params) -> dict[str, int]:
  """The remaining rank of each AdaLoRA matrix by path, layers of a stack one by one."""
  found: dict[str, int] = {}
  for path, leaf in paths.leaves(params).items():
    if isinstance(leaf, SVDLoRA):
      counts = kept(leaf).sum(-1).ravel()
      layers = paths.layer_paths(path, leaf.stack)
      found.update((layer, int(n)) for layer, n in zip(layers, counts, strict=True))
  return found


def to_lora(params: Params) -> Any:
  """`params` with plain `LoRA` in place of AdaLoRA: the same ΔW, from the remaining triplets.

  A = Q, B = P diag(λ), at the same scale. A matrix without any triplet is its base again. Shapes
  depend on values, so this is not for use inside jit.
  """
  return paths.map_leaves(lambda _, x: _plain(x) if isinstance(x, SVDLoRA) else x, params)


def _plain(weight: SVDLoRA) -> Any:
  on = kept(weight)
  counts = on.sum(-1)
  width = int(counts.max())
  if not width:
    return weight.base
  # The remaining ones first, in their order.
  first = np.argsort(~on, axis=-1, kind="stable")[..., :width]
  live = np.take_along_axis(on, first, -1)
  b = weight.b if weight.e is None else weight.b * weight.e[..., None, :]
  a = jnp.take_along_axis(weight.a, first[..., :, None], -2) * live[..., :, None]
  b = jnp.take_along_axis(b, first[..., None, :], -1) * live[..., None, :]
  return LoRA(
    base=weight.base,
    a=a,
    b=b,
    scale=weight.scale,
    rank=jnp.asarray(counts, jnp.int32),
    key=weight.key,
    axes=weight.axes,
    dropout=weight.dropout,
    names=weight.names,
  )
