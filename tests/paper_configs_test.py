"""The papers' full-size settings resolve, build their methods and count what the papers print."""

import importlib
import itertools
import json
import pathlib

import jax
import pytest

import peftjax as pj
from configs.paper import adalora_glue, adalora_squad
from experiments.tables import abstract_models
from peftjax import data
from peftjax.training.settings import DATA, from_config

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "paper"
FILES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__"})
# Files of a task that this version does not have.
WAITING = set() if "seq2seq" in DATA else {"qlora_t5", "glu_t5"}


def module(name):
  return importlib.import_module(f"configs.paper.{name}")


def arguments(name):
  """Every argument that a file takes."""
  choices = module(name).CHOICES
  named = [[f"{key}={value}" for value in values] for key, values in choices.items()]
  return [",".join(parts) for parts in itertools.product(*named)]


CASES = [(name, argument) for name in FILES if name not in WAITING for argument in arguments(name)]


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_paper_config_resolves_and_builds(name, argument):
  """It names no unknown key, and survives JSON."""
  config = module(name).get_config(argument)
  settings = from_config(config)
  settings.build_method()
  settings.model.options()
  settings.quant.format()
  assert getattr(settings.data, "name", "files") in data.corpora.NAMES
  again = type(config)(json.loads(config.to_json()))
  assert json.loads(again.to_json()) == json.loads(config.to_json())
  from_config(again).build_method()


@pytest.mark.parametrize("name", sorted(set(FILES) - WAITING))
def test_first_choice_is_the_default(name):
  config, first = module(name).get_config(), module(name).get_config(arguments(name)[0])
  assert config.to_json() == first.to_json()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("argument", ["tusk=rte", "rte"])
def test_wrong_paper_argument_is_quoted(name, argument):
  with pytest.raises(ValueError, match=argument):
    module(name).get_config(argument)


def test_wrong_value_lists_the_choices():
  with pytest.raises(ValueError, match=r"task='wnli' is not one of rte, mrpc"):
    module("lora_roberta").get_config("task=wnli")


@pytest.mark.parametrize("name", FILES)
def test_paper_header_says_what_one_has_to_know(name):
  """Command, hardware, time, what to expect from which table, and what differs here."""
  header = module(name).__doc__
  assert f"python -m experiments.train --config=configs/paper/{name}.py" in header
  for word in ("arxiv", "table", "hardware", "time", "seeds", "differences", "--workdir"):
    assert word in header.lower()
  for choice in module(name).CHOICES:
    assert f"{choice}: " in header


@pytest.mark.parametrize("argument", arguments("adalora_squad"))
def test_adalora_schedule_fits_squad(argument):
  settings = from_config(adalora_squad.get_config(argument))
  if settings.method["name"] == "adalora":
    row = adalora_squad.ROWS[argument.split(",")[0].removeprefix("version=")]
    settings.build_method().outer(row.total)


@pytest.mark.parametrize("argument", arguments("adalora_glue"))
def test_adalora_schedule_fits_the_paper_s_updates(argument):
  settings = from_config(adalora_glue.get_config(argument))
  row = adalora_glue.ROWS[argument.split(",")[0].removeprefix("task=")]
  assert settings.method["warmup"] + settings.method["final"] < row.total
  assert settings.optimizer.warmup_steps(row.total) < row.total
  settings.build_method().outer(row.total)


@pytest.mark.parametrize(
  ("name", "argument", "model", "trained"),
  [
    ("lora_roberta", "model=base", "RoBERTa-base", 294_912),
    ("lora_roberta", "model=large", "RoBERTa-large", 786_432),
    ("adalora_glue", "budget=144", "RoBERTa-base", 2 * (331_776 + 144)),  # at first, of rank 4
    ("qlora_llama", "size=7b", "LLaMA-7B", 159_907_840),
    ("dora_llama", "model=llama-13b,rank=16", "LLaMA-13B", 45_281_280),
    ("bitfit_bert", "", "RoBERTa-base", 102_144),
    ("lora_deberta", "", "DeBERTaV2-XXL", 4_718_592),
    ("adalora_baselines", "method=lora,budget=576", "DeBERTaV3-base", 1_327_104),
    ("adalora_baselines", "method=lora,budget=144", "DeBERTaV3-base", 331_776),
    ("adalora_baselines", "method=lora-qv,budget=144", "DeBERTaV3-base", 294_912),
    ("adalora_baselines", "method=houlsby,budget=144", "DeBERTaV3-base", 313_536),
    ("adalora_baselines", "method=pfeiffer,budget=576", "DeBERTaV3-base", 1_189_632),
    ("adalora_squad", "method=lora,budget=72", "DeBERTaV3-base", 165_888),
    ("houlsby_bert", "size=64", "BERT-large", 6_444_032),
    ("ia3_few_shot", "", "LLaMA-7B", 32 * (2 * 4096 + 11008)),
  ],
)
def test_paper_config_trains_what_the_paper_counts(name, argument, model, trained):
  """Beside the head, which the papers do not count."""
  params, layout = abstract_models.shapes_of(model)
  params = {**params, "head": {"kernel": jax.ShapeDtypeStruct((1, 1), "float32")}}
  method = from_config(module(name).get_config(argument)).build_method()
  attached = method.attach(jax.random.key(0), params, layout)
  mask = method.trainable(attached)
  assert pj.count(attached, {**mask, "head": {"kernel": False}}) == trained
