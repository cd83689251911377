"""`Tied`: the node of a parameter tree in place of a head that has no array of its own."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

from peftjax.core.adapted import Adapted, bare
from peftjax.core.weight import Weight


class Tied(flax.struct.PyTreeNode):
  """Stands where the kernel `[D, V]` of a head would: logits are those of a table `[V, D]`.

  It is a node without children and not a leaf, so every part of a partitioned tree has it, and it
  is not mapped, trained, saved, sharded or counted. Whether a model is tied is read off its
  parameters: put an array in its place (`tree.untie`) and the head has one of its own.

  An adapter on the table changes the lookup alone, as in PEFT: the head is that of its base.

  Attributes:
    of: the path of the table.
  """

  of: str = flax.struct.field(pytree_node=False)


def is_tied(node: Any) -> bool:
  return isinstance(node, Tied)


def kernel(table: Any) -> Any:
  """The head `[D, V]` of the table `[V, D]` that it is tied to; for an adapted table, of its base.

  A quantised table gives a quantised kernel of the same values, an abstract one an abstract one.

  Raises:
    ValueError: if the table is a weight that cannot be turned.
  """
  base = bare(table.base if isinstance(table, Adapted) else table)
  if isinstance(base, Weight):
    return base.transposed()
  if isinstance(base, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(base.shape[::-1], base.dtype)
  return base.T
