"""A new method is one file and one line: the page that says so is followed to the letter."""

import importlib.util
import inspect
import json
import pathlib
import runpy
import sys

import jax
import pytest
from ml_collections import ConfigDict

from experiments.sweeping import trials
from peftjax import hf_peft
from peftjax.core import paths
from peftjax.methods import registry
from peftjax.training import settings
from tests import method_contract_test as contract
from tests.docs_test import BLOCK, PYTHON

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "write_a_method.md"
FIELDS = {"rank", "alpha", "targets", "dropout", "rank_pattern", "alpha_pattern", "divide_rank"}
FIELDS |= {"dtype", "gain"}


@pytest.fixture
def hadamard(tmp_path, monkeypatch):
  """The class of the page's blocks, as a file of its own, with its line in the registry."""
  blocks = [text for _, language, text in BLOCK.findall(PAGE.read_text()) if language in PYTHON]
  path = tmp_path / "hadamard.py"
  path.write_text("\n\n".join(blocks))
  spec = importlib.util.spec_from_file_location("hadamard", path)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, "hadamard", module)
  spec.loader.exec_module(module)
  monkeypatch.setitem(registry.METHODS, "hadamard", module.HadamardMethod)
  monkeypatch.delitem(registry.METHODS, "loha")  # which has the same files
  return module.HadamardMethod


def subject(hadamard):
  trains = r".*/(query|value)/kernel/[ab][12]"
  other = lambda: hadamard(2, 3)
  return contract.Subject(contract.Entry("hadamard", lambda: hadamard(4, 8), trains, other), True)


def obey(laws, subject, tmp_path):
  given = {"subject": subject, "record_property": lambda *_: None}
  for i, law in enumerate(laws):
    takes = inspect.signature(law).parameters
    own = {"tmp_path": tmp_path / str(i)} if "tmp_path" in takes else {}
    law(**own, **{name: value for name, value in given.items() if name in takes})


def laws(*numbers):
  known = {"subject", "record_property", "tmp_path"}
  every = [fn for name, fn in vars(contract).items() if name.startswith("test_law_")]
  mine = [fn for fn in every if {*inspect.signature(fn).parameters} <= known]
  return [fn for fn in mine if not numbers or int(fn.__name__.split("_")[2]) in numbers]


def test_a_config_and_a_sweep_know_it_and_its_directory_is_read_again(hadamard, tmp_path):
  get_config = runpy.run_path(str(ROOT / "configs" / "classify.py"))["get_config"]
  config = get_config("method=hadamard,data=bbc")
  assert {*config.method} == FIELDS | {"name", "head"}
  config.method.gain = 0.5
  chained = settings.from_config(config).build_method()
  assert chained.methods[0] == hadamard(gain=0.5)
  base = "configs/classify.py:method=hadamard,data=bbc"
  sweep = ConfigDict({"base": base, "grid": {"method.gain": (0.5, 2.0)}}, convert_dict=False)
  assert [t.config.method.gain for t in trials.expand(sweep)] == [0.5, 2.0]
  found = subject(hadamard)
  obey(laws(1, 2, 3, 10), found, tmp_path)
  hf_peft.save(tmp_path / "peft", found.live, found.model)
  assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LOHA"
  loaded, mask = hf_peft.load(tmp_path / "peft", found.params, found.model)
  read = [type(leaf) for leaf in paths.leaves(loaded).values() if type(leaf) is hadamard.leaf]
  assert len(read) == 2 and sum(jax.tree.leaves(mask)) >= 4 * len(read)


@pytest.mark.slow(reason="every law once more; tests/method_contract_test.py has LoHa")
def test_it_obeys_every_law(hadamard, tmp_path):
  obey(laws(), subject(hadamard), tmp_path)
