"""A dataclass as a section of a config, and the section as arguments of the dataclass.

A config has a flag for every field, so its values are those of flags: a mapping is a tuple of
"PATTERN=NUMBER", a dtype its name, targets a tuple of texts, and None a placeholder of the type
that the field has otherwise.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar

import jax.numpy as jnp
from ml_collections.config_dict import placeholder

from peftjax.core import ranges
from peftjax.io.records import clip

T = TypeVar("T")

DTYPES = ("float32", "bfloat16")


class Section:
  """Fields of a config that are checked against their annotations: see `core.ranges`."""

  section: ClassVar[str]

  def __post_init__(self) -> None:
    ranges.check(type(self), vars(self), f"--config.{self.section}.")


def section(cls: Any, without: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
  """The fields of a dataclass with their defaults, as a section of a config.

  Args:
    cls: a dataclass.
    without: fields that are not flags.
    **changes: other values than the defaults, in either form.

  Raises:
    ValueError: a field without a default is not among the changes, or a change names no field.
  """
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in without}
  given = {**{name: _default(field) for name, field in fields.items()}, **changes}
  if given.keys() != fields.keys() or dataclasses.MISSING in given.values():
    raise ValueError(f"{cls.__name__} has the fields {', '.join(fields)}; given: {changes}")
  return {name: _flag(value, hints[name]) for name, value in given.items()}


def arguments(cls: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The values of a section as arguments of the dataclass; unknown fields stay as they are.

  Args:
    cls: a dataclass.
    fields: fields of a config.
    where: the section, such as "method".

  Raises:
    ValueError: a pattern without its number, or a dtype that is not in `DTYPES`.
  """
  hints = typing.get_type_hints(cls, include_extras=True)
  return {key: _argument(f"{where}.{key}", x, hints.get(key)) for key, x in fields.items()}


def _default(field: Any) -> Any:
  factory = field.default_factory
  return field.default if factory is dataclasses.MISSING else factory()


def _flag(value: Any, hint: Any) -> Any:
  kinds = _kinds(hint)
  if value is None:
    (kind,) = kinds - {NoneType}
    return placeholder(kind)
  if hint == ranges.DType:
    return jnp.dtype(value).name
  if Mapping in kinds and isinstance(value, Mapping):
    return tuple(f"{key}={x}" for key, x in value.items())
  if Sequence in kinds:
    return (value,) if isinstance(value, str) else tuple(value)
  return float(value) if float in kinds else value


def _argument(name: str, value: Any, hint: Any) -> Any:
  if hint == ranges.DType:
    ranges.one_of(name, value, DTYPES)
    return jnp.dtype(value)
  if Mapping in _kinds(hint):
    (number,) = _kinds(typing.get_args(hint)[1])
    return _pattern(name, value, number)
  return value


def _pattern(name: str, rules: Sequence[str], kind: Callable[[str], T]) -> dict[str, T]:
  """`("query=4",)` to `{"query": 4}`: flags have no dicts with free keys."""
  ranges.check_one(f"--config.{name}", rules, list[str])
  pattern = {}
  for rule in rules:
    key, _, value = rule.rpartition("=")
    try:
      pattern[key] = kind(value)
    except ValueError:
      raise ValueError(f'{name}: {clip(rule)} is not "PATTERN=NUMBER"') from None
  return pattern


def _kinds(hint: Any) -> set[Any]:
  """The plain types of an annotation: {int, NoneType} of `Size | None`."""
  if typing.get_origin(hint) is Annotated:
    return _kinds(typing.get_args(hint)[0])
  if typing.get_origin(hint) in (typing.Union, UnionType):
    return set().union(*map(_kinds, typing.get_args(hint)))
  return {typing.get_origin(hint) or hint}
