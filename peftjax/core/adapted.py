"""`Adapted`: a weight that a method put around another one, and checks on what it may go around."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import PartitionSpec as P

from peftjax.core.weight import Weight

SKIPS_DROPOUT = (
  "an adapter with dropout was used as a dense array, which would skip its dropout: the module "
  "that reads it is not one that peftjax.linen bridges.\n"
  "Write dropout=0.0 for its method, or call peftjax.core.einsum.einsum in that module."
)


class Adapted(Weight):
  """A weight with the shape and dtype of its `base`.

  Other files may ask every adapted weight for the attributes below `base`. Subclasses that
  have them make them fields, and override the functions that go with them.

  Attributes:
    base: the pretrained weight, an array or any `Weight`.
    rank: `[*stack]` int32, the true rank of each layer where rows are padded to a common one.
    key: `[*stack]` keys of the dropout on the branch's input while training, else None.
    dropout: rate of that dropout.
    of: the path of the leaf or shared node whose arrays it borrows; "" for none.
    residual: `base` is no longer the pretrained array.
  """

  base: Any

  # Children that a method trains.
  trained: ClassVar[frozenset[str]] = frozenset()
  # Children with an axis of the rank, padded where layers or adapters differ in rank; which axis.
  ranked: ClassVar[Mapping[str, int]] = {}

  rank = None
  key = None
  dropout = 0.0
  of = ""
  residual = False

  @property
  def rates(self) -> Mapping[str, float]:
    """The factor of each child that learns faster than the optimizer's rate."""
    return {}

  @property
  def width(self) -> int:
    """The rank that the children are padded to; 0 without any."""
    arrays = ((getattr(self, name), axis) for name, axis in self.ranked.items())
    return next((x.shape[axis] for x, axis in arrays if x is not None), 0)

  def of_width(self, width: int) -> Adapted:
    """The same weight with its ranked children padded by zeros, or cut, to `width`."""

    def fitted(x: jax.Array, axis: int) -> jax.Array:
      more = [(0, 0)] * x.ndim
      more[axis] = (0, max(0, width - x.shape[axis]))
      return jax.lax.slice_in_dim(jnp.pad(x, more), 0, width, axis=axis)

    given = {name: (getattr(self, name), axis) for name, axis in self.ranked.items()}
    return self.replace(**{k: fitted(x, i) for k, (x, i) in given.items() if x is not None})

  def ranked_size(self) -> int:
    """The number of parameters in the ranked children that are present, padding left out."""
    here = [(x, i) for name, i in self.ranked.items() if (x := getattr(self, name)) is not None]
    if not isinstance(self.rank, (jax.Array, np.ndarray)):
      return sum(math.prod(x.shape) for x, _ in here)
    row = lambda x, axis: math.prod(x.shape) // max(self.rank.size * x.shape[axis], 1)
    return sum(int(np.sum(self.rank)) * row(x, axis) for x, axis in here)

  def trained_mask(self, frozen: frozenset[str] = frozenset()) -> Adapted:
    """This node with True on the arrays of its children that are `trained` and not `frozen`."""
    mask = jax.tree.map(lambda _: False, self)
    chosen = {name: getattr(self, name) for name in self.trained - frozen}
    return mask.replace(**{k: jax.tree.map(lambda _: True, x) for k, x in chosen.items()})

  def at_own_rates(self) -> Adapted:
    """This node of updates with each child times its rate."""
    return self.replace(**{name: rate * getattr(self, name) for name, rate in self.rates.items()})

  def with_ranks(self, part: Any) -> Any:
    """`part`, a half of this weight that `partition` made, with the recorded rank."""
    return part if self.rank is None else part.replace(rank=self.rank)

  def with_key(self, key: jax.Array, path: str) -> Adapted:
    """This weight with a dropout key per layer; only called on weights that have a rate."""
    raise NotImplementedError

  def borrow(self, lender: Any) -> Adapted:
    """This weight with the arrays that it uses of `lender`; only called on weights with an `of`."""
    raise NotImplementedError

  def unmerged(self, dense: jax.Array) -> jax.Array:
    """The base that this adapter was merged into: the inverse of `materialize`."""
    raise NotImplementedError

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
    """The number of parameters of the base; 0 where it is not here."""
    return self.base.true_size() if isinstance(self.base, Weight) else getattr(self.base, "size", 0)

  def base_specs(self, spec: P) -> Any:
    """The partition specs of the base, if the dense array has `spec`."""
    return self.base.child_specs(spec) if isinstance(self.base, Weight) else spec


def check_bare(path: str, leaf: Any) -> None:
  """Raises ValueError if the leaf at `path` has an adapter; a quantised weight is not one."""
  if isinstance(leaf, Adapted):
    raise ValueError(f"{path} has an adapter already; merge it first: pj.merge(params)")


def lender(leaf: Any) -> str:
  """The path of the leaf or node that `leaf` borrows arrays from; "" for none."""
  return leaf.of if isinstance(leaf, Adapted) else ""


def axis_names(leaf: Any) -> tuple[str | None, ...] | None:
  """Names of the axes of a `Weight` or of the array in a Flax box, where a model annotated them."""
  return getattr(leaf, "names", None)  # boxes are of many classes, not all of which have names


def bare(leaf: Any) -> Any:
  """The array in a Flax box such as `nn.Partitioned`; any other leaf, a `Weight` too, as it is."""
  is_box = isinstance(leaf, meta.AxisMetadata) and not isinstance(leaf, Weight)
  return leaf.value if is_box else leaf
