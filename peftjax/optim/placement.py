"""Where the optimizer state lies on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.optim.adamw8bit import Moment


def state_shardings(tx: Any, state: Any, params: Any, mesh: Mesh) -> Any:
  """A sharding for every array of `state`, which is `tx.init(params)`.

  An array of its parameter's shape (a moment, or the codes of one) lies as the parameter does;
  scales and counters are everywhere. What is in host memory (`paged`) stays there.
  """
  everywhere = NamedSharding(mesh, P())

  def place(x: Any, sharding: NamedSharding) -> NamedSharding:
    kind = None if x.sharding is None else x.sharding.memory_kind
    return sharding if kind is None else sharding.with_memory_kind(kind)

  def of(part: Any, param: Any) -> Any:
    return jax.tree.map(
      lambda x: place(x, param.sharding if x.shape == param.shape else everywhere), part
    )

  return optax.tree_utils.tree_map_params(
    tx,
    of,
    state,
    params,
    transform_non_params=lambda x: place(x, everywhere),
    is_leaf=lambda node: isinstance(node, Moment),
  )
