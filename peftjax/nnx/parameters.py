"""`params`, `trainable` and `merge`: an adapted model as a plain tree, and without its adapters."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx, traverse_util

from peftjax.core import shared, tree
from peftjax.core.params import Mask
from peftjax.core.paths import leaves
from peftjax.nnx.adapted import restore
from peftjax.nnx.held import SUFFIX, Held, Trained

# Metadata of a variable that was made `Trained`: its former class.
WAS = "was"


def params(model: nnx.Module) -> Any:
  """The parameters as a dict of dicts of arrays and weights, as the rest of peftjax has them.

  `pj.describe(params, pj.nnx.trainable(model))`, `pj.merge(params)` and all that takes a tree of
  parameters works on it. It shares the model's arrays; writing to it changes no model.

  Raises:
    ValueError: if `model` is not an NNX module or has no `nnx.Param`.
  """
  check_model(model)
  flat = {path: x.get_value() for path, x in plain(model).items()}
  common = {}
  for path, held in held_in(model).items():
    if is_common(held):
      common[held.path] = held.node()
    else:
      at = kernel_of(path)
      flat[at] = held.node(flat.get(at))
  return shared.add(traverse_util.unflatten_dict(flat), common)


def trainable(model: nnx.Module) -> Mask:
  """A tree of booleans over the arrays of `params(model)`: True if a variable is `Trained`."""
  check_model(model)
  flat = {path: isinstance(x, Trained) for path, x in plain(model).items()}
  common = {}
  for path, held in held_in(model).items():
    if is_common(held):
      common[held.path] = held.mask()
    else:
      flat[kernel_of(path)] = held.mask()
  return shared.add(traverse_util.unflatten_dict(flat), common)


def merge(model: nnx.Module, *, dense: bool = False) -> nnx.Module:
  """The same model, in place, with ordinary parameters and classes, as `pj.merge` makes them.

  Args:
    model: adapted by `attach`.
    dense: dequantise quantised weights too, which makes them four to eight times as large.

  Raises:
    ValueError: on a quantised weight, unless `dense`.
  """
  whole = leaves(tree.merge(params(model), dense=dense))
  modules = dict(nnx.iter_modules(model))
  for path, held in held_in(model).items():
    if not is_common(held):
      *_, name = at = kernel_of(path)
      write(modules[path[:-1]], str(name), whole["/".join(map(str, at))])
  for path, x in plain(model).items():
    if isinstance(x, Trained):
      write(modules[path[:-1]], path[-1], x.get_value(), x.get_metadata().get(WAS, nnx.Param))
  detach(model)
  return model


def detach(model: nnx.Module) -> None:
  """Removes what `attach` put beside parameters, and gives all modules their classes back."""
  for _, module in list(nnx.iter_modules(model)):
    for name in [name for name, x in vars(module).items() if isinstance(x, Held)]:
      delattr(module, name)
    restore(module)


def write(module: nnx.Module, name: Any, array: jax.Array, kind: type | None = None) -> None:
  """Sets a module's parameter to an array, and its class to `kind` if that is given."""
  now = vars(module).get(name)
  if now is None:
    setattr(module, name, nnx.Param(array))
  elif kind is None:
    now.set_raw_value(array)
  else:
    metadata = {k: x for k, x in now.get_metadata().items() if k != WAS}
    more = {WAS: type(now)} if issubclass(kind, Trained) else {}
    setattr(module, name, kind.from_metadata(array, {**metadata, **more}))  # type: ignore[attr-defined]


def plain(model: nnx.Module) -> dict[tuple[Any, ...], nnx.Variable]:
  """The model's own parameters by path: those with nothing around them, and the arrays that
  weights are around.
  """
  held = held_in(model)
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {path: x for path, x in flat if path[:-1] not in held}


def held_in(model: nnx.Module) -> dict[tuple[Any, ...], Held]:
  """The `Held` nodes in a model, by path."""
  return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Held)}


def is_common(held: Held) -> bool:
  """Tells whether a `Held` is a node that weights share."""
  return held.path.startswith(f"{shared.GROUP}/")


def kernel_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
  """The path of the parameter that a `Held` is around."""
  return (*path[:-1], str(path[-1]).removesuffix(SUFFIX))


def check_model(model: Any) -> None:
  """Raises ValueError unless `model` is an NNX module with a parameter."""
  if not isinstance(model, nnx.Module):
    what = f"{type(model).__module__}.{type(model).__name__}"
    raise ValueError(f"pj.nnx takes a flax.nnx.Module, not a {what}; see pj.apply for linen")
  if not nnx.to_flat_state(nnx.state(model, nnx.Param)):
    raise ValueError(
      f"{type(model).__name__} has no nnx.Param, and only those can be adapted; write its arrays "
      "as nnx.Param(array)"
    )
