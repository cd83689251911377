"""Regular expressions that come from files and flags: Python's syntax, matched in bounded time."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import regex

LENGTH = 4096  # characters per pattern
SECONDS = 0.25  # per match, which takes microseconds unless the pattern backtracks forever


def check(pattern: Any, where: str) -> str:
  """`pattern`, if it is a regular expression; a ValueError that names `where` if it is not."""
  if not isinstance(pattern, str):
    raise ValueError(f"{where}: {pattern!r} is not a pattern; write a text such as 'query'")
  if len(pattern) > LENGTH:
    raise ValueError(f"{where}: a pattern of {len(pattern)} characters; at most {LENGTH} are read")
  try:
    _compiled(pattern)
  except (regex.error, RecursionError, OverflowError, MemoryError) as error:
    told = str(error) or type(error).__name__
    raise ValueError(f"{where}: {pattern[:200]!r} is not a regular expression: {told}") from None
  return pattern


def fullmatch(pattern: str, text: str) -> bool:
  """Tells whether all of `text` matches.

  Raises:
    ValueError: if `pattern` is not a regular expression, or takes longer than `SECONDS`.
  """
  return _run("fullmatch", pattern, text) is not None


def match(pattern: str, text: str) -> bool:
  """Tells whether the beginning of `text` matches; raises as `fullmatch`."""
  return _run("match", pattern, text) is not None


def groups(pattern: str, text: str) -> dict[str, Any] | None:
  """The named groups of a match of the beginning of `text`, if there is one; raises as `match`."""
  found = _run("match", pattern, text)
  return found and found.groupdict()


@functools.lru_cache(maxsize=4096)  # large models often have a pattern per matrix
def _compiled(pattern: str) -> Any:
  """The pattern compiled by `regex`, if it means there what it means in Python's `re`.

  Only `regex` can be stopped, but it reads "q{e}" as a q with any number of errors.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("error", FutureWarning)  # sets in sets, which `regex` has
    try:
      re.compile(pattern)
    except (re.error, FutureWarning) as error:
      raise regex.error(str(error)) from None
  if re.search(r"(?<!\\)\{(?!\d*,?\d*\})[^}]*\}", pattern):
    raise regex.error("braces that hold no numbers")
  return regex.compile(pattern)


def _run(how: str, pattern: str, text: str) -> Any:
  check(pattern, "pattern")
  try:
    return getattr(_compiled(pattern), how)(text, timeout=SECONDS)
  except TimeoutError:
    raise ValueError(
      f"the pattern {pattern[:200]!r} takes more than {SECONDS} s on {text[:200]!r}: it can be "
      "divided in too many ways. Write it without a repetition inside another."
    ) from None
