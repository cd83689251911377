"""The kinds of adapters that are read and written, and the fields of their configs.

A field that a kind does not have is refused, unless it is null, false or []: a field that a later
PEFT adds may change the meaning of the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftjax.hf_peft.fields import NORMS, VIRTUAL, Norms
from peftjax.methods.codec import Codec, Common
from peftjax.methods.registry import METHODS


def codecs() -> tuple[Codec, ...]:
  """The codecs of all methods that have one."""
  return tuple(method.codec for method in METHODS.values() if method.codec is not None)


def codec_of(leaf: Any) -> Codec | None:
  """The codec of a parameter, by its exact type; None if it is not an adapter that PEFT knows."""
  return next((codec for codec in codecs() if type(leaf) is codec.leaf), None)


def schema_of(kind: str) -> type[Common] | None:
  """The fields that are read for a `peft_type`; None if it is not read."""
  others = {**VIRTUAL, NORMS: Norms}
  return others.get(kind) or next((c.schema for c in codecs() if c.kind == kind), None)


def kinds() -> list[str]:
  """Every `peft_type` that is read."""
  return list(dict.fromkeys([*(codec.kind for codec in codecs()), *VIRTUAL, NORMS]))


def reader_of(config: Common) -> Codec | None:
  """The codec that reads a config; None for prefixes, prompts and norms."""
  of_kind = (codec for codec in codecs() if codec.kind == config.peft_type)
  return next((codec for codec in of_kind if codec.takes(config)), None)


def known(kind: str) -> set[str]:
  """The fields that a config of this kind may have."""
  schema, codec = schema_of(kind), _first(kind)
  fields = {field.name for field in dataclasses.fields(schema)} if schema else set()
  if codec is None:
    return fields - {*getattr(schema, "lacks", ())}
  return fields - {*codec.lacks} | codec.fixed.keys()


def changes(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
  """The fields of `config` that make it more than its tensors say, and their allowed values."""
  same = lambda x, y: type(x) is type(y) and x == y
  codec = _first(kind)
  return {
    field: allowed
    for field, allowed in (codec.fixed if codec else {}).items()
    if field in config and not any(same(config[field], x) for x in allowed)
  }


def _first(kind: str) -> Codec | None:
  return next((codec for codec in codecs() if codec.kind == kind), None)
