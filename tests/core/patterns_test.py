"""Patterns from files and flags: those of Python, in bounded time."""

import pytest

from peftjax.core import patterns


@pytest.mark.parametrize(
  "pattern",
  [
    *(
      "(",
      "[a-",
      "a{2}{3}",
      "(?P<x",
      7,
      None,
      "x" * 5000,
      "(" * 3000,
      r"\p{L}",
      "(?r)a",
      "[[:alpha:]]",
    ),
    *("q{e}", "q{1<=e<=2}", r"(?<=a+)b"),
  ],
)
def test_what_is_no_pattern_of_python_is_refused(pattern):
  """`regex`, which can be stopped, has more, such as matches with errors: "q{e}" is any text."""
  with pytest.raises(ValueError, match="^where: "):
    patterns.check(pattern, "where")


@pytest.mark.parametrize("pattern", ["a{2,3}", "a{,2}", r"a\{e\}", "a++b", "(?i)A", "a|b", ""])
def test_what_is_one_is_not(pattern):
  assert patterns.check(pattern, "where") == pattern


def test_matches():
  assert patterns.fullmatch("a+", "aaa") and not patterns.fullmatch("a", "aa")
  assert patterns.match("a", "ab") and not patterns.match("b", "ab")
  assert (
    patterns.groups(r".*?(?P<n>\d+)", "x12") == {"n": "12"} and patterns.groups("b", "a") is None
  )


def test_a_match_that_would_not_end_is_ended():
  with pytest.raises(ValueError, match="takes more than"):
    patterns.fullmatch(r"((.+)+)+\d", "a" * 30_000)
