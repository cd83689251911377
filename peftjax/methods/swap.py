"""Several adapters on one base: equal shapes to swap or stack them, and unmerging."""

from __future__ import annotations

from typing import Any

import jax

from peftjax.core import paths, shared, tree
from peftjax.core.adapted import Adapted
from peftjax.core.params import Params
from peftjax.core.tied import is_tied


def align_ranks(*adapters: Params) -> tuple[Params, ...]:
  """The same adapters, padded with zero rows to one rank at each weight.

  Rank and alpha are array children, so adapters of one base can then be swapped in a compiled
  step, or stacked for `vmap`, without tracing again:

      adapter, base = pj.partition(params, pj.tree.adapter_mask(params, method.trainable(params)))
      one, two = pj.tree.align_ranks(adapter, other_adapter)
      step(pj.combine(one, base)); step(pj.combine(two, base))

  Raises:
    ValueError: adapters on different weights, of different kinds, or that differ in more than rank
      and alpha: unrolled and scanned layers, other sizes, dtypes or dropout rates.
  """
  flats = [_flat(adapter) for adapter in adapters]
  for i, flat in enumerate(flats[1:], 2):
    for path in (*flats[0], *flat):
      kinds = [_kind(x, path) for x in (flats[0], flat)]
      if kinds[0] != kinds[1]:
        raise ValueError(
          f"at {path} the first adapter has {kinds[0]} and adapter {i} {kinds[1]}: only adapters "
          "on the same weights of one model, of one kind, all unrolled or all scanned, can take "
          "each other's place. Attach the missing ones (an adapter of rank 1 and scale 0 changes "
          "nothing), or merge each with pj.merge."
        )
  width = {
    path: max(flat[path].width for flat in flats)
    for path, leaf in (flats[0] if flats else {}).items()
    if _is_ranked(leaf)
  }
  pad = lambda path, leaf: leaf.of_width(width[paths.name(path)]) if _is_ranked(leaf) else leaf
  made = tuple(
    jax.tree_util.tree_map_with_path(pad, adapter, is_leaf=_is_node) for adapter in adapters
  )
  for i, flat in enumerate(map(_flat, made[1:]), 2):
    for path, leaf in _flat(made[0]).items():
      if _form(leaf) != _form(flat[path]):
        raise ValueError(
          f"at {path} the first adapter and adapter {i} differ in more than rank and alpha:\n"
          f"  {_shown(leaf)}\n  {_shown(flat[path])}\n"
          "Attach both to one model with one dtype and one dropout (leaf.replace(dropout=...))."
        )
  return made


def _is_ranked(leaf: Any) -> bool:
  return isinstance(leaf, Adapted) and bool(leaf.ranked)


def _is_node(node: Any) -> bool:
  return node is None or paths.is_leaf(node)


def _flat(adapter: Any) -> dict[str, Any]:
  """Every leaf and every hole by path."""
  flat, _ = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=_is_node)
  return {paths.name(path): leaf for path, leaf in flat}


def _kind(flat: dict[str, Any], path: str) -> str:
  if path not in flat:
    return "no such place"
  leaf = flat[path]
  if _is_ranked(leaf) and any(getattr(leaf, name) is None for name in leaf.ranked):
    raise ValueError(
      f"{path} lacks a factor, so its padded rank is not known; pass adapters as "
      "pj.partition(params, pj.tree.adapter_mask(params, method.trainable(params))) gives them"
    )
  if leaf is None:
    return "nothing"
  return f"a {type(leaf).__name__}" if paths.is_leaf(leaf) else "an array"


def _form(leaf: Any) -> Any:
  """Everything by which a program that was traced for a leaf knows it."""
  return jax.tree.structure(leaf), [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)]


def _shown(leaf: Any) -> str:
  """A short text of a leaf's arrays and static fields."""
  arrays = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(leaf))
  rate = leaf.dropout if isinstance(leaf, Adapted) else 0.0
  return f"{type(leaf).__name__} of {arrays}, dropout {rate}"


def cut_ranks(adapter: Params) -> Params:
  """Undoes `align_ranks`: every weight with no more rows than its largest rank."""

  cut = lambda leaf: leaf.of_width(int(leaf.rank.max())) if _is_ranked(leaf) else leaf
  return jax.tree.map(cut, adapter, is_leaf=_is_node)


def unmerge(merged: Params, params: Params) -> Params:
  """Undoes `merge`: `params`' adapters around base = merged − s·(b a)ᵀ, equal up to rounding.

  Args:
    merged: the dense tree `merge(params)` gave.
    params: the attached tree; the values of its base arrays are not read.
  """

  def undo(leaf: Any, tied: Any, dense: Any) -> Any:
    if is_tied(leaf):
      return leaf
    return leaf.replace(base=tied.unmerged(dense)) if isinstance(leaf, Adapted) else dense

  own, tied = (shared.without(x) for x in (params, tree.tie(params)))
  undone = jax.tree.map(undo, own, tied, merged, is_leaf=lambda n: paths.is_leaf(n) or is_tied(n))
  return shared.add(undone, shared.nodes(params))
