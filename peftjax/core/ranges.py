"""Numbers in range: annotations of dataclasses and functions that given values are checked against.

    class Train:
      batch_size: Size = 32

    @checked
    def lora(rank: Size = 8, alpha: Positive = 16.0, ...): ...

Types are strict: "64" and True are not numbers, 2.0 is not a count, NaN and ∞ are in no range.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar

import jax
import msgspec
import numpy as np
from msgspec import Meta

F = TypeVar("F", bound=Callable[..., Any])

# Counters are int32. A value above or below 1e±30 is ∞ or 0 once it is squared, or in 16 bits.
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Size = Annotated[int, Meta(ge=1, lt=2**31)]
Length = Annotated[int, Meta(ge=1, le=2**20)]  # sizes that are allocated: rows, tokens, ranks
RowLength = Annotated[int, Meta(ge=2, le=2**20)]  # length of rows with a token to be predicted
Positive = Annotated[float, Meta(ge=1e-30, le=1e30)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
# Anything jnp.dtype takes; not checked. A config names it (`training.sections`).
DType = Annotated[Any, "dtype"]


def check(schema: Any, given: Mapping[str, Any], where: str = "") -> None:
  """Checks every value against the annotation of its name, if there is one.

  Args:
    schema: a dataclass or a function. Values annotated with `Any`, or with a class other than
      numbers, texts, lists and mappings, may be anything.
    given: values by name; JAX arrays, whose numbers may not be known yet, are let through.
    where: goes before the name in the error, such as "train.".

  Raises:
    ValueError: naming the first value that is of another type or out of range, and what is allowed.
  """
  allowed = _annotations(schema)
  for name, value in given.items():
    if name in allowed and not isinstance(value, jax.Array):
      check_one(f"{where}{name}", value, allowed[name])


def check_one(name: str, value: Any, allowed: Any) -> None:
  """Checks one value against an annotation; see `check`."""
  try:
    msgspec.convert(value.item() if isinstance(value, np.generic) else value, allowed, strict=True)
  except UnicodeEncodeError:
    raise ValueError(f"{name}={_shown(value)}: it has half a character (a surrogate)") from None
  except (msgspec.ValidationError, OverflowError) as error:
    raise ValueError(f"{name}={_shown(value)}: {_words(str(error), allowed)}") from None


def one_of(name: str, value: Any, allowed: Collection[str]) -> None:
  """Raises ValueError unless `value` is one of the `allowed` texts."""
  if not isinstance(value, str) or value not in allowed:
    raise ValueError(f"{name} {_shown(value)} is not one of {', '.join(allowed)}")


def checked(function: F) -> F:
  """`function`, which first checks its arguments against their annotations; see `check`."""
  signature = inspect.signature(function)

  @functools.wraps(function)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    check(function, signature.bind(*args, **kwargs).arguments)
    return function(*args, **kwargs)

  return typing.cast(F, wrapped)


@functools.cache
def _annotations(schema: Any) -> dict[str, Any]:
  hints = typing.get_type_hints(inspect.unwrap(schema), include_extras=True)
  return {name: hint for name, hint in hints.items() if _known(hint)}


def _known(hint: Any) -> bool:
  """Tells whether msgspec can check a type: whether it is made of plain types."""
  inner = typing.get_args(hint)
  if typing.get_origin(hint) is Annotated:
    return _known(inner[0])
  if inner:
    return all(_known(part) for part in inner if part is not ...)
  return hint in (int, float, bool, str, type(None))


def _shown(value: Any) -> str:
  try:
    text = repr(value)
  except ValueError:  # an integer of thousands of digits
    return f"a {type(value).__name__} too large to show"
  return text if len(text) <= 80 else text[:80] + "..."


def _words(told: str, hint: Any) -> str:
  """msgspec's message ("Expected `int`, got `bool`") in words, with the whole allowed range."""
  limits = _limits(hint)
  kinds = {"int": f"a whole number{limits}", "float": f"a number{limits}", "str": "a text"}
  kinds |= {"bool": "true or false", "array": "a list", "object": "a mapping", "null": "none"}
  found = re.match(r"Expected `([^`]*)`", told)
  names = found[1].split(" | ") if found else ["float"]
  return f"write {' or '.join(kinds.get(name, name) for name in names)}"


def _limits(hint: Any) -> str:
  """The first range in a hint, as " of at least 1 and below 2147483648"."""
  signs = (("ge", "of at least"), ("gt", "above"), ("le", "up to"), ("lt", "below"))
  for part in typing.get_args(hint):
    if isinstance(part, Meta):
      given = [(word, getattr(part, sign)) for sign, word in signs]
      return " " + " and ".join(f"{word} {x:.10g}" for word, x in given if x is not None)
    if limits := _limits(part):
      return limits
  return ""
