"""Splitting a parameter tree in two and putting it together again; the one-tree route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from peftjax.core import paths, shared, tied
from peftjax.core.adapted import Adapted, lender
from peftjax.core.attachment import Attachment, attachments, is_attachment
from peftjax.core.params import Mask, Params
from peftjax.core.tied import Tied, is_tied
from peftjax.core.weight import Weight, children, materialize


def partition(params: Params, mask: Mask) -> tuple[Params, Params]:
  """Two trees with `None` holes: the leaves where `mask` is true, and the rest.

  Differentiate, optimise, donate, checkpoint and `vmap` the first; pass the second to jit as an
  argument (a closure would bake it into the program as constants). `combine(*partition(p, m))`
  is `p` again. None of the arrays is copied.
  """
  chosen = jax.tree.map(lambda m, leaf: leaf if m else None, mask, params)
  rest = jax.tree.map(lambda m, leaf: None if m else leaf, mask, params)
  return chosen, rest


def combine(*trees: Params) -> Params:
  """One tree from trees whose `None` holes complement each other; the first non-`None` wins."""
  return jax.tree.map(
    lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
    *trees,
    is_leaf=lambda leaf: leaf is None,
  )


def tie(params: Params, *, spread: bool = True) -> Params:
  """`params` in which every weight that borrows arrays, of a leaf or a shared node, holds them.

  Such a weight names the lender in `of`, and its own children are None, so that an array that
  several weights use is trained, saved and counted once.

  Args:
    params: a tree of arrays and weights.
    spread: give a stack of layers the arrays of a shared node too, once for each; if not, they
      have to be lent by the call (`core.tracing`).

  Raises:
    ValueError: if a lender is not in `params`.
  """
  common = shared.nodes(params)
  lenders = {**paths.leaves(params), **common}

  def give(path: str, leaf: Any) -> Any:
    of = lender(leaf)
    if of and of not in lenders:
      raise ValueError(f"{path} uses arrays of {of}, which is not in this tree: pass all of it")
    if not of or (of in common and leaf.stack and not spread):
      return leaf
    return leaf.borrow(lenders[of])

  return paths.map_leaves(give, params)


def merge(params: Params, *, dense: bool = False) -> Params:
  """Ordinary arrays: every `Weight` replaced by the dense array it stands for.

  Arrays that weights shared (VeRA's projections) are left out. A head that is tied to an adapted
  table gets its own array, since the adapter changed the lookup alone: outputs stay what they were.

  Args:
    params: a tree of arrays and weights.
    dense: dequantise quantised weights too, which makes them four to eight times as large.

  Raises:
    ValueError: on a quantised weight, alone or under an adapter, unless `dense`; on nodes that
      stand for no dense array (bottleneck adapters, prefixes, prompts).
  """
  if found := attachments(params):
    raise ValueError(
      f"{type(found[0]).__name__} cannot be merged: it does not change a weight. Keep the adapted "
      "parameters and call pj.apply(model, params, ...)."
    )

  def of(path: str, leaf: Any) -> Any:
    if isinstance(leaf, Weight) and leaf.quantised and not dense:
      raise ValueError(
        f"{path} is quantised, and merging would make it dense. Write pj.merge(params, dense=True) "
        "for dense arrays, or pj.quant.requantize(params) to fold adapters into the codes; "
        "that changes the outputs, and it returns by how much."
      )
    return materialize(leaf)

  tables = paths.leaves(params)

  def head_of(path: str, head: Tied) -> Any:
    table = tables.get(head.of)
    return materialize(tied.kernel(table)) if isinstance(table, Adapted) else head

  return replace_tied(head_of, paths.map_leaves(of, shared.without(tie(params))))


def untie(params: Params) -> Params:
  """`params` with an array of its own, `[D, V]`, for every head that was tied to a table `[V, D]`.

  It is a copy of the table (of an adapted one, of its base), so outputs stay; both can then be
  adapted or trained apart. A quantised table gives a quantised head of the same values.

  Raises:
    ValueError: if the table of a tied head is not in `params`.
  """
  tables = paths.leaves(params)

  def of(path: str, head: Tied) -> Any:
    if head.of not in tables:
      raise ValueError(f"{path} is tied to {head.of}, which is not in this tree: pass all of it")
    return tied.kernel(tables[head.of])

  return replace_tied(of, params)


def replace_tied(fn: Callable[[str, Tied], Any], params: Params) -> Params:
  """`params` with `fn(path, head)` in place of every tied head."""
  give = lambda path, node: fn(paths.name(path), node) if is_tied(node) else node
  return jax.tree_util.tree_map_with_path(give, params, is_leaf=is_tied)


def made_mask(params: Params) -> Mask:
  """True on every array that `attach` made, False on every array the model came with."""

  def of(leaf: Any) -> Any:
    if not isinstance(leaf, Weight):
      return jax.tree.map(lambda _: is_made(leaf), leaf)
    return leaf.replace(
      **{
        field: of(child) if field in leaf.pretrained else jax.tree.map(lambda _: True, child)
        for field, child in children(leaf).items()
      }
    )

  is_made = lambda node: is_attachment(node) or shared.is_shared(node)
  return jax.tree.map(of, params, is_leaf=lambda node: paths.is_leaf(node) or is_made(node))


def adapter_mask(params: Params, trainable: Mask) -> Mask:
  """True on every array that differs from the pretrained files: made or trained arrays.

  `partition(params, adapter_mask(...))` splits a model into the arrays to save, or to swap
  between tasks, and the base that every task shares.
  """
  return jax.tree.map(lambda made, trained: made or trained, made_mask(params), trainable)


def value_and_grad(
  fn: Callable[..., Any], mask: Mask, *, has_aux: bool = False
) -> Callable[..., Any]:
  """`jax.value_and_grad(fn)` with respect to the leaves of its first argument where `mask` holds.

  The gradient is a tree with `None` on every other leaf: no gradient of a frozen array is
  computed, and packed integer leaves are fine.
  """

  def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
    train, frozen = partition(params, mask)
    inner = lambda t: fn(combine(t, frozen), *args, **kwargs)
    return jax.value_and_grad(inner, has_aux=has_aux)(train)

  return wrapped


def with_dropout_keys(params: Params, key: jax.Array | None) -> Params:
  """`params` with a key in every weight that has dropout.

  The key of a slice depends on its path alone (`paths.layer_paths`), so a scanned stack and its
  unrolled twin draw the same masks.

  Raises:
    ValueError: if a weight has dropout and `key` is None.
  """

  def give(path: str, leaf: Any) -> Any:
    if not isinstance(leaf, Adapted) or not leaf.dropout:
      return leaf
    if key is None:
      raise ValueError(
        f'{path} has dropout {leaf.dropout}, so training needs rngs={{"dropout": key}}; '
        "for evaluation leave train=False"
      )
    return leaf.with_key(key, path)

  return paths.map_leaves(give, params)


def count(params: Params, mask: Mask | None = None) -> int:
  """Number of parameters (where `mask` holds); padding rows of a stack are not counted.

  Counts what a model owner would: the arrays of the model and the factors a method trains, not
  scales, ranks and keys.
  """
  chosen = params if mask is None else partition(params, mask)[0]
  whole = lambda node: paths.is_leaf(node) or is_attachment(node)
  found = jax.tree.leaves(restore_ranks(chosen, params), is_leaf=whole)
  return sum(map(_true_size, found))


def restore_ranks(chosen: Params, params: Params) -> Params:
  """Puts each weight's recorded rank back into a tree that `partition` has taken it from."""
  fill = lambda c, p: p.with_ranks(c) if isinstance(p, Adapted) else c
  return jax.tree.map(fill, chosen, params, is_leaf=lambda n: n is None or paths.is_leaf(n))


def _true_size(leaf: Any) -> int:
  if isinstance(leaf, Weight | Attachment):
    return leaf.true_size()
  return sum(x.size for x in jax.tree.leaves(leaf))  # for a box, the arrays in it, if any
