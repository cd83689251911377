"""Adapters of one base in one tree: row i of a batch is computed with adapter i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.core.adapted import Adapted, lender
from peftjax.core.attachment import attachments
from peftjax.core.params import Params
from peftjax.core.per_row import PerRow
from peftjax.methods.ia3_weight import IA3
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.swap import align_ranks, cut_ranks
from peftjax.methods.vera_weight import VeRA

KINDS = (LoRA, VeRA, IA3)  # and the kinds derived from LoRA: DoRA, AdaLoRA


def stack_adapters(adapters: Sequence[Params]) -> Params:
  """One tree of N adapters on one base, in which each row of a batch has its own.

      stacked = pj.stack_adapters([params_1, params_2, params_3])
      logits = pj.apply(model, stacked, tokens, rows=[0, 2, 2, 1])
      new, counts = pj.generate(model, stacked, prompts, rows=[0, 2, 2, 1], max_new_tokens=20)

  Row i is computed with adapter `rows[i]`; without `rows` there is a row for each adapter. The base
  is that of the first tree, is there once, and multiplies all rows at once; factors are gathered by
  row, A to `[B, R, in]` and B to `[B, out, R]`. The result is a parameter tree: `method.trainable`,
  `pj.partition` and `pj.combine` take it, and adapters that no row has get gradients of zero.

  Args:
    adapters: whole trees, at least two, with adapters on the same weights: LoRA with all its
      options, DoRA, AdaLoRA, VeRA or IA3. Ranks and scales may differ.

  Raises:
    ValueError: fewer than two trees; trees without adapters or with those of other methods; trees
      that differ in more than their adapters, or in more of these than numbers, rank and scale.
  """
  trees = _checked(adapters)
  first, *others = align_ranks(*trees)

  def join(path: Any, leaf: Any, *more: Any) -> Any:
    where = paths.name(path)
    if not isinstance(leaf, Adapted):
      check_same(where, [leaf, *more])
      return leaf
    check_same(where, [x.base for x in (leaf, *more)])
    return _joined([leaf, *more])

  return jax.tree_util.tree_map_with_path(join, first, *others, is_leaf=paths.is_leaf)


def unstack_adapters(params: Params) -> list[Any]:
  """Undoes `stack_adapters`: a tree for each adapter, around the one base."""
  counts = [x.count for x in paths.leaves(params).values() if _is_joined(x) and not lender(x)]
  if not counts:
    counts = [x.count for x in paths.leaves(params).values() if _is_joined(x)]
  if not counts:
    raise ValueError("these parameters have no stacked adapters; see pj.stack_adapters")
  take = lambda i: lambda _, leaf: leaf.one(i) if _is_joined(leaf) else leaf
  return [cut_ranks(paths.map_leaves(take(i), params)) for i in range(counts[0])]


def check_same(path: str, arrays: Sequence[Any]) -> None:
  """Raises ValueError unless several trees have the same at `path`: one object, or equal values."""
  first = jax.tree.leaves(arrays[0])
  form: Any = jax.tree.structure(arrays[0])
  for i, other in enumerate(arrays[1:], 2):
    alike = form == jax.tree.structure(other)
    if not alike or not all(map(_equal, first, jax.tree.leaves(other))):
      raise ValueError(
        f"at {path} tree {i} has other pretrained or trained arrays than the first, and only "
        "adapters may differ: attach or load all of them on one tree, pj.load_peft(folder, params, "
        "model), and leave other parameters as they are"
      )


def _is_joined(leaf: Any) -> bool:
  return isinstance(leaf, PerRow)


def _checked(adapters: Any) -> list[Any]:
  if not isinstance(adapters, Sequence) or len(adapters) < 2:
    count = len(adapters) if isinstance(adapters, Sequence) else f"a {type(adapters).__name__}"
    raise ValueError(
      f"stack_adapters takes a list of two or more parameter trees and got {count}; a single one "
      "needs no stack: pj.apply(model, params, ...)"
    )
  for i, params in enumerate(adapters, 1):
    beside = [type(node).__name__ for node in attachments(params)]
    flat = {p: x for p, x in paths.leaves(params).items() if isinstance(x, Adapted)}
    other = beside + [type(x).__name__ for x in flat.values() if not isinstance(x, KINDS)]
    if other:
      raise ValueError(
        f"tree {i} has adapters of the kind {other[0]}, which cannot differ by row; those of LoRA, "
        "DoRA, AdaLoRA, VeRA and IA3 can"
      )
    if not flat:
      raise ValueError(
        f"tree {i} has no adapters; write method.attach(key, params) or "
        "pj.load_peft(folder, params, model)"
      )
    if bare := [path for path, x in flat.items() if x.base is None]:
      raise ValueError(
        f"tree {i} lacks the base of {bare[0]}; give whole trees: pj.combine(adapter, base)"
      )
  return list(adapters)


def _joined(leaves: Sequence[Any]) -> PerRow:
  """The same weight of several trees as one, around the first's base."""
  first = leaves[0]
  at = len(first.axes.stack(first.shape))
  own = [leaf.replace(base=None) for leaf in leaves]
  stack = lambda *trees: jax.tree.map(lambda *xs: jnp.stack(xs, at), *trees)
  abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(own))
  made = jax.eval_shape(stack, *own) if abstract else stack(*own)
  return PerRow(base=first.base, adapters=made, names=first.names)


def _equal(x: Any, y: Any) -> bool:
  if x is y:
    return True
  if (x.shape, x.dtype) != (y.shape, y.dtype):
    return False
  if isinstance(x, jax.ShapeDtypeStruct) or isinstance(y, jax.ShapeDtypeStruct):
    return type(x) is type(y)
  unknown = isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer)
  return not unknown and np.array_equal(np.asarray(x), np.asarray(y))
