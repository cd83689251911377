"""Flax linen: `apply`, the bridge to linen's own layers, and the layout of any module's kernels."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from peftjax.core import given, paths, per_row, probe, shared, tracing, tree
from peftjax.core.adapted import bare
from peftjax.core.attachment import Attachment
from peftjax.core.einsum import einsum, linear, shift, split_subscripts, take
from peftjax.core.factored import traced
from peftjax.core.layout import Layout, Site
from peftjax.core.params import Params
from peftjax.core.view import Uses
from peftjax.core.weight import Unboxed, Weight, materialize
from peftjax.nn import virtual

# The number of bytes of parameters from which holding them as constants is a mistake.
BAKED = 2**24


def apply(
  model: nn.Module,
  params: Params,
  *args: Any,
  train: bool = False,
  rngs: dict[str, jax.Array] | None = None,
  variables: Mapping[str, Any] | None = None,
  rows: Any | None = None,
  **kwargs: Any,
) -> Any:
  """`model.apply({"params": params}, ...)` where any leaf of `params` may be a `Weight`.

  Dense, DenseGeneral, Einsum, MultiHeadDotProductAttention and Embed, as linen has them, compute
  with the factors. A model with any other module that reads such a parameter is traced, and its
  products and lookups use the factors (`core.factored`).

  Args:
    model: a linen module, ours or not.
    params: its `params` collection.
    *args: arguments of the module's method.
    train: turns on the dropout of adapters, and is passed on to a module that takes `train`.
    rngs: passed on; `rngs["dropout"]` also feeds the adapters' dropout.
    variables: other collections, such as `batch_stats`.
    rows: `[B]` int, the adapter of `pj.stack_adapters` for each row of the batch, the first axis
      of the arrays that weights multiply; when traced, an invalid number gives NaN.
    **kwargs: passed on: `method`, `mutable`, the module's own arguments.

  Raises:
    ValueError: if `model` is an NNX module; if `params` is no whole tree of parameters; if a leaf
      or the module has dropout, `train` is true and `rngs["dropout"]` is missing; if no module
      reads a prefix or prompt, the model being called as a whole (without `method`); if `rows` do
      not fit the adapters or the batch.
  """
  paths.check_no_nnx(model)
  _check_given(params, args, kwargs)
  if rows is not None:
    params = per_row.pick(params, rows)
  params = tree.tie(params, spread=False)
  if train:
    params = tree.with_dropout_keys(params, (rngs or {}).get("dropout"))
  method = kwargs.get("method") or type(model).__call__
  if isinstance(method, str):
    method = getattr(type(model), method)
  if "train" in inspect.signature(method).parameters:
    kwargs["train"] = train

  def call(params: Any, variables: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
    return model.apply({"params": params, **variables}, *args, rngs=rngs, **kwargs)

  with bridge(), tracing.within(lent=shared.nodes(params), read=set()) as seen:
    try:
      result = _factored(call, (params, variables or {}, rngs, args, kwargs))
    except flax.errors.InvalidRngError as error:
      if not train or "dropout" in (rngs or {}):
        raise
      raise ValueError(
        f'{type(model).__name__} draws at random with train=True, so it needs rngs={{"dropout": '
        "key}; for evaluation leave train=False"
      ) from error
  if not kwargs.get("method"):  # another method may well read only a part
    virtual.check_read(params, seen.read or ())
  return result


def _factored(call: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
  """Calls `call(*inputs)`; traces it if a module unknown to the bridge reads a weight."""
  with contextlib.suppress(Unboxed), tracing.within(unboxing="refuse"):
    return call(*inputs)
  return traced(call, tracing.current().uses or Uses(), *inputs)


def _check_given(params: Any, args: Any, kwargs: Any) -> None:
  """Raises ValueError on an incomplete tree of parameters, and on inputs that are not numbers;
  warns if parameters become constants of the program that is being traced.
  """
  given.check_params(params)
  if hole := given.first_hole(params):
    raise ValueError(
      f"params lacks {hole}: this is one half of pj.partition. Write pj.apply(model, "
      "pj.combine(train, frozen), ...)"
    )
  inputs, arrays = jax.tree.leaves((args, kwargs)), jax.tree.leaves(params)
  for x in inputs:
    given.check_array("an input of the model", x)
  is_traced = lambda x: isinstance(x, jax.core.Tracer)
  constant = sum(x.nbytes for x in arrays if hasattr(x, "nbytes") and not is_traced(x))
  # A gradient outside of jit traces as well, but computes with known values at once.
  if constant >= BAKED and any(map(is_traced, (*inputs, *arrays))) and is_traced(jnp.zeros(()) + 0):
    warnings.warn(
      f"{constant:,} bytes of parameters are constants of the program that is being compiled: a "
      "jitted function closes over them. Pass them as an argument, step(train, frozen, ...)",
      stacklevel=3,
    )


@contextlib.contextmanager
def bridge() -> Iterator[None]:
  """A context in which common linen layers compute with the factors of a `Weight`, read-only.

  A module with an `Attachment` among its parameters, under the name "adapter", computes with that.
  """

  def intercept(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    adapter = _param(context.module, "adapter") if context.method_name == "__call__" else None
    if not isinstance(adapter, Attachment):
      return plain(next_fn, args, kwargs, context)
    first = [lambda *a, **k: plain(next_fn, a, k, context)]
    # A compact method cannot run twice in one call; a second time it is another, unbound, module.
    call = lambda *a, **k: first.pop()(*a, **k) if first else _unadapted(context.module, a, k)
    return adapter.around(call, args, kwargs)

  def plain(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    maps = isinstance(module, nn.WeightNorm | nn.SpectralNorm) or "map_variables(" in _scope(module)
    if maps and tracing.current().unboxing == "refuse":
      raise Unboxed  # it would map over the children of a weight
    if (type(module), context.method_name) in _HANDLERS and _is_plain(module):
      name, handler = _HANDLERS[type(module), context.method_name]
      weight = _param(module, name)
      if isinstance(weight, Weight):
        return handler(module, weight, *args, **kwargs)
    return next_fn(*args, **kwargs)

  with tracing.within(unboxing="bridge"), nn.intercept_methods(intercept):
    yield


def layout(model: nn.Module, *args: Any, **kwargs: Any) -> Layout:
  """Axes of every kernel and table, and widths of every module, from abstract traces of `model`.

  Inside its module a kernel has its own axes; the additional axes it has in the parameter tree are
  a stack of layers (`nn.scan`, `nn.vmap`) that lies before them.

  Args:
    model: any linen module.
    *args: example inputs; `jax.ShapeDtypeStruct` will do.
    **kwargs: likewise, by name; values other than arrays are passed on as they are.

  Returns:
    A dict from path to axes or site, for `method.attach(key, params, layout)`.
  """
  sites: dict[str, Site] = {}

  def intercept(next_fn: Callable[..., Any], fargs: Any, fkwargs: Any, context: Any) -> Any:
    module = context.module
    result = next_fn(*fargs, **fkwargs)
    if context.method_name == "__call__" and module.path:
      # The transform that lifts the module's parameters (scan, vmap) stacks this one too.
      if module.is_mutable_collection("params"):
        module.put_variable("params", _MARK, jnp.zeros(()))
      first = result[0] if isinstance(result, tuple) and result else result
      sites["/".join(module.path)] = Site(tuple(map(_width, fargs)), _width(first))
    return result

  keys = {name: jax.random.key(0) for name in ("params", "dropout")}
  init = lambda *args, **kwargs: model.init(keys, *args, **kwargs)
  with nn.intercept_methods(intercept):
    made = paths.leaves(probe.shapes(init, *args, **kwargs)["params"])
  params, rest = _split(nn.unbox(probe.shapes(init, *args, **kwargs)))

  def call(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
    variables = {"params": params, **rest}
    return model.apply(variables, *args, rngs=keys, mutable=list(rest), **kwargs)

  params_of = paths.leaves(params)
  stack = lambda path: tuple(made[mark].shape) if (mark := f"{path}/{_MARK}") in made else ()
  sites = {path: site._replace(stack=stack(path)) for path, site in sites.items()}
  found = {}
  for path, axes in probe.layout(call, params, rest, args, kwargs).items():
    site = sites.get(path.rpartition("/")[0])
    # A map of a module over experts that all read one input makes its stack an axis of results.
    outs = [
      a for a in axes.outs if site is None or len(params_of[path].shape) + a >= len(site.stack)
    ]
    if outs:
      found[path] = type(axes)(axes.ins, tuple(outs))
  return {**found, **sites}


def _split(variables: Any) -> tuple[Any, dict[str, Any]]:
  """Parameters, and the other collections."""
  rest = {name: collection for name, collection in variables.items() if name != "params"}
  return variables["params"], rest


def _width(x: Any) -> int | None:
  """The last axis of an array of floats; None for anything else."""
  floats = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
  return x.shape[-1] if floats and x.ndim >= 2 else None


def _unadapted(module: nn.Module, args: Any, kwargs: Any) -> Any:
  """The module's result from its own parameters alone."""
  params = {name: x for name, x in module.variables["params"].items() if name != "adapter"}
  return module.clone(parent=None).apply({"params": params}, *args, **kwargs)


def _param(module: nn.Module, name: str) -> Any:
  """The raw parameter, not unboxed; None where the module has none by that name (yet)."""
  return module.get_variable("params", name) if module.has_variable("params", name) else None


def _scope(module: nn.Module) -> str:
  return module.scope.path_text if module.scope else ""


def _bias(module: nn.Module) -> Any:
  bias = _param(module, "bias")
  return None if bias is None else materialize(bare(bias))


def _cast(module: Any, x: jax.Array, weight: Weight) -> jax.Array:
  """`x` in the module's compute dtype, as linen's `promote_dtype` would choose it."""
  return x.astype(module.dtype or jnp.result_type(x, weight.dtype))


def _dense(module: nn.Dense, weight: Weight, x: jax.Array) -> jax.Array:
  y = linear(_cast(module, x, weight), weight)
  bias = _param(module, "bias")
  return y if bias is None else shift(y, bare(bias))


def _dense_general(module: nn.DenseGeneral, weight: Weight, x: jax.Array) -> jax.Array:
  axes = [axis % x.ndim for axis in _tuple(module.axis)]
  batch = [axis % x.ndim for axis in _tuple(module.batch_dims)]
  letters = "abcdefghijklm"[: x.ndim]
  outs = "stuvwxyz"[: len(_tuple(module.features))]
  ins = "".join(letters[axis] for axis in axes)
  lead = "".join(letters[axis] for axis in batch)
  rest = "".join(c for i, c in enumerate(letters) if i not in axes and i not in batch)
  y = einsum(f"{letters},{lead}{ins}{outs}->{lead}{rest}{outs}", _cast(module, x, weight), weight)
  bias = _bias(module)
  if bias is None:
    return y
  ones = (1,) * len(rest)
  shape = (*bias.shape[: len(lead)], *ones, *bias.shape[len(lead) :])
  return y + bias.astype(y.dtype).reshape(shape)


def _einsum(module: nn.Einsum, weight: Weight, x: jax.Array, eqn: str | None = None) -> jax.Array:
  eqn = (eqn or module.einsum_str or "").replace(" ", "")
  y = einsum(eqn, _cast(module, x, weight), weight)
  bias = _bias(module)
  if bias is None:
    return y
  _, w_s, out_s = split_subscripts(eqn)
  sizes = iter(bias.shape)  # nn.Einsum keeps them in the result's order
  shape = [next(sizes) if c in w_s else 1 for c in out_s.replace("...", "")]
  return y + bias.astype(y.dtype).reshape(shape)


def _embed(module: nn.Embed, weight: Weight, ids: jax.Array) -> jax.Array:
  return take(weight, ids).astype(module.dtype or weight.dtype)


def _attend(module: nn.Embed, weight: Weight, x: jax.Array) -> jax.Array:
  """Logits by the table as it is looked up, adapter and all.

  Such a module has one array for both, and no place for the second one that merging a table which
  is adapted for the lookup alone (`Head`) would need.
  """
  return einsum("...d,vd->...v", _cast(module, x, weight), weight)


def _tuple(value: Any) -> tuple[int, ...]:
  return (value,) if isinstance(value, int) else tuple(value)


def _is_plain(module: nn.Module) -> bool:
  """True if a layer multiplies as linen does by default, which is all that a handler knows."""
  return all(getattr(module, name, None) is getattr(type(module), name, None) for name in _OWN)


# Fields by which a user changes how a layer of linen multiplies.
_OWN = ("dot_general", "dot_general_cls", "precision", "promote_dtype", "preferred_element_type")

# A name that no parameter has.
_MARK = "<site>"

# The handler by which each module computes with a `Weight`.
_HANDLERS: dict[Any, tuple[str, Callable[..., Any]]] = {
  (nn.Dense, "__call__"): ("kernel", _dense),
  (nn.DenseGeneral, "__call__"): ("kernel", _dense_general),
  (nn.Einsum, "__call__"): ("kernel", _einsum),
  (nn.Embed, "__call__"): ("embedding", _embed),
  (nn.Embed, "attend"): ("embedding", _attend),
  # `setup` would read, and so materialise, the table.
  (nn.Embed, "setup"): ("embedding", lambda module, weight: None),
}
