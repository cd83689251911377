"""`layout` of an NNX model, and what "all-linear" means in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx, traverse_util

from peftjax.core import paths, probe
from peftjax.core.layout import Axes, ConvAxes, Layout, TableAxes
from peftjax.core.weight import is_weight
from peftjax.methods.base import Chain, Method
from peftjax.nnx.parameters import check_model, params, plain


def layout(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, Axes]:
  """Axes of every `nnx.Param` that `model(...)` multiplies with or looks up, from abstract traces.

  Args:
    model: any NNX module; of `jax.ShapeDtypeStruct` too, as `nnx.eval_shape` makes it.
    *args: example inputs; `jax.ShapeDtypeStruct` will do.
    **kwargs: likewise, by name.

  Returns:
    A dict from path to axes, for `attach(..., layout=...)`.

  Raises:
    ValueError: if `model` is no NNX module or has no `nnx.Param`.
  """
  check_model(model)
  found = plain(model)
  graph, state = nnx.split(model)
  variables = dict(nnx.to_flat_state(state))
  others = nnx.from_flat_state({p: x for p, x in variables.items() if p not in found})

  def call(arrays: Any, others: Any, args: Any, kwargs: Any) -> Any:
    flat = traverse_util.flatten_dict(arrays)
    given = {path: variables[path].replace(x) for path, x in flat.items()}
    whole = nnx.from_flat_state({**dict(nnx.to_flat_state(others)), **given})
    return nnx.merge(graph, whole)(*args, **kwargs)

  arrays = traverse_util.unflatten_dict({path: x.get_value() for path, x in found.items()})
  return probe.layout(call, arrays, others, args, kwargs)


def resolved(model: nnx.Module, targets: Any, layout: Layout) -> Any:
  """A method or targets with the paths that "all-linear" means in their place.

  Those are kernels of any name that the layout says are multiplied: no tables, convolutions or
  top-level heads.

  Raises:
    ValueError: if there are none.
  """
  if isinstance(targets, Chain):
    return Chain(tuple(resolved(model, method, layout) for method in targets.methods))
  if isinstance(targets, Method):
    fields = {f.name: getattr(targets, f.name) for f in dataclasses.fields(targets)}  # type: ignore[arg-type]
    named = {k: resolved(model, x, layout) for k, x in fields.items() if _asks(x)}
    return dataclasses.replace(targets, **named) if named else targets  # type: ignore[type-var]
  if not _asks(targets):
    return targets
  kernels = [
    path for path, leaf in paths.leaves(params(model)).items() if _is_linear(path, leaf, layout)
  ]
  if not kernels:
    raise ValueError(
      '"all-linear" names no parameter: the layout has no kernel that is multiplied in the body of '
      "the model; write targets by name, or a layout = pj.nnx.layout(model, *example_inputs)"
    )
  others = [] if isinstance(targets, str) else [x for x in targets if x != "all-linear"]
  return [*(f"(?:{path})" for path in kernels), *others]


def _asks(value: Any) -> bool:
  if isinstance(value, str):
    return value == "all-linear"
  return isinstance(value, list | tuple) and "all-linear" in value


def _is_linear(path: str, leaf: Any, layout: Mapping[str, Any]) -> bool:
  axes = layout.get(path)
  multiplied = isinstance(axes, Axes) and not isinstance(axes, ConvAxes | TableAxes)
  return multiplied and not is_weight(leaf) and not paths.is_head(path)
