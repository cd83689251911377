"""`split`: an NNX model as a pure function of a plain tree of its parameters."""

from __future__ import annotations

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from peftjax.core import probe, shared
from peftjax.core.layout import Layout
from peftjax.core.params import Params
from peftjax.nnx.parameters import check_model, held_in, params, plain


class Pure:
  """An NNX model without its parameters, which `pj.apply` calls with those that it is given.

  Attributes:
    cls: the model's class.
  """

  def __init__(self, model: nnx.Module):
    self.cls = type(model)
    self._graph, state = nnx.split(model)
    own = plain(model)  # what is given at every call, and is not kept here
    self._variables = {
      path: x.replace(None) if path in own else x for path, x in nnx.to_flat_state(state)
    }
    self._given = set(own)

  def __call__(
    self, params: Params, *args: Any, train: bool = False, rngs: Any = None, **kwargs: Any
  ) -> Any:
    """The result of the model after `model.train()` or `model.eval()`; its own state stays.

    Raises:
      ValueError: the model draws at random with `train`, and `rngs["dropout"]` is missing; or it
        writes to a variable that is no counter of random keys.
    """
    flat = traverse_util.flatten_dict(nn.unbox(shared.without(params)))
    key = (rngs or {}).get("dropout")
    if missing := self._given - flat.keys():
      raise ValueError(f"params lack {_name(min(missing, key=_name))} of {self.cls.__name__}")
    given = {
      path: x.replace(flat[path])
      if path in self._given
      else _drawn(path, x, key if train else None)
      for path, x in self._variables.items()
    }
    if train and key is None and any(isinstance(x, nnx.RngKey) for x in given.values()):
      raise ValueError(
        f'{self.cls.__name__} draws at random with train=True, so it needs rngs={{"dropout": key}};'
        " for evaluation leave train=False"
      )
    values = {path: x.get_raw_value() for path, x in given.items()}
    model = nnx.merge(self._graph, nnx.from_flat_state(given))
    model.train() if train else model.eval()
    result = model(*args, **kwargs)
    for path, x in nnx.to_flat_state(nnx.state(model)):
      if path in values and x.get_raw_value() is not values[path]:
        if not isinstance(x, nnx.RngState):
          raise ValueError(
            f"{self.cls.__name__} writes to {_name(path)} ({type(x).__name__}) when called, and "
            "a pure function of parameters has no place for that; adapt it by pj.nnx.attach"
          )
    return result

  def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """As `apply` of a linen module."""
    return self(variables["params"], *args, **kwargs)

  def layout(self, params: Params, *args: Any, **kwargs: Any) -> Layout:
    """Axes of every array that it multiplies with or looks up; see `pj.nnx.layout`."""
    return probe.layout(self, params, *args, **kwargs)


def split(model: nnx.Module) -> tuple[Pure, Params]:
  """`(pure, params)`: `pj.apply(pure, params, x)` is `model(x)`, and any array may be a `Weight`.

  `params` is a plain dict of dicts of the model's `nnx.Param`s, as `pj.nnx.params` gives it: attach
  a method to it with `pure.layout(params, x)`, partition it, differentiate it, as with linen's.
  All other variables are constants. Dropout is on with `train=True` and draws from
  `rngs["dropout"]`.

  Args:
    model: any NNX module, not adapted.

  Raises:
    ValueError: if `model` is no NNX module, has no `nnx.Param` or is adapted already. When called,
      if it writes to a variable, such as the statistics of `nnx.BatchNorm` with `train=True`.
  """
  check_model(model)
  if held_in(model):
    raise ValueError(
      f"this {type(model).__name__} is adapted already; split it as it was before pj.nnx.attach"
    )
  return Pure(model), params(model)


def _drawn(path: tuple[Any, ...], variable: Any, key: jax.Array | None) -> Any:
  """A variable that is no parameter: of random keys and their counters, as a step's key says."""
  now = variable.get_raw_value()
  if key is None or not isinstance(variable, nnx.RngState):
    return variable.replace(now)  # a new one, as it may only be written to in its own trace
  if isinstance(variable, nnx.RngCount):
    return variable.replace(jnp.zeros_like(now))
  own = jax.random.fold_in(key, zlib.crc32(_name(path).encode()))
  return variable.replace(jax.random.split(own, now.shape) if now.shape else own)


def _name(path: tuple[Any, ...]) -> str:
  return "/".join(map(str, path))
