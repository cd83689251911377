"""A pytest plugin that writes which law held for which subject: `make matrix`.

  python -m pytest -p tests.matrix --matrix=docs/matrix.json tests/method_contract_test.py

Of the files in `SUBJECT` alone. A test that finds that a method has no place for what the law is
about says so by `record_property("refused", ...)`. Outcomes of tests that did not run stay,
and a run that is stopped keeps its own.
"""

import json
import pathlib
import re

# How the id of a test names its subject.
SUBJECT = {
  "method_contract_test": r"\[(?P<subject>.+?-(scanned|unrolled))",
  "every_step_test": r"test_on_eight_devices\[(?P<subject>.+)\]",
  "together_test": r"test_parameters_are_those_of_single_runs\[(?P<subject>[a-z]+)",
}


def pytest_addoption(parser):
  parser.addoption("--matrix", metavar="FILE", help="Write the outcomes of laws into this file.")


def pytest_configure(config):
  path = config.getoption("--matrix")
  # A worker of pytest-xdist reports to its controller, which writes.
  if path and not hasattr(config, "workerinput"):
    config.pluginmanager.register(Matrix(pathlib.Path(path)), "matrix")


def place(nodeid):
  """File, subject and test of an id; None if it is none of the matrix's."""
  path, _, test = nodeid.partition("::")
  file = pathlib.PurePath(path).stem
  found = re.search(SUBJECT[file], test) if file in SUBJECT else None
  return (file, found["subject"], test.partition("[")[0]) if found else None


class Matrix:
  """Outcomes by file, subject and test: "passed", "refused" or "failed"."""

  def __init__(self, path):
    self.path, self.run = path, set()
    self.outcomes = json.loads(path.read_text()) if path.exists() else {}

  def pytest_runtest_logreport(self, report):
    where = place(report.nodeid)
    if where is None or (report.when != "call" and not report.failed):
      return
    refused = report.passed and "refused" in dict(report.user_properties)
    file, subject, test = where
    tests = self.outcomes.setdefault(file, {}).setdefault(subject, {})
    # Of a test with more parameters than its subject the worst counts.
    if where not in self.run or tests.get(test) != "failed":
      tests[test] = "refused" if refused else report.outcome
    self.run.add(where)
    self.path.write_text(json.dumps(self.outcomes, indent=1, sort_keys=True) + "\n")
