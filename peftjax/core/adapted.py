"""`Adapted`: a weight that a method put around another one, and what it can be put around."""

from __future__ import annotations

from typing import Any

from flax.core import meta
from jax.sharding import PartitionSpec as P

from peftjax.core.weight import Weight


class Adapted(Weight):
  """A weight with the shape and dtype of its `base`.

  Attributes:
    base: the pretrained weight, an array or any `Weight`.
  """

  base: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def quantised(self) -> bool:
    return isinstance(self.base, Weight) and self.base.quantised

  @property
  def cuts(self) -> tuple[int, ...]:
    return self.base.cuts if isinstance(self.base, Weight) else self.shape

  def base_size(self) -> int:
    """Parameters of the base, 0 where it is not here."""
    return self.base.true_size() if isinstance(self.base, Weight) else getattr(self.base, "size", 0)

  def base_specs(self, spec: P) -> Any:
    """Where the base lies, if the dense array lies as `spec` says."""
    return self.base.child_specs(spec) if isinstance(self.base, Weight) else spec


def check_bare(path: str, leaf: Any) -> None:
  """Raises ValueError if the leaf at `path` has an adapter; a quantised weight has none."""
  if isinstance(leaf, Adapted):
    raise ValueError(f"{path} has an adapter already; merge it first: pj.merge(params)")


def bare(leaf: Any) -> Any:
  """The array in a Flax box such as `nn.Partitioned`; any other leaf, a `Weight` too, as it is."""
  is_box = isinstance(leaf, meta.AxisMetadata) and not isinstance(leaf, Weight)
  return leaf.value if is_box else leaf
