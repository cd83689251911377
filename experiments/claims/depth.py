"""How deep a program is, in matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def products_in_a_row(fn: Callable[..., Any], *args: Any) -> int:
  """The most matrix products on any path from the arguments of `fn` to its result."""
  program = jax.make_jaxpr(fn)(*args)
  return max(_depths(program.jaxpr, [0] * len(program.jaxpr.invars)))


def _depths(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
  """Of each output, given those of the inputs. Inner programs are entered, loops once."""
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
