"""`evaluate`: a traced program on views of weights, equation by equation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from peftjax.core import contraction, joined
from peftjax.core.joined import Joined
from peftjax.core.view import View, dense

# Takes an equation and its operands, one of which is a view; returns results, None if it cannot.
Rule = Callable[[Any, list[Any]], Sequence[Any] | None]


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  """The results of a jaxpr whose arguments may be views; a result may be a view as well.

  A product, a convolution or a lookup computes with the factors of the weight. Casts, transposes,
  reshapes, slices of a stack and control flow hand a view on. Any other equation takes the dense
  array, and a rule of the program's own for gradients (`custom_vjp`) stays in force.
  """
  env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda atom: env[atom] if _is_variable(atom) else atom.val
  last = {x: i for i, eqn in enumerate(jaxpr.eqns) for x in eqn.invars if _is_variable(x)}
  kept = {x for x in jaxpr.outvars if _is_variable(x)}
  for i, eqn in enumerate(jaxpr.eqns):
    operands = [read(atom) for atom in eqn.invars]
    with eqn.ctx.manager:
      env.update(zip(eqn.outvars, _results(eqn, operands), strict=True))
    # Outside of jit these are arrays, in memory.
    for x in {x for x in (*eqn.invars, *eqn.outvars) if _is_variable(x)} - kept:
      if last.get(x, i) == i:
        del env[x]
  return [read(atom) for atom in jaxpr.outvars]


def _is_variable(atom: Any) -> bool:
  return not isinstance(atom, Literal)


def _results(eqn: Any, operands: list[Any]) -> Sequence[Any]:
  name = eqn.primitive.name
  if any(map(is_view, operands)):
    joins = any(isinstance(x, Joined) for x in operands)
    rule = _RULES.get(name) if name in _OF_JOINED or not joins else None
    results = None if rule is None else rule(eqn, operands)
    if results is not None:
      return results
    operands = [dense(x, name) for x in operands]
  results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
  return results if eqn.primitive.multiple_results else [results]


def is_view(x: Any) -> bool:
  return isinstance(x, View | Joined)


def _or_none(view: View | None) -> list[View] | None:
  return None if view is None else [view]


# The primitives that hand a view on. The rule's name is that of the primitive.


def _same(eqn: Any, operands: list[Any]) -> list[Any]:
  """The rule of primitives that keep values as they are; arrays still go through them."""
  arrays = iter(_arrays_through(eqn, [x for x in operands if not is_view(x)]))
  return [x if is_view(x) else next(arrays) for x in operands]


def _arrays_through(eqn: Any, arrays: list[Any]) -> list[Any]:
  if not arrays:
    return []
  results = eqn.primitive.bind(*arrays, **eqn.params)
  return list(results) if eqn.primitive.multiple_results else [results]


def _convert_element_type(eqn: Any, operands: list[Any]) -> list[Any] | None:
  """A cast to a dtype that products are computed in; a cast to eight bits is a quantisation."""
  dtype = eqn.params["new_dtype"]
  computes = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
  return [operands[0].cast(dtype)] if computes else None


def _transpose(eqn: Any, operands: list[Any]) -> list[Any]:
  return [operands[0].transpose(eqn.params["permutation"])]


def _squeeze(eqn: Any, operands: list[Any]) -> list[Any]:
  return [operands[0].squeeze(eqn.params["dimensions"])]


def _reshape(eqn: Any, operands: list[Any]) -> list[Any] | None:
  if eqn.params["dimensions"] is not None:
    return None
  return _or_none(operands[0].reshape(eqn.params["new_sizes"]))


def _broadcast_in_dim(eqn: Any, operands: list[Any]) -> list[Any] | None:
  p = eqn.params
  return _or_none(operands[0].expand(p["shape"], p["broadcast_dimensions"]))


def _stop_gradient(eqn: Any, operands: list[Any]) -> list[Any]:
  view = operands[0]
  return [view.replace(weight=jax.tree.map(jax.lax.stop_gradient, view.weight))]


def _slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
  """A slice of a stack's layers, of a kernel's inputs or outputs, or of a table's rows."""
  p = eqn.params
  strides = p["strides"] or [1] * len(p["start_indices"])
  bounds = [*zip(p["start_indices"], p["limit_indices"], strides, strict=True)]
  whole = operands[0]
  view: View | None = whole
  for axis, (start, limit, step) in enumerate(bounds):
    if view is not None and (start, limit, step) != (0, view.shape[axis], 1):
      cut = lambda x, of, i=start, j=limit, by=step: jax.lax.slice_in_dim(x, i, j, by, of)
      view = view.cut(axis, cut)
  if view is None and _is_table(whole) and bounds[1] == (0, whole.shape[1], 1):
    return _rows(whole, jnp.arange(*bounds[0]))
  return _or_none(view)


def _dynamic_slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
  view, *starts = operands
  if any(map(is_view, starts)):
    return None
  sizes, whole = eqn.params["slice_sizes"], view
  for axis, size in enumerate(sizes):
    if view is not None and size != view.shape[axis]:
      cut = lambda x, of, i=starts[axis], n=size: jax.lax.dynamic_slice_in_dim(x, i, n, of)
      view = view.cut(axis, cut)
  if view is None and _is_table(whole) and sizes[1] == whole.shape[1]:
    first = jnp.clip(starts[0], 0, whole.shape[0] - sizes[0])
    return _rows(whole, first + jnp.arange(sizes[0], dtype=first.dtype))
  return _or_none(view)


def _split(eqn: Any, operands: list[Any]) -> list[Any] | None:
  view, sizes, axis = operands[0], eqn.params["sizes"], eqn.params["axis"]
  parts = []
  for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
    cut = lambda x, of, i=start, n=size: jax.lax.slice_in_dim(x, i, i + n, 1, of)
    parts.append(view.cut(axis, cut))
  return None if any(part is None for part in parts) else parts


def _concatenate(eqn: Any, operands: list[Any]) -> list[Any] | None:
  nested = any(isinstance(x, Joined) for x in operands)
  return None if nested else [Joined(tuple(operands), eqn.params["dimension"])]


# Products and lookups.


def _dot_general(eqn: Any, operands: list[Any]) -> list[Any] | None:
  left, right = operands
  if is_view(left):
    right = dense(right, "dot_general")
  view, x = (left, right) if is_view(left) else (right, left)
  y = joined.dot_general(
    x,
    view,
    eqn.params["dimension_numbers"],
    view_left=is_view(left),
    dtype=eqn.outvars[0].aval.dtype,
    precision=eqn.params["precision"],
  )
  return [y]


def _conv_general_dilated(eqn: Any, operands: list[Any]) -> list[Any] | None:
  x, view = operands
  if is_view(x) or not view.is_whole:
    return None
  names = "window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count"
  how = {name: eqn.params[name] for name in f"{names} batch_group_count".split()}
  dtype = eqn.outvars[0].aval.dtype
  with contraction.at(eqn.params["precision"]):
    y = view.weight.conv(x.astype(jnp.promote_types(x.dtype, dtype)), **how)
  view.uses.note(view.path, "factored")
  return [y.astype(dtype)]


def _ragged_dot_general(eqn: Any, operands: list[Any]) -> list[Any] | None:
  """Rows of each group times the matrix of that group: experts."""
  x, view, group_sizes = operands
  dims = eqn.params["ragged_dot_dimension_numbers"]
  plain = dims.dot_dimension_numbers == (((1,), (1,)), ((), ()))
  plain &= tuple(dims.lhs_ragged_dimensions) == (0,) == tuple(dims.rhs_group_dimensions)
  if not plain or not is_view(view) or is_view(x) or not view.is_whole or len(view.shape) != 3:
    return None
  dtype = eqn.outvars[0].aval.dtype
  with contraction.at(eqn.params["precision"]):
    y = view.weight.ragged_dot(x.astype(jnp.promote_types(x.dtype, dtype)), group_sizes)
  view.uses.note(view.path, "factored")
  return [y.astype(dtype)]


def _is_table(view: View) -> bool:
  return view.is_whole and len(view.shape) == 2


def _rows(view: View, ids: jax.Array) -> list[Any]:
  view.uses.note(view.path, "factored")
  return [view.weight.take(ids).astype(view.dtype)]


def _gather(eqn: Any, operands: list[Any]) -> list[Any] | None:
  """Rows of a table, or layers of a stack."""
  view, indices = operands
  p, d = eqn.params, eqn.params["dimension_numbers"]
  by_rows = d.collapsed_slice_dims == (0,) == d.start_index_map and not d.operand_batching_dims
  if is_view(indices) or not by_rows or p["slice_sizes"] != (1, *view.shape[1:]):
    return None
  ids = indices[..., 0]
  if p["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:  # else clipped, as XLA clips any index
    ids = jnp.clip(ids, 0, view.shape[0] - 1)
  rank = ids.ndim + len(view.shape) - 1
  batch = [i for i in range(rank) if i not in d.offset_dims]
  if _is_table(view):
    (rows,) = _rows(view, ids)
    return [jnp.moveaxis(rows, range(ids.ndim), batch)]
  return _or_none(view.layers(ids, batch))


# Control flow.


def _call(eqn: Any, operands: list[Any]) -> list[Any]:
  closed = eqn.params["jaxpr"]
  return evaluate(closed.jaxpr, closed.consts, operands)


def _own_rule(eqn: Any, operands: list[Any]) -> list[Any] | None:
  """Keeps a function's own rule for gradients or `vmap`, for arrays, if either is asked for."""
  closed = eqn.params.get("call_jaxpr", eqn.params.get("call"))
  through = any(isinstance(x, View) and x.uses.through_rules for x in operands)
  return evaluate(closed.jaxpr, closed.consts, operands) if through and closed else None


def _remat(eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params
  again = jax.checkpoint(
    lambda *xs: _arrays(evaluate(p["jaxpr"], getattr(p["jaxpr"], "consts", ()), xs), eqn),
    prevent_cse=p["prevent_cse"],
    policy=p["policy"],
  )
  return again(*operands)


def _scan(eqn: Any, operands: list[Any]) -> list[Any] | None:
  p = eqn.params
  n_consts, n_carry = p["num_consts"], p["num_carry"]
  closed = p["jaxpr"]
  consts, carry, xs = _in_parts(operands, n_consts, n_consts + n_carry)
  stacked = lambda x: isinstance(x, View) and x.along(0) == 0 and x.along_stack(0)
  xs = [x if stacked(x) else dense(x, "scan") for x in xs]
  kept = _handed_on(closed.jaxpr, carry, n_consts)
  carried = [dense(x, "scan") for i, x in enumerate(carry) if i not in kept]

  def body(carried: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
    rows = [x.row() if is_view(x) else x for x in xs]
    full = _merged(kept, carried, n_carry)
    results = evaluate(closed.jaxpr, closed.consts, [*consts, *full, *rows])
    after = [x for i, x in enumerate(results[:n_carry]) if i not in kept]
    return [dense(x, "scan") for x in after], [dense(x, "scan") for x in results[n_carry:]]

  how = {name: p[name] for name in ("length", "reverse", "unroll")}
  carried, ys = jax.lax.scan(body, carried, xs, **how)
  return [*_merged(kept, carried, n_carry), *ys]


def _while(eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params
  n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
  cond_consts, body_consts, carry = _in_parts(operands, n_cond, n_cond + n_body)
  test, step = p["cond_jaxpr"], p["body_jaxpr"]
  kept = _handed_on(step.jaxpr, carry, n_body)

  def cond(carried: Any) -> Any:
    full = _merged(kept, carried, len(carry))
    return evaluate(test.jaxpr, test.consts, [*cond_consts, *full])[0]

  def body(carried: Any) -> Any:
    full = _merged(kept, carried, len(carry))
    results = evaluate(step.jaxpr, step.consts, [*body_consts, *full])
    return [dense(x, "while") for i, x in enumerate(results) if i not in kept]

  start = [dense(x, "while") for i, x in enumerate(carry) if i not in kept]
  return _merged(kept, jax.lax.while_loop(cond, body, start), len(carry))


def _cond(eqn: Any, operands: list[Any]) -> list[Any] | None:
  index, *args = operands
  if is_view(index):
    return None
  branches = [
    lambda *xs, b=branch: _arrays(evaluate(b.jaxpr, b.consts, xs), eqn)
    for branch in eqn.params["branches"]
  ]
  return jax.lax.switch(index, branches, *args)


def _arrays(results: Sequence[Any], eqn: Any) -> list[Any]:
  return [dense(x, eqn.primitive.name) for x in results]


def _in_parts(xs: Sequence[Any], *ends: int) -> list[list[Any]]:
  return [list(xs[i:j]) for i, j in zip((0, *ends), (*ends, len(xs)), strict=True)]


def _handed_on(body: Any, carry: list[Any], before: int) -> dict[int, View]:
  """The views, by position, that a loop carries and its body returns unchanged."""
  same = zip(body.invars[before:], body.outvars, strict=False)
  unchanged = [i for i, (given, returned) in enumerate(same) if given is returned]
  return {i: carry[i] for i in unchanged if i < len(carry) and is_view(carry[i])}


def _merged(kept: dict[int, View], carried: Sequence[Any], size: int) -> list[Any]:
  rest = iter(carried)
  return [kept[i] if i in kept else next(rest) for i in range(size)]


_RULES: dict[str, Rule] = {
  "copy": _same,
  "copy_p": _same,
  "optimization_barrier": _same,
  "sharding_constraint": _same,
  "convert_element_type": _convert_element_type,
  "transpose": _transpose,
  "split": _split,
  "concatenate": _concatenate,
  "squeeze": _squeeze,
  "reshape": _reshape,
  "broadcast_in_dim": _broadcast_in_dim,
  "stop_gradient": _stop_gradient,
  "slice": _slice,
  "dynamic_slice": _dynamic_slice,
  "gather": _gather,
  "dot_general": _dot_general,
  "conv_general_dilated": _conv_general_dilated,
  "ragged_dot_general": _ragged_dot_general,
  "jit": _call,
  "closed_call": _call,
  "custom_jvp_call": _own_rule,
  "custom_vjp_call": _own_rule,
  "custom_vmap_call": _own_rule,
  "remat2": _remat,
  "checkpoint": _remat,
  "scan": _scan,
  "while": _while,
  "cond": _cond,
}

# The primitives that take joined weights too.
_OF_JOINED = {
  *("convert_element_type", "transpose", "dot_general"),
  *("jit", "closed_call", "remat2", "checkpoint", "scan", "while", "cond"),
}
