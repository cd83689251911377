"""Where the optimizer state lies on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.optim.adamw8bit import Moment
from peftjax.optim.paged import Page


def state_shardings(tx: Any, state: Any, params: Any, mesh: Mesh) -> Any:
  """A sharding for every array of `state`, which is `tx.init(params)`.

  An array of its parameter's shape (a moment, or the codes of one) lies as the parameter does;
  scales and counters are everywhere. Arrays of a `Page` stay in host memory.
  """
  everywhere = NamedSharding(mesh, P())

  def of(part: Any, param: Any) -> Any:
    def place(x: Any) -> Any:
      sharding = param.sharding if x.shape == param.shape else everywhere
      host = isinstance(part, Page) and len(x.shape) > 0
      return sharding.with_memory_kind("pinned_host") if host else sharding

    return jax.tree.map(place, part)

  return optax.tree_utils.tree_map_params(
    tx,
    of,
    state,
    params,
    transform_non_params=lambda _: everywhere,
    is_leaf=lambda node: isinstance(node, (Moment, Page)),
  )
