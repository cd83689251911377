"""The matrix products of a program: how many follow each other, and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def products_in_a_row(fn: Callable[..., Any], *args: Any) -> int:
  """The most matrix products on any path from the arguments of `fn` to its result."""
  program = jax.make_jaxpr(fn)(*args)
  return max(_depths(program.jaxpr, [0] * len(program.jaxpr.invars)))


def _depths(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
  """The depth of each output, given those of the inputs. Inner programs are entered, loops once."""
  deep: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
  at = lambda var: 0 if isinstance(var, Literal) else deep.get(var, 0)
  for eqn in jaxpr.eqns:
    given = [at(var) for var in eqn.invars]
    inner = [x.jaxpr for x in eqn.params.values() if isinstance(x, ClosedJaxpr)]
    inner += [x for x in eqn.params.values() if isinstance(x, Jaxpr)]
    if inner and len(inner[0].invars) == len(given):
      made = _depths(inner[0], given)
    else:
      made = [max(given, default=0) + (eqn.primitive.name == "dot_general")] * len(eqn.outvars)
    deep.update(zip(eqn.outvars, made, strict=False))
  return [at(var) for var in jaxpr.outvars]


def products_like(weights: Collection[Any], fn: Callable[..., Any], *args: Any) -> int:
  """The number of matrix products in the program of `fn` of the shape of a weight, or transposed.

  Those are the weights' gradients, where no activation happens to have such a shape.
  """
  shapes = {w.shape for w in weights} | {w.shape[::-1] for w in weights}
  program = jax.make_jaxpr(fn)(*args).jaxpr
  products = (eqn for eqn in _equations(program) if eqn.primitive.name == "dot_general")
  made: list[Any] = [eqn.outvars[0].aval for eqn in products]
  return sum(aval.shape in shapes for aval in made)


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
  """All equations of a program, those of inner programs too."""
  is_program = lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in filter(is_program, jax.tree.leaves([*eqn.params.values()], is_leaf=is_program)):
      yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
