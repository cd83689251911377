"""The protocol of a method, and `chain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import optax

from peftjax import optim
from peftjax.core import given, paths, ranges
from peftjax.core.adapted import Adapted
from peftjax.core.layout import Layout
from peftjax.core.params import Mask, Params
from peftjax.core.ranges import Positive, Size, checked
from peftjax.methods.codec import Codec

# Takes clipping and an optimizer; gives one that does both and more.
Outer = Callable[
  [optax.GradientTransformation, optax.GradientTransformation], optax.GradientTransformation
]


class Method:
  """A parameter-efficient method: a pure transform of a parameter tree, and its trained leaves.

  A method is a frozen dataclass, and its constructor is what users call: every hyper-parameter is a
  field, with its range (`core.ranges`) and its default, and nothing else declares it. A field
  called `seed` is given the run's by `experiments.train`, and is not a field of a config.
  """

  # The form of its leaves in directories of Hugging Face's PEFT library; None if there is none.
  codec: ClassVar[Codec | None] = None

  def __post_init__(self) -> None:
    """Checks the fields against their annotations; lists become tuples, mappings copies.

    Raises:
      ValueError: naming the first field that does not fit.
    """
    ranges.check(type(self), vars(self))
    for name, value in list(vars(self).items()):
      if isinstance(value, list | Mapping):
        copy = tuple(value) if isinstance(value, list) else dict(value)
        object.__setattr__(self, name, copy)

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    """Paths of the leaves this method changes or trains; raises if its rules match nothing.

    Args:
      params: before or after `attach`.
      layout: axes of the kernels, which tell what is linear in a model with other names.
    """
    raise NotImplementedError

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    """`params` with the claimed leaves replaced; the model's outputs stay as they were."""
    raise NotImplementedError

  def trainable(self, params: Params) -> Mask:
    """A tree of booleans over the arrays of attached `params`."""
    raise NotImplementedError

  def outer(self, total_steps: int) -> Outer | None:
    """The transform around clipping and the optimizer: `outer(clip, tx)`; None for nothing."""
    return None

  def settled(self, total_steps: int) -> int:
    """The update from which on the model has the size that it will keep."""
    return 0

  def varies(self) -> frozenset[str]:
    """Fields that may differ between runs trained by one compiled step: they are arrays of it,
    or sizes that `align_ranks` makes equal.
    """
    return frozenset()

  def summary(self, params: Params) -> dict[str, Any]:
    """A report on trained `params` for a run's result, for JSON."""
    return {}

  def peft_options(self) -> dict[str, Any]:
    """Arguments of `hf_peft.save` that leaves do not tell."""
    return {}

  @checked
  def optimizer(
    self,
    tx: optax.GradientTransformation,
    total_steps: Size,
    *,
    clip_norm: Positive | None = None,
    accumulate: Size = 1,
    batches: Size | None = None,
  ) -> optax.GradientTransformationExtraArgs:
    """The outermost transform: clips, accumulates, and whatever the method adds.

    Args:
      tx: the optimizer of the updates, without clipping or accumulation of its own.
      total_steps: updates in all: with `accumulate`, calls divided by it, rounded up.
      clip_norm: limit of the global norm of the mean gradient, a method's penalty included.
      accumulate: calls per update. Give each the gradient of its batch's mean loss, and how many
        tokens (rows) that is a mean of: `tx.update(grads, state, params, weight=count)`. The update
        is then that of one large batch; without `weight` batches count alike, however many tokens
        they have (`optim.accumulated`).
      batches: calls in all, where `accumulate` does not divide them: the last makes an update of
        what is left.

    Raises:
      ValueError: on a number out of range, or `batches` that are not `total_steps` updates; from
        its init, on a whole tree in place of its trained half.
    """
    if batches is not None and (updates := -(-batches // accumulate)) != total_steps:
      raise ValueError(
        f"{batches} batches, {accumulate} to an update, are {updates} updates and not "
        f"total_steps={total_steps}"
      )
    outer = self.outer(total_steps)
    tx = optim.wrap(tx, clip_norm=clip_norm, accumulate=accumulate, batches=batches, outer=outer)

    def init(train: Any) -> Any:
      self._check_half(train)
      return tx.init(train)

    return optax.GradientTransformationExtraArgs(init, tx.update)

  def _check_half(self, train: Any) -> None:
    """Raises ValueError if `train` is a whole model of which this method trains only a part."""
    if given.first_hole(train) is not None:
      return
    try:
      mask = self.trainable(train)
    except ValueError:  # nothing can be said of a tree that is not a model's
      return
    frozen = [path for path, trained in jax.tree_util.tree_leaves_with_path(mask) if not trained]
    if frozen:
      raise ValueError(
        f"this is the whole tree: {paths.name(frozen[0])} is not trained. Write train, frozen = "
        "pj.partition(params, method.trainable(params)) and tx.init(train)"
      )


@dataclasses.dataclass(frozen=True)
class Chain(Method):
  """Several methods on disjoint leaves; see `chain`."""

  methods: tuple[Method, ...]

  def claims(self, params: Params, layout: Layout | None = None) -> list[str]:
    owner: dict[str, Method] = {}
    for method in self.methods:
      for path in method.claims(params, layout):
        if path in owner:
          raise ValueError(
            f"two methods claim {path}:\n  {owner[path]}\n  {method}\n"
            "Every leaf belongs to one method: narrow the targets of one of them."
          )
        owner[path] = method
    return list(owner)

  def attach(self, key: jax.Array, params: Params, layout: Layout | None = None) -> Params:
    self.claims(params, layout)
    for method in self.methods:
      params = method.attach(key, params, layout)
    return params

  def trainable(self, params: Params) -> Mask:
    masks = [method.trainable(params) for method in self.methods]
    return jax.tree.map(lambda *ms: any(ms), *masks)

  def outer(self, total_steps: int) -> Outer | None:
    """The transform of the one method that has one."""
    found = [(m, outer) for m in self.methods if (outer := m.outer(total_steps)) is not None]
    if len(found) > 1:
      names = "\n  ".join(str(method) for method, _ in found)
      raise ValueError(
        f"each of these methods has to be the outermost optimizer:\n  {names}\n"
        "Write one of them with the targets of both."
      )
    return found[0][1] if found else None

  def settled(self, total_steps: int) -> int:
    return max((method.settled(total_steps) for method in self.methods), default=0)

  def summary(self, params: Params) -> dict[str, Any]:
    return {k: v for method in self.methods for k, v in method.summary(params).items()}

  def peft_options(self) -> dict[str, Any]:
    return {k: v for method in self.methods for k, v in method.peft_options().items()}


def chain(*methods: Method) -> Chain:
  """Methods on disjoint leaves as one: each attaches its own, and the union is trained.

  Raises (at `attach`):
    ValueError: if two of them claim one leaf.
  """
  return Chain(methods)


def claimed_mask(method: Method, params: Params) -> Mask:
  """True on the arrays of the leaves that a method claims."""
  claimed = set(method.claims(params))
  return paths.map_leaves(lambda path, leaf: jax.tree.map(lambda _: path in claimed, leaf), params)


def trainable_mask(params: Params, claimed: set[str], frozen: frozenset[str] = frozenset()) -> Mask:
  """True on the children that are `trained`, and not `frozen`, of the claimed weights."""

  def of(path: str, leaf: Any) -> Any:
    if path in claimed and isinstance(leaf, Adapted):
      return leaf.trained_mask(frozen)
    return jax.tree.map(lambda _: False, leaf)

  return paths.map_leaves(of, params)
