"""The places of the optimizer state on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.core import paths
from peftjax.core.params import Params


def state_shardings(state: Any, params: Params, mesh: Mesh) -> Any:
  """A sharding for every array of `state`, the optimizer state of `params`.

  An array that is kept under a parameter's path and has its shape (a moment, the codes of one, an
  average) has the parameter's sharding; scales and counters are replicated. Arrays in host memory
  (`paged`) stay there.
  """
  everywhere = NamedSharding(mesh, P())
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  of_path = {paths.name(path): x for path, x in flat}

  def place(path: Any, x: Any) -> NamedSharding:
    param = _owner(paths.name(path).split("/"), of_path)
    sharding = param.sharding if param is not None and param.shape == x.shape else everywhere
    kind = None if x.sharding is None else x.sharding.memory_kind
    return sharding if kind is None else sharding.with_memory_kind(kind)

  return jax.tree_util.tree_map_with_path(place, state)


def _owner(parts: list[str], of_path: dict[str, Any]) -> Any:
  """The parameter whose path is the longest within another one."""
  spans = ((i, j) for i in range(len(parts)) for j in range(len(parts), i, -1))
  found = (of_path.get("/".join(parts[i:j])) for i, j in spans)
  return next((param for param in found if param is not None), None)
