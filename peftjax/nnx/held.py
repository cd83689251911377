"""`Held`: a method's node around a parameter, as a module beside it with a variable per array."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core import paths
from peftjax.core.adapted import Adapted
from peftjax.core.params import Mask
from peftjax.core.weight import Weight

# A parameter `kernel` has it at `kernel_adapter`; the shared node "shared/vera" is the model's
# `shared_vera`.
SUFFIX = "_adapter"


class Trained(nnx.LoRAParam):
  """An array that a method trains: what `nnx.DiffState` and `nnx.Optimizer(wrt=...)` filter on."""


class Fixed(nnx.Param):
  """An array that a method made and does not train: scales, ranks, random factors.

  It is a `nnx.Param` so that scans and maps over layers take it apart as they do the factors.
  """


# The pretrained parameters, dense or quantised: a filter for `nnx.state` and `nnx.split`.
base = nnx.All(nnx.Param, nnx.Not(nnx.Any(nnx.LoRAParam, Fixed)))


@dataclasses.dataclass(frozen=True)
class Form:
  """All of a node except its arrays.

  Attributes:
    treedef: tree structure of the node, without the plain array that it is around, if there is one.
    names: names of its arrays, from their fields, as `a`, `b`, `scale` or `base_codes`.
    trained: which of them a method trains.
    borrowed: names of arrays that are copies of a shared node's.
    around: True if it is around a plain array, which lies at its path.
  """

  treedef: Any
  names: tuple[str, ...]
  trained: tuple[bool, ...]
  borrowed: tuple[str, ...]
  around: bool

  def node(self, arrays: Mapping[str, Any], base: Any = None) -> Any:
    """The node with arrays by name, None for those that are not there, around `base`."""
    node = jax.tree.unflatten(self.treedef, [arrays.get(name) for name in self.names])
    return node.replace(base=base) if self.around else node


def named(node: Any) -> dict[str, Any]:
  """The arrays of a node by name."""
  flat, _ = jax.tree_util.tree_flatten_with_path(node)
  return {paths.name(keys).replace("/", "_"): x for keys, x in flat}


class Held(nnx.Module):
  """A `Weight`, or a node that weights share, without the plain array that it is around.

  Its arrays are variables, attributes by the names of `form`.

  A shared node is there once, and weights that use it have it as `lender`. But a stack of layers,
  of which a scan or a map takes all variables apart, has a copy for each layer.

  Attributes:
    path: path of the parameter in the tree of `params`.
    form: all else of the node.
    owned: True if only a method's optimizer may train it; see `optimizer.optimizer`.
    deterministic: without dropout; only where there is a rate. `model.train()` and `model.eval()`
      set it.
  """

  def __init__(
    self,
    path: str,
    node: Any,
    mask: Mask,
    key: jax.Array | None = None,
    lender: Held | None = None,
  ):
    """Splits a node.

    Args:
      path: path of the parameter.
      node: a `Weight` or `Shared`.
      mask: like it, true on trained arrays.
      key: random key of the adapters' dropout.
      lender: the shared node whose arrays it uses.
    """
    if lender is not None and node.stack:
      node = _borrowing(node, lender)
    elif lender is not None:
      self.lender = lender
    around = isinstance(node, Adapted) and not isinstance(node.base, Weight)
    rest = node.replace(base=None) if around else node
    arrays, flags = named(rest), named(mask)
    trained = tuple(bool(flags.get(name)) for name in arrays)
    borrowed = tuple(name for name in arrays if name not in flags)
    self.path = path
    self.form = Form(jax.tree.structure(rest), tuple(arrays), trained, borrowed, around)
    for name, x in arrays.items():
      made = nnx.Param if _is_base(name, node) else Fixed
      setattr(self, name, Trained(x) if flags.get(name) else made(x))
    self.owned = not isinstance(node, Adapted) or not (node.owned or node.rates)
    if isinstance(node, Adapted) and node.dropout:
      self.deterministic = False
      if key is not None:
        keyed: Any = node.with_key(key, path)
        self.dropout_key = Fixed(jax.random.key_data(keyed.key))
        self.draws = Fixed(jnp.zeros(node.stack, jnp.uint32))

  def arrays(self) -> dict[str, Any]:
    """The arrays in the variables, by name."""
    return {name: getattr(self, name).get_value() for name in self.form.names}

  def node(self, base: Any = None) -> Any:
    """The weight, around `base` where that lies at `path`, or the shared node.

    Borrowed arrays are not in it.
    """
    arrays = self.arrays()
    own = {name: x for name, x in arrays.items() if name not in self.form.borrowed}
    return self.form.node(own, base)

  def mask(self) -> Any:
    """A mask like the node, true on trained arrays."""
    both = zip(self.form.names, self.form.trained, strict=True)
    own = {name: flag for name, flag in both if name not in self.form.borrowed}
    return self.form.node(own, False)

  def weight(self, base: Any) -> Any:
    """The weight for one use: with a new key for its dropout, and with all that it borrows.

    Raises (when differentiated):
      ValueError: if only the optimizer of its own method may train it, and none was made.
    """
    arrays = self.arrays()
    if not self.owned:
      both = zip(self.form.names, self.form.trained, strict=True)
      arrays |= {name: _unowned(self.path, arrays[name]) for name, trained in both if trained}
    weight = self.form.node(arrays, base)
    if (lender := getattr(self, "lender", None)) is not None:
      weight = weight.borrow(lender.node())
    if getattr(self, "deterministic", True):
      return weight
    draws = self.draws.get_value()
    self.draws.set_value(draws + 1)
    keys = jax.random.wrap_key_data(self.dropout_key.get_value())
    fold = functools.reduce(lambda f, _: jax.vmap(f), range(draws.ndim), jax.random.fold_in)
    return weight.replace(key=fold(keys, draws))


def _borrowing(node: Any, lender: Held) -> Any:
  """A weight with its own copy of the arrays it uses of a shared node."""
  borrow = lambda node, common: node.borrow(common)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(node)):
    return jax.eval_shape(borrow, node, lender.node())
  return borrow(node, lender.node())


def _is_base(name: str, node: Any) -> bool:
  """Tells whether a child is from pretrained files: the codes and scales of a quantised base."""
  first = name.split("_")[0]
  return first == "base" if isinstance(node, Adapted) else first in getattr(node, "pretrained", ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unowned(path: str, x: jax.Array) -> jax.Array:
  return x


def _no_gradient(path: str, _: Any, gradient: Any) -> Any:
  raise ValueError(
    f"{path} is to be trained by the optimizer of its own method alone, which was not made; write "
    "tx = pj.nnx.optimizer(model, method.optimizer(tx, total_steps)) before taking gradients"
  )


_unowned.defvjp(lambda path, x: (x, None), _no_gradient)
