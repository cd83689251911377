"""Checks of given parameters and inputs that name frequent mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from peftjax.core.adapted import Adapted, bare
from peftjax.core.attachment import is_attachment
from peftjax.core.params import Params
from peftjax.core.shared import is_shared
from peftjax.core.weight import Weight


def check_params(params: Params) -> None:
  """Raises ValueError if `params` are a module's variables, or hold torch tensors or objects."""
  if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
    raise ValueError(
      'this is a module\'s dict of collections, {"params": ...}, and not its parameters: write '
      'variables["params"]'
    )
  for path, leaf in _leaves(params):
    check_array(path, bare(leaf))


def check_array(what: str, array: Any) -> None:
  """Raises ValueError if `array` is a tensor of torch or holds Python objects."""
  if isinstance(array, Weight):
    return
  if type(array).__module__.partition(".")[0] == "torch":
    raise ValueError(
      f"{what} is a tensor of torch, which JAX does not take: write jnp.asarray(x.numpy())"
    )
  if isinstance(array, np.ndarray) and array.dtype == object:
    raise ValueError(
      f"{what} is an array of Python objects {array.shape}: rows of different lengths, or values "
      "that are not numbers. Write np.asarray(x, np.float32), or np.int32 for ids"
    )


def first_hole(params: Params) -> str | None:
  """The path of a leaf that `partition` has left out; None if the tree is whole."""
  for path, leaf in _leaves(params):
    if leaf is None:
      return path
    if isinstance(leaf, Adapted) and not leaf.of:
      # A weight may well have only some of the arrays that can be trained.
      trained = [getattr(leaf, name) for name in leaf.trained]
      if leaf.base is None or (trained and all(x is None for x in trained)):
        return f"{path} ({'base' if leaf.base is None else ', '.join(sorted(leaf.trained))})"
  return None


def _leaves(params: Any) -> list[tuple[str, Any]]:
  """Every leaf with its path; a weight, an attachment or a None counts as one."""
  whole = lambda x: x is None or isinstance(x, Weight) or is_attachment(x) or is_shared(x)
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=whole)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]
