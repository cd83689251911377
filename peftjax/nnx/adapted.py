"""The generated subclass of a module's class, whose methods compute with weights."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from peftjax.core.adapted import lender
from peftjax.core.factored import traced
from peftjax.core.view import Uses
from peftjax.nnx.held import SUFFIX, Held


class ReadElsewhere(AttributeError, ValueError):
  """A module reads a quantised parameter of another module, where it no longer is."""


def adapt(module: nnx.Module) -> None:
  """Gives a module the subclass of its class that computes with the weights it holds."""
  if not _original(module):
    object.__setattr__(module, "__class__", _subclass(type(module)))


def restore(module: nnx.Module) -> None:
  """Gives a module its own class back."""
  if (cls := _original(module)) is not None:
    object.__setattr__(module, "__class__", cls)


def _original(module: nnx.Module) -> type | None:
  """The class that an adapted module had; None for any other."""
  return vars(type(module)).get("adapts")


@functools.cache
def _subclass(cls: type) -> type:
  """`cls` with all methods and properties adapted that `nnx.Module` does not have."""
  body: dict[str, Any] = {"adapts": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
  for of in cls.__mro__:
    for name, value in vars(of).items() if of not in nnx.Module.__mro__ else ():
      own = name == "__call__" or not name.startswith("__")
      if own and isinstance(value, property) and value.fget is not None:
        body.setdefault(name, property(_adapted(cls, value.fget), value.fset, value.fdel))
      elif own and callable(value) and hasattr(value, "__get__"):  # `nnx.jit` makes no function
        body.setdefault(name, _adapted(cls, value))
  body["__getattr__"] = _missing(cls)
  return type(cls)(f"Adapted{cls.__name__}", (cls,), body)


def _missing(cls: type) -> Callable[..., Any]:
  """`__getattr__` of the subclass of `cls`."""

  def of(self: Any, name: str) -> Any:
    if (held := vars(self).get(f"{name}{SUFFIX}")) is not None:
      raise ReadElsewhere(
        f"{held.path} is quantised and is read by another module than the one that it lies in; "
        "leave it out of the targets and of `where`"
      )
    if (inherited := getattr(cls, "__getattr__", None)) is not None:
      return inherited(self, name)
    raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")

  return of


def _adapted(cls: type, fn: Any) -> Callable[..., Any]:
  """A method of `cls` in the form for its subclass."""

  @functools.wraps(fn)
  def method(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _call(cls, fn, self, _weights(self), args, kwargs)

  return method


def _weights(module: Any) -> dict[str, tuple[str, Any]]:
  """The weights of a module's parameters: by name their path, and the weight with its loans."""
  found = {}
  for name, held in vars(module).items():
    if isinstance(held, Held):
      own = name.removesuffix(SUFFIX)
      array = getattr(module, own).get_value() if held.form.around else None
      found[own] = held.path, held.weight(array)
  by_path = dict(found.values())
  given = lambda w: w.borrow(by_path[lender(w)]) if lender(w) in by_path else w
  return {name: (path, given(weight)) for name, (path, weight) in found.items()}


def _call(
  cls: type,
  fn: Any,
  module: nnx.Module,
  weights: dict[str, tuple[str, Any]],
  args: Any,
  kwargs: Any,
) -> Any:
  """`fn(module, ...)` traced on a copy whose parameters are the dense arrays, and then evaluated.

  Changes that it made to the copy, and to copies of NNX objects among the arguments, are then made
  to the originals: statistics, counts of keys, caches. Unchanged parts are not written, so that a
  module may be called at another level of tracing than it was made at.
  """
  flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
  objects = {i: x for i, x in enumerate(flat) if _is_object(x)}
  rest = [None if i in objects else x for i, x in enumerate(flat)]
  all_objects = (module, *objects.values())
  graph, state = nnx.split(all_objects)
  names = {name: path for name, (path, _) in weights.items()}
  changed: dict[Any, Any] = {}

  def pure(weights: Any, state: Any, rest: Any) -> Any:
    copies = nnx.merge(graph, state)
    full = [*rest]
    for i, copy in zip(objects, copies[1:], strict=True):
      full[i] = copy
    args, kwargs = jax.tree.unflatten(treedef, full)
    with _dense(copies[0], cls, {name: weights[path] for name, path in names.items()}):
      result = fn.__get__(copies[0], cls)(*args, **kwargs)
    graph_after, state_after = nnx.split(copies)
    changed.update(_statics(all_objects, copies) if graph_after != graph else {})
    return result, state_after

  result, after = traced(pure, Uses(), dict(weights.values()), state, rest)
  before = dict(nnx.to_flat_state(state))
  moved = [(path, x) for path, x in nnx.to_flat_state(after) if not _same(x, before.get(path))]
  if moved:
    nnx.update(all_objects, nnx.from_flat_state(moved))
  owners = dict(nnx.iter_graph(all_objects)) if changed else {}
  for path, value in changed.items():
    setattr(owners[path[:-1]], path[-1], value)
  return result


def _same(x: Any, y: Any) -> bool:
  """Tells whether two variables hold the very same arrays."""
  ours, theirs = jax.tree.leaves(x), jax.tree.leaves(y)
  return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))


def _is_object(x: Any) -> bool:
  return isinstance(x, nnx.Pytree | nnx.Variable)


@contextlib.contextmanager
def _dense(copy: Any, cls: type, arrays: dict[str, jax.Array]) -> Iterator[None]:
  """A context in which a copy of an adapted module has its own class and these parameters.

  Raises:
    ValueError: if the module wrote to one of them.
  """
  adapted, own = type(copy), {name: vars(copy).get(name) for name in arrays}
  given = {name: _like(own[name], x) for name, x in arrays.items()}
  for name, variable in given.items():
    setattr(copy, name, variable)
  object.__setattr__(copy, "__class__", cls)
  yield
  object.__setattr__(copy, "__class__", adapted)
  for name, variable in given.items():
    if getattr(copy, name) is not variable or variable.get_raw_value() is not arrays[name]:
      raise ValueError(
        f"{cls.__name__} writes to its parameter {name!r} when it is called, which an adapter on "
        "it would undo; leave it out of the targets"
      )
    if own[name] is None:
      delattr(copy, name)
    else:
      setattr(copy, name, own[name])


def _like(variable: Any, array: jax.Array) -> nnx.Variable:
  return nnx.Param(array) if variable is None else variable.replace(array)


def _statics(objects: Any, copies: Any) -> dict[Any, Any]:
  """Attributes that hold no arrays and differ in copies of objects, by path."""
  is_static = lambda path, x: not _is_object(x) and not str(path[-1]).startswith("_pytree__")
  found = [
    {p: x for p, x in nnx.iter_graph(of) if p and is_static(p, x) and not isinstance(x, jax.Array)}
    for of in (objects, copies)
  ]
  before, after = found
  return {p: x for p, x in after.items() if p not in before or before[p] != x}
