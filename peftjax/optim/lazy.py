"""A traced program, evaluated in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun


def opened(program: ClosedJaxpr) -> ClosedJaxpr:
  """The same program, with the equations of jitted functions in place of their calls.

  The results of a call depend on all its inputs, although its equations may keep leaves apart.
  Since jax 0.11 a trace also has the calls of functions that ask to be inlined, such as optax's.
  """
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in program.in_avals]
  return jax.make_jaxpr(lambda *given: _run(program, given))(*inputs)


class Lazy:
  """The values of a program; an equation is evaluated when one of its results is first asked for.

  An equation that several outputs need is evaluated once, so the compiler gets the equations of
  the program itself, in another order.

  Attributes:
    inputs: values of the inputs, by number; they may be replaced before they are used.
  """

  def __init__(self, program: ClosedJaxpr, inputs: list[Any]):
    self.inputs = dict(enumerate(inputs))
    self._jaxpr = program.jaxpr
    self._number = {var: i for i, var in enumerate(self._jaxpr.invars)}
    self._values = dict(zip(self._jaxpr.constvars, program.consts, strict=True))
    self._maker = {var: eqn for eqn in self._jaxpr.eqns for var in eqn.outvars}
    self._needs = {var: 1 << i for var, i in self._number.items()}
    for eqn in self._jaxpr.eqns:
      needs = 0
      for var in eqn.invars:
        needs |= self._bits(var)
      self._needs |= dict.fromkeys(eqn.outvars, needs)

  def needs(self, output: int) -> set[int]:
    """Numbers of the inputs that an output depends on."""
    bits = self._bits(self._jaxpr.outvars[output])
    return {i for i in self.inputs if bits >> i & 1}

  def size(self, output: int) -> int:
    """Number of entries of an output."""
    return self._jaxpr.outvars[output].aval.size

  def output(self, number: int) -> Any:
    return self._value(self._jaxpr.outvars[number])

  def _bits(self, var: Any) -> int:
    return 0 if isinstance(var, Literal) else self._needs.get(var, 0)

  def _value(self, var: Any) -> Any:
    if isinstance(var, Literal):
      return var.val
    if var in self._number:
      return self.inputs[self._number[var]]
    if var not in self._values:
      self._evaluate(self._maker[var])
    return self._values[var]

  def _evaluate(self, eqn: JaxprEqn) -> None:
    self._values |= _results(self._jaxpr, eqn, self._value)


def _run(program: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
  jaxpr = program.jaxpr
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *inputs), strict=True))
  read = lambda var: var.val if isinstance(var, Literal) else values[var]
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "jit":
      made = _run(eqn.params["jaxpr"], [read(var) for var in eqn.invars])
      values |= dict(zip(eqn.outvars, made, strict=True))
    else:
      values |= _results(jaxpr, eqn, read)
  return [read(var) for var in jaxpr.outvars]


def _results(jaxpr: Jaxpr, eqn: JaxprEqn, read: Callable[[Any], Any]) -> dict[Any, Any]:
  """The results of an equation of `jaxpr`, by variable."""
  given = [var for var in eqn.invars if not isinstance(var, Literal)]
  made = [var for var in eqn.outvars if not isinstance(var, DropVar)]
  alone = jaxpr.replace(
    constvars=[],
    invars=given,
    outvars=made,
    eqns=[eqn],
    debug_info=jaxpr.debug_info.with_unknown_names(),
  )
  results = jaxpr_as_fun(ClosedJaxpr(alone, []))(*map(read, given))
  return dict(zip(made, results, strict=True))
