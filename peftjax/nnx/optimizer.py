"""`optimizer`: an optimizer of weights in the form of one for an NNX model's variables."""

from __future__ import annotations

from typing import Any

import optax
from flax import nnx, traverse_util

from peftjax import optim
from peftjax.core import paths
from peftjax.nnx.held import Form, named
from peftjax.nnx.parameters import check_model, held_in, is_common, kernel_of


def optimizer(
  model: nnx.Module, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """`tx`, which takes trees of weights, for `nnx.Optimizer(model, ..., wrt=pj.nnx.Trained)`.

  A method's own optimizer takes such trees: it is needed for AdaLoRA, whose allocator has to see
  all matrices, and for the two rates of LoRA+. Until it was made here, gradients of those weights
  raise. Other weights may be trained by any optimizer, without this.

  Args:
    model: adapted by `attach`.
    tx: `method.optimizer(optax.adamw(1e-3), total_steps)`, of the method that was attached.

  Raises (when its state is made):
    ValueError: on an AdaLoRA weight, if `tx` is not from its method.
  """
  check_model(model)
  held = {path: x for path, x in held_in(model).items() if not is_common(x)}
  forms = {path: x.form for path, x in held.items()}
  tx = optax.with_extra_args_support(tx)
  for x in held.values():
    x.owned = True

  def init(state: Any) -> Any:
    train = _tree(state, forms)
    made = tx.init(train)
    optim.check_owned(train, made)
    return made

  def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    train = None if params is None else _tree(params, forms)
    updates, state = tx.update(_tree(grads, forms), state, train, **extra)
    return _like(grads, updates, forms), state

  # A chain's state is a tuple, in whose parts trainers look for a learning rate.
  return optax.chain(optax.GradientTransformationExtraArgs(init, update))


def _flat(state: Any) -> dict[tuple[Any, ...], Any]:
  """Arrays of an `nnx.State` by path."""
  value = lambda x: x.get_value() if isinstance(x, nnx.Variable) else x
  return {path: value(x) for path, x in nnx.to_flat_state(state)}


def _tree(state: Any, forms: dict[Any, Form]) -> Any:
  """The trained tree: arrays, and weights with only the state's arrays in them."""
  flat = _flat(state)
  found = {path: x for path, x in flat.items() if path[:-1] not in forms}
  for at in {path[:-1] for path in flat if path[:-1] in forms}:
    arrays = {name: flat.get((*at, name)) for name in forms[at].names}
    found[kernel_of(at)] = forms[at].node(arrays)
  return traverse_util.unflatten_dict(found)


def _like(state: Any, updates: Any, forms: dict[Any, Form]) -> Any:
  """An `nnx.State` like the given one with the arrays of a trained tree."""
  flat = paths.leaves(updates)

  def of(path: tuple[Any, ...], x: Any) -> Any:
    *head, name = path
    held = tuple(head) in forms
    leaf = flat["/".join(map(str, kernel_of(tuple(head)) if held else path))]
    new = named(leaf)[name] if held else leaf
    return x.replace(new) if isinstance(x, nnx.Variable) else new

  return nnx.from_flat_state([(path, of(path, x)) for path, x in nnx.to_flat_state(state)])
