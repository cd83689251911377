"""`convert_to_lora`: the change that any adapter makes to a weight, as LoRA of a given rank."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax.core import paths, shared, tree
from peftjax.core.adapted import Adapted
from peftjax.core.attachment import attachments
from peftjax.core.layout import Axes
from peftjax.core.params import Params
from peftjax.core.weight import materialize
from peftjax.methods.adalora_ranks import to_lora
from peftjax.methods.lora_weight import LoRA


def convert_to_lora(params: Params, rank: int) -> tuple[Params, dict[str, float]]:
  """`params` with plain `LoRA` of at most `rank` in place of every adapter.

  B A = U_r S_r V_rᵀ of ΔW = U S Vᵀ, the nearest matrix of rank r (Eckart and Young 1936), halves
  √S in each factor, at scale 1. LoRA and AdaLoRA of no larger rank keep their factors. Quantised
  bases stay quantised. ΔW is computed in float32 and its singular values by LAPACK on the host, so
  this is not for use inside jit.

  Args:
    params: a tree of arrays and weights.
    rank: r, from 1; for a smaller matrix its smaller side.

  Returns:
    The tree, and ‖ΔW − B A‖ / ‖ΔW‖ (Frobenius) by path of each adapted matrix, layers of a stack
    one by one: 0 where nothing was lost.

  Raises:
    ValueError: a rank below 1; an adapter that does not change a matrix: bottleneck adapters,
      prefixes, prompts, IA3 of a bias.
  """
  if type(rank) is not int or rank < 1:
    raise ValueError(f"rank is {rank!r}; write a whole number from 1")
  if found := attachments(params):
    raise ValueError(
      f"{type(found[0]).__name__} cannot be LoRA: it does not change a weight. Keep its checkpoint."
    )
  for path, leaf in paths.leaves(params).items():
    if isinstance(leaf, Adapted) and len(leaf.shape) < 2:
      raise ValueError(
        f"{path} is a vector with {type(leaf).__name__}, and LoRA is of matrices. Save the whole "
        "model instead: pj.save_pretrained(...)."
      )
  params = to_lora(params)
  errors: dict[str, float] = {}
  whole = paths.leaves(tree.tie(params))

  def convert(path: str, leaf: Any) -> Any:
    if not isinstance(leaf, Adapted):
      return leaf
    if type(leaf) is LoRA and int(np.max(leaf.rank, initial=0)) <= rank:
      errors.update(dict.fromkeys(paths.layer_paths(path, leaf.stack), 0.0))
      return leaf
    made, lost = _truncated(whole[path], rank)
    errors.update(zip(paths.layer_paths(path, made.stack), lost, strict=True))
    return made

  return shared.without(paths.map_leaves(convert, params)), errors


def _truncated(leaf: Adapted, rank: int) -> tuple[LoRA, list[float]]:
  """The LoRA of one leaf, and the loss of each of its layers."""
  axes = getattr(leaf, "axes", Axes())
  stack = axes.stack(leaf.shape)
  size = lambda group: math.prod(leaf.shape[axis] for axis in group)
  base = jnp.asarray(materialize(leaf.base), jnp.float32)
  delta = np.asarray(leaf.replace(base=base).materialize() - base)
  last = [delta.ndim + axis for axis in (*axes.outs, *axes.ins)]
  flat = delta.transpose(*range(len(stack)), *last).reshape(-1, size(axes.outs), size(axes.ins))
  ups, downs, lost = [], [], []
  width = min(rank, *flat.shape[1:])
  for layer in flat:
    u, s, vt = np.linalg.svd(layer, full_matrices=False)
    norm = np.linalg.norm(s)
    lost.append(float(np.linalg.norm(s[width:]) / norm) if norm else 0.0)
    root = np.sqrt(s[:width])
    ups.append(u[:, :width] * root)
    downs.append(root[:, None] * vt[:width])
  put = lambda rows: jnp.asarray(np.stack(rows).reshape(*stack, *rows[0].shape), jnp.float32)
  made = LoRA(
    base=leaf.base,
    a=put(downs),
    b=put(ups),
    scale=jnp.ones(stack, jnp.float32),
    rank=jnp.full(stack, width, jnp.int32),
    axes=axes,
    dropout=leaf.dropout,
    residual=leaf.residual,
    names=leaf.names,
  )
  return made, lost
