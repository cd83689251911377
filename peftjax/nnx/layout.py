"""`layout` for an NNX model."""

from __future__ import annotations

from typing import Any

from flax import nnx, traverse_util

from peftjax.core import probe
from peftjax.core.layout import Axes
from peftjax.nnx.parameters import check_model, plain


def layout(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, Axes]:
  """Axes of every `nnx.Param` that `model(...)` multiplies with or looks up, from abstract traces.

  Args:
    model: any NNX module, also with `jax.ShapeDtypeStruct`, as `nnx.eval_shape` makes it.
    *args: example inputs; `jax.ShapeDtypeStruct` will do.
    **kwargs: likewise, by name.

  Returns:
    A dict from path to axes, for `attach(..., layout=...)`.

  Raises:
    ValueError: if `model` is not an NNX module or has no `nnx.Param`.
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
