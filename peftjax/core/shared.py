"""`Shared`: arrays that a method made once, and that many weights borrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct

# The top-level entry of a parameter tree that holds them, by name; linen modules ignore it.
GROUP = "shared"


class Shared(flax.struct.PyTreeNode):
  """A node beside the modules of a parameter tree; all of its arrays were made by a method.

  A `Weight` that borrows them says from where in `of`, as in "shared/vera", and is given them by
  `tree.tie`. So they are saved, sharded and counted once, however many weights use them.
  """


def is_shared(node: Any) -> bool:
  return isinstance(node, Shared)


def nodes(params: Any) -> dict[str, Shared]:
  """The shared nodes of a tree by path."""
  group = params.get(GROUP) if isinstance(params, Mapping) else None
  group = group if isinstance(group, Mapping) else {}
  return {f"{GROUP}/{name}": node for name, node in group.items() if is_shared(node)}


def add(params: Any, found: Mapping[str, Shared]) -> Any:
  """`params` with shared nodes added, by path.

  Raises:
    ValueError: if `params` is not a dict that could hold them.
  """
  if not found:
    return params
  if not isinstance(params, Mapping):
    raise ValueError(
      f"{', '.join(found)} lies beside the model's parameters, which have to be a dict of modules "
      f"then, and are a {type(params).__name__}"
    )
  named = {path.rpartition("/")[2]: node for path, node in found.items()}
  make: Any = type(params)  # dict, or a class like it
  return make({**params, GROUP: {**params.get(GROUP, {}), **named}})


def without(params: Any) -> Any:
  """`params` as the model knows them: no shared nodes, and no group that held nothing else."""
  if not nodes(params):
    return params
  group = {name: node for name, node in params[GROUP].items() if not is_shared(node)}
  rest = {name: child for name, child in params.items() if name != GROUP}
  return type(params)({**rest, GROUP: group} if group else rest)
