"""What README and docs show works: Python blocks run, commands parse, links lead somewhere."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from peftjax.training.settings import Model
from tests import method_contract_test as contract
from tests import tiny
from tests.structure_test import LAYERS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "generated" not in p.parts),
]
BLOCK = re.compile(r"^```(\{code-cell\} )?(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON, SHELL = ("python", "py", "ipython3"), ("sh", "bash", "shell", "console")

# Parses the flags of a JSON list of commands, as each would, and goes no further. Flags are parsed
# once in a process, so each command has its own, a copy of this one with most imported.
PARSE = """
import json, os, runpy, sys
from absl import app
from experiments import runtime
import peftjax.training.settings

def parse(main, flags_parser):
  rest = flags_parser(sys.argv)
  assert not [x for x in rest[1:] if x.startswith("-")], f"not a flag: {rest[1:]}"
  os._exit(0)  # without a second to tear all down

app.run = parse
failed = []
for command in json.loads(sys.argv[1]):
  if not os.fork():
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    sys.exit("does not parse its flags by app.run")
  if os.wait()[1]:
    failed.append(command)
sys.exit(f"these do not parse: {failed}" if failed else 0)
"""


def blocks(page, languages):
  """The code blocks of a page."""
  return [text for _, language, text in BLOCK.findall(page.read_text()) if language in languages]


def lines(page):
  """The lines of its shell blocks, continuation lines put together."""
  texts = (text.replace("\\\n", " ") for text in blocks(page, SHELL))
  return [line.strip() for text in texts for line in text.splitlines()]


def name(page):
  return str(page.relative_to(ROOT))


def with_python():
  slow = pytest.mark.slow(reason="`make docs` runs it too")
  for page in PAGES:
    if blocks(page, PYTHON):
      yield pytest.param(page, marks=[slow] * ("notebooks" in page.parts))


COMMANDS = [
  line
  for line in dict.fromkeys(line for page in PAGES for line in lines(page))
  if re.search(r"\bpython3? -m experiments\b", line)
]
MODULES = sorted({re.search(r"-m ([\w.]+)", line)[1] for line in COMMANDS})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tiny.model_dir(tmp_path_factory.mktemp("docs") / "model")


@pytest.mark.parametrize("page", list(with_python()), ids=name)
def test_python_blocks_run_in_order(page, directory, tmp_path, monkeypatch):
  """One after the other in one namespace, in a folder with nothing but a ViT, on a tiny model."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "vit").symlink_to(ROOT / "tests" / "golden" / "image_vit")
  monkeypatch.setattr(Model, "path", lambda self: directory)
  # A dataclass looks its module up.
  monkeypatch.setitem(sys.modules, "page", module := type(sys)("page"))
  for number, block in enumerate(blocks(page, PYTHON), 1):
    exec(compile(block, f"{name(page)}, Python block {number}", "exec"), module.__dict__)


def test_there_are_commands():
  """The pages show how to train, to predict, to write and to sweep."""
  wanted = {f"experiments.{name}" for name in ("train", "predict", "generate", "sweep", "plan")}
  assert wanted <= set(MODULES)


def test_command_lines_parse():
  """The module of every `python -m` line exists and knows each flag, the config's too."""
  found = [shlex.split(line.partition("python -m ")[2], comments=True) for line in COMMANDS]
  assert all(found), COMMANDS
  ended = subprocess.run(
    [sys.executable, "-c", PARSE, json.dumps(found)],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ended.returncode == 0, ended.stderr + ended.stdout


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
  """Every `make TARGET` that a page names is in the Makefile."""
  targets = set(re.findall(r"`make (?:\w+=\S+ )*([a-z-]+)", page.read_text())) | {
    found[1] for line in lines(page) if (found := re.match(r"make (?:\w+=\S+ )*([a-z-]+)", line))
  }
  known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  assert targets <= known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_exist(page):
  """Every file that a page links to, and every script of a shell line, is there."""
  links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
  assert [link for link in links if not (page.parent / link).exists()] == []
  scripts = [word for line in lines(page) for word in re.findall(r"\blaunch/[\w.]+", line)]
  assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_readme_is_short():
  """Everything else is a page."""
  assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_matrix_has_exactly_the_subjects_that_exist():
  """`make matrix` was run since a method came or went."""
  kept = json.loads((ROOT / "docs" / "matrix.json").read_text())
  there = {
    f"{entry.name}-{layers}"
    for entry in contract.ENTRIES
    for layers in (*entry.layers, *entry.slow)
  }
  assert set(kept["method_contract_test"]) == there
  laws = {name for name in vars(contract) if name.startswith("test_law_")}
  assert {law for tests in kept["method_contract_test"].values() for law in tests} == laws


def test_every_public_name_of_a_method_has_a_page():
  """In docs/methods each entry of a config's methods is documented from its docstring."""
  from peftjax.training.settings import METHODS

  shown = "".join(page.read_text() for page in (ROOT / "docs" / "methods").glob("*.md"))
  assert [m for m in METHODS if f"autofunction:: peftjax.{m}\n" not in shown] == []


def test_what_pages_include_is_made(tmp_path):
  """docs/generate.py writes every fragment that a page includes, from the committed results."""
  spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
  generate = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(generate)
  generate.write(tmp_path)
  texts = "".join(page.read_text() for page in PAGES)
  wanted = set(re.findall(r"\{include\} \S*?generated/(\S+)", texts))
  assert wanted
  made = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.md")}
  assert [part for part in wanted if "|" not in made.get(part, "")] == []
  with pytest.raises(ValueError, match="0 files none.jsonl"):
    generate.result("none.jsonl")


def test_the_diagram_draws_the_layers_of_imports():
  """docs/architecture.md has the folders in the order that tests/structure_test.py holds."""
  text = (ROOT / "docs" / "architecture.md").read_text()
  drawn = next(block for _, language, block in BLOCK.findall(text) if language == "text")
  lines = [re.findall(r"\w+", line.partition("   ")[0]) for line in drawn.splitlines()]
  below = [name for line in reversed(lines) for name in line]
  assert below == [*(name for name in LAYERS if name != "__init__"), "experiments"]
