"""Rows of the interop table name tests that are there, and docs/interop.json has none besides."""

import json
import pathlib
import re

from tests.interop import rows

TESTS = pathlib.Path(__file__).parent


def test_every_row_names_a_test():
  for test in {test for row in rows.every() for test in row}:
    file, _, name = test.partition("::")
    pattern = re.escape(name.partition("[")[0]).replace(r"\*", r"\w*")
    assert re.search(rf"^def {pattern}\(", (TESTS / file).read_text(), re.MULTILINE), test


def test_outcomes_are_of_rows():
  kept = json.loads((TESTS.parent / "docs" / "interop.json").read_text())
  assert kept and not [x for x in kept if not any(rows.names(row, x) for row in rows.every())]
