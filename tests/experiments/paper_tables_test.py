"""`experiments.tables NAME --paper_scale`: every table names runs that can be made."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs.paper import lora_roberta
from experiments.tables import __main__ as tables
from experiments.tables import paper
from peftjax.training.settings import DATA, from_config

FOLDERS = Path("models"), Path("data")
MADE = [name for name, table in paper.TABLES.items() if not isinstance(table, str)]
WAITING = () if "seq2seq" in DATA else ("qlora_t5", "glu_t5")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("name", MADE)
def test_the_commands_of_a_table_parse(name, monkeypatch):
  """The first and the last of each part: every flag is there and fits, the config's too."""
  for part in paper.TABLES[name]:
    if part.config in WAITING:
      continue
    first, *_, last = [*part.all(*FOLDERS)] * 2
    for run in (first, last):
      python, m, module, *words = shlex.split(paper.command(run, Path("runs")))
      assert (python, m, module) == ("python", "-m", "experiments.train")
      monkeypatch.setattr(sys, "argv", [module, *words])
      values = flags.FlagValues()
      config_flags.DEFINE_config_file("config", flag_values=values)
      flags.DEFINE_string("workdir", None, "", flag_values=values)
      assert values(sys.argv) == [module]
      settings = from_config(values.config)
      assert str(settings.model.directory) == run["model.directory"]
      assert settings.seed == run["seed"]


@pytest.mark.parametrize("name", MADE)
def test_every_run_of_a_table_is_another(name):
  """And all of them name a model, data and a seed."""
  listed = paper.runs(name, *FOLDERS)
  assert len({json.dumps(run) for run in listed}) == len(listed) > 0
  for run in listed:
    assert {"base", "model.directory", "seed"} < run.keys()
    assert any(key.startswith("data.") for key in run)
    assert "{" not in json.dumps([*run.values()])


def test_a_dry_run_prints_the_commands(capsys, monkeypatch):
  monkeypatch.setattr(tables, "PAPER", type("Flag", (), {"value": True}))
  for flag, value in (("DRY_RUN", True), ("MODELS", "m"), ("DATA", "d"), ("WORKDIR", "runs")):
    monkeypatch.setattr(tables, flag, type("Flag", (), {"value": value}))
  tables.at_paper_scale(["", "lora_2"])
  lines = capsys.readouterr().out.splitlines()
  own = [line for line in lines if "lora_roberta.py" in line]
  assert len(own) == len(lora_roberta.TASKS) * len(lora_roberta.MODELS) * 5
  assert own[0] == (
    "python -m experiments.train --config=configs/paper/lora_roberta.py:model=base,task=rte "
    "--config.model.directory=m/roberta-base --config.data.glue_dir=d/glue --config.seed=0 "
    "--workdir=runs/lora_2/000"
  )


def test_what_cannot_be_made_says_why():
  with pytest.raises(ValueError, match="adalora_3 cannot be made here. BART is no family"):
    paper.runs("adalora_3", *FOLDERS)
  with pytest.raises(ValueError, match="unified_2 needs models/roberta-base, data/glue: put"):
    paper.sweep("unified_2", *FOLDERS)


def test_with_models_and_data_there_the_runs_are_a_sweep(tmp_path):
  """Whose trials are the runs, each with its seed."""
  from experiments.sweeping import trials

  (tmp_path / "models" / "roberta-base").mkdir(parents=True)
  (tmp_path / "glue").mkdir()
  listed = trials.expand(paper.sweep("unified_2", tmp_path / "models", tmp_path))
  assert len(listed) == 2 * 5 * 5 and {one.config.seed for one in listed} == set(range(5))
