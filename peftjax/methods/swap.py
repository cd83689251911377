"""Several adapters on one base: equal shapes to swap or stack them, and unmerging."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import paths, shared, tree
from peftjax.core.tied import is_tied
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.lora_weight import LoRA


def align_ranks(*adapters: Any) -> tuple[Any, ...]:
  """The same adapters, padded with zero rows to one rank at each weight.

  Rank and alpha are array children, so adapters of one base can then be swapped in a compiled
  step, or stacked for `vmap`, without tracing again:

      adapter, base = pj.partition(params, pj.adapter_mask(params, method.trainable(params)))
      one, two = pj.align_ranks(adapter, other_adapter)
      step(pj.combine(one, base)); step(pj.combine(two, base))
  """
  node = lambda n: n is None or paths.is_leaf(n)

  def widest(*leaves: Any) -> Any:
    return max(leaf.a.shape[-2] for leaf in leaves) if isinstance(leaves[0], LoRA) else 0

  widths = jax.tree.map(widest, *adapters, is_leaf=node)
  return tuple(jax.tree.map(_pad, widths, adapter, is_leaf=node) for adapter in adapters)


def _pad(width: int, leaf: Any) -> Any:
  if not isinstance(leaf, LoRA):
    return leaf
  extra = width - leaf.a.shape[-2]
  lead = [(0, 0)] * (leaf.a.ndim - 2)
  a = jnp.pad(leaf.a, [*lead, (0, extra), (0, 0)])
  b = jnp.pad(leaf.b, [*lead, (0, 0), (0, extra)])
  if isinstance(leaf, SVDLoRA) and leaf.e is not None:
    leaf = leaf.replace(e=jnp.pad(leaf.e, [*lead, (0, extra)]))
  return leaf.replace(a=a, b=b)


def cut_ranks(adapter: Any) -> Any:
  """Undoes `align_ranks`: every weight with no more rows than its largest rank."""

  def cut(leaf: Any) -> Any:
    if not isinstance(leaf, LoRA):
      return leaf
    width = int(leaf.rank.max())
    made = leaf.replace(a=leaf.a[..., :width, :], b=leaf.b[..., :width])
    if isinstance(leaf, SVDLoRA) and leaf.e is not None:
      return made.replace(e=leaf.e[..., :width])
    return made

  return jax.tree.map(cut, adapter, is_leaf=lambda n: n is None or paths.is_leaf(n))


def unmerge(merged: Any, params: Any) -> Any:
  """Undoes `merge`: `params`' adapters around base = merged − s·(b a)ᵀ, equal up to rounding.

  Args:
    merged: the dense tree `merge(params)` gave.
    params: the attached tree; the values of its base arrays are not read.
  """

  def undo(leaf: Any, tied: Any, dense: Any) -> Any:
    if is_tied(leaf):
      return leaf
    return leaf.replace(base=tied.unmerged(dense)) if hasattr(leaf, "unmerged") else dense

  own, tied = (shared.without(x) for x in (params, tree.tie(params)))
  undone = jax.tree.map(undo, own, tied, merged, is_leaf=lambda n: paths.is_leaf(n) or is_tied(n))
  return shared.add(undone, shared.nodes(params))
