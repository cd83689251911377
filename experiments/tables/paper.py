"""The papers' tables at full size: which runs of configs/paper each consists of.

Models and data are not here: a model is looked for in a folder of `--models`, named as on the
Hugging Face hub less its organisation, and data below `--data`, under the names below.
"""

from __future__ import annotations

import importlib
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.tables.runs import Overrides

FIVE, THREE, ONE = (0, 1, 2, 3, 4), (0, 1, 2), (0,)
GLUE = {"glue_dir": "glue"}
SQUAD = {
  "train_file": "squad/train-v{version}.json",
  "validation_file": "squad/dev-v{version}.json",
}
E2E = {
  "train_file": "e2e/trainset.csv",
  "validation_file": "e2e/devset.csv",
  "test_file": "e2e/testset_w_refs.csv",
}
DEBERTA = "deberta-v3-base"


class Runs(NamedTuple):
  """Runs of one file of configs/paper: all of its choices, as far as they are not narrowed.

  Attributes:
    config: the file's name.
    models: folders of models, all of them; or by what its first choice may be.
    data: files and folders by field of the data's section; {...} stands for a choice.
    seeds: of each run.
    only: of some choices, the values that the table has.
    grid: values of fields that the paper searched among.
  """

  config: str
  models: tuple[str, ...] | Mapping[str, str]
  data: Mapping[str, str]
  seeds: Sequence[int] = FIVE
  only: Mapping[str, tuple[str, ...]] = {}
  grid: Mapping[str, tuple[Any, ...]] = {}

  def all(self, models: Path, data: Path) -> Iterator[Overrides]:
    """Every run as the overrides of a sweep's trial, the seed among them."""
    choices = {**importlib.import_module(f"configs.paper.{self.config}").CHOICES, **self.only}
    for values in itertools.product(*choices.values()):
      given = dict(zip(choices, values, strict=True))
      argument = ",".join(f"{name}={value}" for name, value in given.items())
      names = self.models if isinstance(self.models, tuple) else (self.models[values[0]],)
      files = {
        f"data.{field}": str(data / name.format(**given)) for field, name in self.data.items()
      }
      for name, *found, seed in itertools.product(names, *self.grid.values(), self.seeds):
        yield {
          "base": f"configs/paper/{self.config}.py" + f":{argument}" * bool(argument),
          "model.directory": str(models / name),
          **files,
          **dict(zip(self.grid, found, strict=True)),
          "seed": seed,
        }


_ROBERTA = {"base": "roberta-base", "large": "roberta-large", "large-restricted": "roberta-large"}
_LLAMA = {size: f"llama-{size}" for size in ("7b", "13b", "33b", "65b")}
_T5 = {size: f"t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")}
_ABLATION = ("adalora_ablation", (DEBERTA,), GLUE, FIVE)
_CHOSEN = {
  "optimizer.learning_rate": (3e-5, 3e-4, 3e-3),
  "train.epochs": (3.0, 20.0),
}

# What each table consists of, or why it cannot be made here.
TABLES: Mapping[str, tuple[Runs, ...] | str] = {
  "lora_2": (
    Runs("lora_roberta", _ROBERTA, GLUE),
    Runs("adapters_roberta", ("roberta-large",), GLUE),
    Runs("lora_deberta", ("deberta-v2-xxlarge",), GLUE),
  ),
  "lora_3": (
    Runs(
      "lora_gpt2", ("gpt2-medium", "gpt2-large"), E2E, THREE, {"task": ("e2e",), "rank": ("4",)}
    ),
  ),
  "lora_4": "GPT-3's weights are not public; which_matrices and rank are its small tables.",
  "lora_5": "GPT-3's weights are not public; see `experiments.tables which_matrices`.",
  "lora_6": "GPT-3's weights are not public; see `experiments.tables rank`.",
  "lora_18": (Runs("lora_gpt2", ("gpt2-medium",), E2E, ONE, {"task": ("e2e",)}),),
  "adalora_1": (
    Runs("adalora_glue", (DEBERTA,), GLUE, only={"budget": ("576", "144")}),
    *(
      Runs("adalora_baselines", (DEBERTA,), GLUE, only={"method": methods, "budget": budgets})
      for methods, budgets in (
        (("full", "bitfit"), ("576",)),
        (("houlsby", "pfeiffer"), ("576", "288", "144")),
        (("lora",), ("576", "144")),
      )
    ),
  ),
  "adalora_2": (Runs("adalora_squad", (DEBERTA,), SQUAD, ONE),),
  "adalora_3": "BART is no family of models here, and its tables are not made.",
  "adalora_4": (
    Runs(
      *_ABLATION,
      {
        "variant": ("adalora", "prune-lora", "sensitivity", "magnitude"),
        "task": ("sst2", "rte", "cola"),
        "budget": ("72", "144", "576"),
      },
    ),
  ),
  "adalora_5": (
    Runs(
      *_ABLATION,
      {
        "variant": ("adalora", "lora-regu", "svd-lora", "no-penalty"),
        "task": ("sst2", "mnli"),
      },
    ),
  ),
  "adalora_14": (
    Runs(
      "adalora_baselines",
      (DEBERTA,),
      GLUE,
      only={"method": ("lora", "lora-qv"), "budget": ("144",)},
    ),
  ),
  "qlora_2": "Pile-CC and the models of table 2 (OPT, BLOOM, Pythia) are not read here; see "
  "`experiments.tables datatypes`.",
  "qlora_3": (
    Runs("qlora_glue", ("roberta-large",), GLUE, ONE),
    Runs("qlora_t5", _T5, {"train_file": "sni/train.jsonl"}, ONE),
  ),
  "qlora_4": tuple(
    Runs("qlora_llama", _LLAMA, {"train_file": f"{name}/train.jsonl"}, ONE, {"data": ("all",)})
    for name in ("alpaca", "flan_v2")
  ),
  "qlora_5": (
    Runs(
      "qlora_llama",
      _LLAMA,
      {"train_file": "{data}/train.jsonl"},
      ONE,
      {"data": ("oasst1", "hh-rlhf", "longform"), "quant": ("nf4",)},
    ),
    *(
      Runs(
        "qlora_llama",
        _LLAMA,
        {"train_file": f"{name}/train.jsonl"},
        ONE,
        {"data": ("all",), "quant": ("nf4",)},
      )
      for name in ("self_instruct", "chip2", "unnatural", "alpaca", "flan_v2")
    ),
  ),
  "houlsby_1": (Runs("houlsby_bert", ("bert-large-uncased",), GLUE, grid=_CHOSEN),),
  "pfeiffer_3": (Runs("pfeiffer_bert", ("bert-base-uncased",), GLUE, ONE),),
  "pfeiffer_4": (
    Runs("pfeiffer_bert", ("roberta-base",), GLUE, ONE, {"factor": ("2", "16", "64")}),
  ),
  "unified_2": (Runs("unified_roberta", ("roberta-base",), GLUE),),
  "unified_3": "BART is no family of models here, and its tables are not made.",
  "unified_5": "BART is no family of models here, and its tables are not made.",
  "unified_6": "BART is no family of models here, and its tables are not made.",
  "bitfit_1": (Runs("bitfit_bert", ("bert-large-cased",), GLUE),),
  "glu_1": "Pretraining on C4 is not here; see `experiments.tables ffn`.",
  **dict.fromkeys(
    ("glu_2", "glu_3", "glu_4"),
    (Runs("glu_t5", ("t5-v1_1-base",), {"train_file": "t5_mixture/train.jsonl"}, ONE),),
  ),
  "dora_1": (
    Runs(
      "dora_llama",
      {"llama-7b": "llama-7b", "llama-13b": "llama-13b"}
      | {"llama2-7b": "Llama-2-7b-hf", "llama3-8b": "Meta-Llama-3-8B"},
      {"train_file": "commonsense_170k.jsonl"},
      ONE,
    ),
  ),
  "ia3_4": (
    Runs("ia3_few_shot", ("Llama-2-7b-hf",), {"train_file": "few_shot/train.jsonl"}, FIVE),
  ),
}


def runs(name: str, models: Path, data: Path) -> list[Overrides]:
  """Every run of a table.

  Raises:
    ValueError: the table cannot be made here, with the reason.
  """
  table = TABLES[name]
  if isinstance(table, str):
    raise ValueError(f"{name} cannot be made here. {table}")
  return [run for part in table for run in part.all(models, data)]


def command(run: Overrides, workdir: Path) -> str:
  """The command line of a run."""
  fields = [f"--config.{key}={value}" for key, value in run.items() if key != "base"]
  words = [f"--config={run['base']}", *fields, f"--workdir={workdir}"]
  return shlex.join(["python", "-m", "experiments.train", *words])


def sweep(name: str, models: Path, data: Path) -> ConfigDict:
  """The runs as a sweep's config.

  Raises:
    ValueError: the table cannot be made here, or a model or data are not where they should be.
  """
  listed = runs(name, models, data)
  places = ("model.directory", *(f"data.{field}" for field in (*GLUE, *E2E)))
  needed = dict.fromkeys(run[key] for run in listed for key in places if key in run)
  if missing := [path for path in needed if not Path(path).exists()]:
    raise ValueError(
      f"{name} needs {', '.join(missing)}: put models there as transformers saves them, with "
      "model.safetensors and tokenizer.json, and data in the official files; or name other folders "
      "by --models and --data"
    )
  return ConfigDict(dict(trials=tuple(listed)))
