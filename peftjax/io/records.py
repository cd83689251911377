"""JSON files of others, read once: an object, typed, every value in its range.

A schema is a frozen dataclass whose annotations say what is allowed:
`Annotated[int, Meta(ge=1)]`. Types are strict: "64" is not a number, "false" not a boolean.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

MAX_BYTES = 2**28  # per JSON file; the largest tokenizers have some 2^25


def regular(path: str | Path) -> Path:
  """`path`, if it is a regular file or a link to one: reading a pipe or a device may never end.

  Raises:
    ValueError: if there is none, or it is something else.
  """
  path = Path(path)
  try:
    mode = path.stat().st_mode
  except (OSError, ValueError) as error:
    told = getattr(error, "strerror", None) or error
    raise ValueError(f"{path} cannot be read ({told}). Name an existing file.") from None
  if not stat.S_ISREG(mode):
    raise ValueError(f"{path} is not a regular file, and only such are read.")
  return path


def read_bytes(path: str | Path, most: int = MAX_BYTES) -> bytes:
  """The contents of a regular file of at most `most` bytes; ValueError if it cannot be read."""
  path = regular(path)
  try:
    if path.stat().st_size > most:
      raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {most} are read.")
    return path.read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}).") from None


def read_object(path: str | Path, advice: str = "Download it again.") -> dict[str, Any]:
  """The JSON object in a file; ValueError if it holds anything else, or one key twice."""
  return parse_object(read_bytes(path), path, advice)


def parse_object(
  data: bytes | str,
  where: str | Path,
  advice: str = "Download it again.",
  *,
  constants: bool = True,
) -> dict[str, Any]:
  """The JSON object in `data`, in which no object may hold one key twice.

  Args:
    data: bytes of UTF-8, or text.
    where: file, and line if it is one of a file's lines, for messages.
    advice: what to do about an unreadable file.
    constants: read NaN, Infinity and -Infinity too, which are not JSON.
  """
  try:
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    constant = None if constants else _no_constant
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
  except (ValueError, RecursionError) as error:
    told = clip(_where_in_text(error), quote=False)
    raise ValueError(f"{where} does not hold readable JSON: {told}.\n{advice}") from None
  if not isinstance(value, dict):
    raise ValueError(
      f"{where} must hold a JSON object {{...}}, and holds a {type(value).__name__}.\n{advice}"
    )
  return value


def convert(value: Mapping[str, Any], schema: type[T], where: str | Path) -> T:
  """`value` as the dataclass `schema`; fields that it does not have are left out.

  Raises:
    ValueError: naming the file, the field, what it holds and what is allowed.
  """
  try:
    return msgspec.convert(dict(value), schema, strict=True)
  except (
    *(msgspec.ValidationError, TypeError, OverflowError),
    *(RecursionError, UnicodeError),  # half of a surrogate pair is JSON, but not a text
  ) as error:
    told, _, path = str(error).rpartition(" - at ")
    path = path.strip("`").removeprefix("$").removeprefix(".")
    if not told:  # the whole object lacks something
      raise ValueError(f"{where}: {_plain(str(error))}.") from None
    found = clip(_at(value, path))
    raise ValueError(f"{where}: {path} is {found}; {_plain(told)}.") from None


def unknown(value: Mapping[str, Any], schema: type) -> dict[str, list[str]]:
  """The fields of `value` that `schema` does not have, each with the near ones it has."""
  has = [field.name for field in dataclasses.fields(schema)]
  return {key: difflib.get_close_matches(key, has, n=2) for key in value if key not in has}


def clip(value: Any, most: int = 200, *, quote: bool = True) -> str:
  """`repr(value)`, cut short: a hostile file's contents must not fill the screen."""
  if isinstance(value, str | bytes | list | tuple):
    value = value[: most + 1]  # of millions, no more is made a text of
  try:
    text = repr(value) if quote else str(value)
  except (ValueError, RecursionError):  # a number of thousands of digits; nesting of thousands
    text = f"a {type(value).__name__} too large to show"
  return text if len(text) <= most else text[:most] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) != len(pairs):
    [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
    raise ValueError(f"the key {clip(key)} comes twice")
  return value


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON number")


def _where_in_text(error: Exception) -> str:
  """The error; in a single line only with its column, for `where` names the line."""
  if isinstance(error, json.JSONDecodeError) and error.lineno == 1:
    return f"{error.msg} at column {error.colno}"
  if isinstance(error, RecursionError):
    return "it is nested too deeply"
  return str(error).partition("; use sys.")[0]  # for a number with thousands of digits


def _at(value: Any, path: str) -> Any:
  """The value at msgspec's path, such as `a.b[0]`; keys it does not name are shown whole."""
  for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
    try:
      value = value[int(index)] if index else value[name]
    except (KeyError, IndexError, TypeError):
      break
  return value


def _plain(told: str) -> str:
  """msgspec's "Expected `int` >= 1, got `str`" in words."""
  told = told.replace("`", "").replace("Expected ", "it must be ").replace("got ", "not ")
  for code, word in (("int", "a whole number"), ("float", "a number"), ("bool", "true or false")):
    told = re.sub(rf"\b{code}\b", word, told)
  for code, word in (("str", "a text"), ("object", "an object"), ("array", "a list")):
    told = re.sub(rf"\b{code}\b", word, told)
  return told.replace("Object missing required field", "it lacks the field")
