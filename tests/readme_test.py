"""What the README shows works: its Python runs, its commands parse."""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language in ("python", "py")]
LINES = [
  line.strip()
  for language, text in BLOCKS
  if language in ("sh", "bash", "shell", "console")
  for line in text.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if re.search(r"\bpython3? -m ", line)]

# Parses the flags as the command would, and goes no further.
PARSE = """
import importlib, sys
from absl import flags
module = importlib.import_module(sys.argv[1])
if hasattr(module, "__path__"):
  importlib.import_module(sys.argv[1] + ".__main__")
from experiments import runtime
rest = runtime.parse_flags(sys.argv[1:])
assert not [x for x in rest[1:] if x.startswith("-")], f"not a flag: {rest[1:]}"
"""


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
  """All Python blocks, one after the other in one namespace, in an empty folder."""
  assert PYTHON
  monkeypatch.chdir(tmp_path)
  namespace = {"__name__": "readme"}
  for number, block in enumerate(PYTHON, 1):
    exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)


def test_there_are_commands():
  """The README shows how to train and how to predict."""
  assert {"experiments.train", "experiments.predict"} <= {module_of(line) for line in COMMANDS}


def module_of(line):
  return re.search(r"-m ([\w.]+)", line)[1]


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.partition(" -m ")[2][:60])
def test_command_lines_parse(line):
  """The module of every `python -m` line exists and knows each of its flags."""
  module = module_of(line)
  assert importlib.util.find_spec(module), module
  words = shlex.split(line.partition(f"-m {module}")[2].replace("DIR", "folder"))
  ended = subprocess.run(
    [sys.executable, "-c", PARSE, module, *words],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ended.returncode == 0, ended.stderr + ended.stdout


def test_make_targets_exist():
  """Every `make TARGET` that the README names is in the Makefile."""
  targets = set(re.findall(r"`make (\w+)", README)) | set(
    re.findall(r"^make (\w+)", "\n".join(LINES), re.MULTILINE)
  )
  assert "quickstart" in targets
  known = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  assert targets <= known


def test_links_lead_somewhere():
  """Every file that the README links to is there."""
  links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
  assert [link for link in links if not (ROOT / link).exists()] == []
