"""A pytest plugin that runs the tests of `tests.interop.rows` alone and writes what became of them.

  python -m pytest -p tests.interop.table --interop=docs/interop.json tests/third_party_test.py

A test of a `Refused` row has the sentence of the first ValueError that it expected. Outcomes of
tests that did not run stay.
"""

import json
import pathlib
import re
import textwrap

import pytest

from tests.interop import rows

# Of an absolute path the last name stays.
PATH = re.compile(r"(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.+-])")


def pytest_addoption(parser):
  parser.addoption("--interop", metavar="FILE", help="Write the outcomes of rows into this file.")


def pytest_configure(config):
  path = config.getoption("--interop")
  # A worker of pytest-xdist reports to its controller, which writes.
  if path and not hasattr(config, "workerinput"):
    config.pluginmanager.register(Table(pathlib.Path(path)), "interop")


def pytest_collection_modifyitems(config, items):
  if config.getoption("--interop"):
    every = rows.every()
    kept = [item for item in items if any(rows.names(row, item.nodeid) for row in every)]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*kept}])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  """Notes what `pytest.raises` meets."""
  with pytest.MonkeyPatch.context() as patch:
    leave = pytest.RaisesExc.__exit__

    def told(self, kind, error, trace):
      done = leave(self, kind, error, trace)
      if done and isinstance(error, ValueError):
        item.user_properties.append(("refused", str(error)))
      return done

    patch.setattr(pytest.RaisesExc, "__exit__", told)
    return (yield)


class Table:
  """Outcomes by test: "passed", "skipped", "failed" or "refused: " and a sentence."""

  def __init__(self, path):
    self.path = path
    self.outcomes = json.loads(path.read_text()) if path.exists() else {}
    self.refusing = [row for row in rows.every() if isinstance(row, rows.Refused)]

  def pytest_runtest_logreport(self, report):
    if report.when != "call" and report.passed:
      return
    outcome = report.outcome
    told = dict(reversed(report.user_properties)).get("refused")
    if report.passed and told and any(rows.names(row, report.nodeid) for row in self.refusing):
      outcome = f"refused: {textwrap.shorten(PATH.sub('', told), 300, placeholder=' ...')}"
    self.outcomes[report.nodeid] = outcome
    self.path.write_text(json.dumps(self.outcomes, indent=1, sort_keys=True) + "\n")
