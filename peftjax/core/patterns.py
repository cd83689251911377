"""Regular expressions that come from files and flags: Python's syntax, matched in bounded time."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import regex

LENGTH = 4096  # characters of a pattern
SECONDS = 0.25  # of one match, which takes microseconds unless the pattern backtracks for ever


def check(pattern: Any, where: str) -> str:
  """`pattern`, if it is a regular expression; a ValueError that names `where` if it is not."""
  if not isinstance(pattern, str):
    raise ValueError(f"{where}: {pattern!r} is no pattern; write a text such as 'query'")
  if len(pattern) > LENGTH:
    raise ValueError(f"{where}: a pattern of {len(pattern)} characters; at most {LENGTH} are read")
  try:
    _compiled(pattern)
  except (regex.error, RecursionError, OverflowError, MemoryError) as error:
    told = str(error) or type(error).__name__
    raise ValueError(f"{where}: {pattern[:200]!r} is no regular expression: {told}") from None
  return pattern


def fullmatch(pattern: str, text: str) -> bool:
  """Whether all of `text` matches.

  Raises:
    ValueError: if it is no regular expression, or one that takes longer than `SECONDS`.
  """
  return _run("fullmatch", pattern, text) is not None


def match(pattern: str, text: str) -> bool:
  """Whether the beginning of `text` matches; raises as `fullmatch`."""
  return _run("match", pattern, text) is not None


def groups(pattern: str, text: str) -> dict[str, Any] | None:
  """The named groups of a match of the beginning of `text`, if there is one; raises as `match`."""
  found = _run("match", pattern, text)
  return found and found.groupdict()


@functools.lru_cache(maxsize=4096)  # a pattern for each matrix of a large model is usual
def _compiled(pattern: str) -> Any:
  """Of `regex`, where it means what it does in Python's `re`.

  To `regex`, which alone can be stopped, "q{e}" is a q with any number of errors.
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
