"""`Attachment`: arrays that a method puts beside a module's parameters, and how it uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax


class Attachment(flax.struct.PyTreeNode):
  """A node among the parameters of a linen module; all of its arrays were made by a method.

  It lies in the module's own parameters, so `nn.scan` slices it and `nn.remat` carries it along.
  Unlike a `Weight` it stands for no dense array, so it cannot be merged.
  """

  def true_size(self) -> int:
    """The number of parameters that are here (not None)."""
    return sum(x.size for x in jax.tree.leaves(self))

  def around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """The module's result; `call(*args, **kwargs)` is its result without the attachment."""
    raise NotImplementedError


def is_attachment(node: Any) -> bool:
  return isinstance(node, Attachment)


def attachments(params: Any) -> list[Attachment]:
  """Every attachment in a tree."""
  return [n for n in jax.tree.leaves(params, is_leaf=is_attachment) if is_attachment(n)]
