"""`Claim`: one statement, how it is measured, and the verdict that is expected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

HOLDS = "holds"
CORRECTED = "holds with a correction"
FAILS = "does not hold here"
VERDICTS = (HOLDS, CORRECTED, FAILS)


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of measuring a claim.

  Attributes:
    numbers: measured numbers by name.
    verdict: one of `VERDICTS`, computed from the numbers.
    correction: the statement that holds instead, where the claim does not hold as it stands.
  """

  numbers: Mapping[str, float]
  verdict: str
  correction: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
  """One statement of the text this project started from.

  Attributes:
    name: theme and statement, "lora.parameter_count".
    says: the statement.
    measured_by: the computation.
    holds_if: the rule of the verdict, with its thresholds.
    expected: the verdict that it had when it was last looked at.
    run: measures it.
    tests: node ids of the tests that settle it, if it is not measured.
  """

  name: str
  says: str
  measured_by: str
  holds_if: str
  expected: str
  run: Callable[[], Finding]
  tests: tuple[str, ...] = ()


def claim(
  *, says: str, measured_by: str, holds_if: str, expected: str
) -> Callable[[Callable[[], Finding]], Claim]:
  """Makes a `Claim` of the function that measures it, named by its module and its own name."""

  def of(run: Callable[[], Finding]) -> Claim:
    name = f"{run.__module__.rpartition('.')[2]}.{run.__name__}"
    return Claim(name, says, measured_by, holds_if, expected, run)

  return of


def by_test(
  name: str, *, says: str, tests: Sequence[str], verdict: str = HOLDS, correction: str = ""
) -> Claim:
  """A claim that tests of ours prove or correct: it names them and computes nothing again."""
  finding = Finding({}, verdict, correction)
  told, passes = f"by {' and '.join(tests)}", "they pass" if tests[1:] else "it passes"
  return Claim(name, says, told, passes, verdict, lambda: finding, tuple(tests))


def found(
  numbers: Mapping[str, float], *, holds: bool, mended: bool = False, correction: str = ""
) -> Finding:
  """The finding for a claim that `holds` as it is said or, if `mended`, with the correction."""
  verdict = HOLDS if holds else CORRECTED if mended else FAILS
  plain = {key: float(value) for key, value in numbers.items()}
  return Finding(plain, verdict, "" if verdict == HOLDS else correction)
