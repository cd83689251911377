"""`factored`: any function of parameter trees with weights in them, computed with their factors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from peftjax.core import paths, shared, tracing, tree
from peftjax.core.adapted import lender
from peftjax.core.attachment import attachments
from peftjax.core.evaluate import evaluate
from peftjax.core.view import Uses, View, dense
from peftjax.core.weight import is_weight


def factored(fn: Callable[..., Any], *, dropout_key: jax.Array | None = None) -> Callable[..., Any]:
  """`fn` for arguments in which any array of a parameter tree may be a `Weight`.

  `fn` is traced with the dense arrays' shapes and evaluated equation by equation, so it needs to
  know nothing of weights: a Flax module of any kind, an Equinox module, a function of your own.
  Products, convolutions and lookups use the factors, through casts, transposes, reshapes, slices of
  a stack, `jit`, `vmap`, `scan`, `while_loop`, `cond` and `checkpoint`. Whatever else is done to a
  weight is done to its dense array (`pj.describe` names it); a `custom_vjp` of yours that is given
  one stays in force. Call it within `jax.jit`: it traces `fn` at every call.

  Args:
    fn: a function that could be traced by `jax.jit` and returns arrays.
    dropout_key: turns on the dropout of adapters; a new one for every step.

  Raises (when called):
    ValueError: if a weight with dropout is used as a dense array while training; if the arguments
      hold a bottleneck adapter, prefix or prompt, which change no weight.
  """

  @functools.wraps(fn)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    if found := attachments((args, kwargs)):
      raise ValueError(
        f"{type(found[0]).__name__} changes a Flax module's result, not a weight: call "
        "pj.apply(model, params, ...)"
      )
    args, kwargs = _prepared((args, kwargs), dropout_key)
    with tracing.within(lent=shared.nodes(_shared(args, kwargs))):
      return traced(fn, Uses(), *args, **kwargs)

  return wrapped


def traced(fn: Callable[..., Any], uses: Uses, *args: Any, **kwargs: Any) -> Any:
  """`fn(*args, **kwargs)` computed with the factors of the weights among its arguments.

  Args:
    fn: a function that could be traced by `jax.jit`.
    uses: records what became of each weight.
    *args, **kwargs: its arguments. One that is neither an array nor a `Weight` is passed on as is.
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
  leaves = [leaf for _, leaf in flat]
  given = [i for i, leaf in enumerate(leaves) if is_weight(leaf) or _is_array(leaf)]
  rest: list[Any] = []  # the parts of the result that are no arrays, and their places

  def of_arrays(*arrays: Any) -> list[Any]:
    full = list(leaves)
    for i, x in zip(given, arrays, strict=True):
      full[i] = x
    args, kwargs = jax.tree.unflatten(treedef, full)
    results, out_tree = jax.tree.flatten(fn(*args, **kwargs))
    rest[:] = [out_tree, [None if _is_array(x) else x for x in results]]
    return [x for x in results if _is_array(x)]

  shape_of = lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype)
  avals = [shape_of(leaves[i]) if is_weight(leaves[i]) else leaves[i] for i in given]
  closed = jax.make_jaxpr(of_arrays)(*avals)
  seen = [
    View.whole(leaves[i], _name(flat[i][0]), uses) if is_weight(leaves[i]) else leaves[i]
    for i in given
  ]
  arrays = iter([dense(x, "return") for x in evaluate(closed.jaxpr, closed.consts, seen)])
  out_tree, static = rest
  return jax.tree.unflatten(out_tree, [next(arrays) if x is None else x for x in static])


def _name(path: tuple[Any, ...]) -> str:
  """The path of a leaf within its argument."""
  return paths.name(path[2:]) or paths.name(path[1:])


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _prepared(args: Any, key: jax.Array | None) -> Any:
  """The arguments; weights in every tree get the arrays they borrow, and their keys."""

  def of(argument: Any) -> Any:
    leaves = paths.leaves(argument).values()
    if any(lender(leaf) for leaf in leaves):
      argument = tree.tie(argument, spread=False)
    return argument if key is None else tree.with_dropout_keys(argument, key)

  args, kwargs = args
  return tuple(map(of, args)), {name: of(value) for name, value in kwargs.items()}


def _shared(args: Any, kwargs: Any) -> Any:
  """The first argument that has nodes which weights borrow from."""
  return next((tree for tree in (*args, *kwargs.values()) if shared.nodes(tree)), {})
