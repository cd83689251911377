"""Every config file resolves for each of its arguments, and a step of it makes sense."""

import collections
import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from configs.sweeps import learning_rate
from experiments.sweeping import trials
from peftjax import data, linen, optim, sharding
from peftjax.core import tree
from peftjax.models import bert
from peftjax.training import defaults, state, step
from peftjax.training.classification import CLASSES
from peftjax.training.settings import from_config
from tests import tiny

RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results" / "sweeps"
FOLDER = pathlib.Path(__file__).parents[1] / "configs"
OTHERS = {"__init__", "arguments", "from_scratch"}  # not of experiments.train
FILES = sorted({path.stem for path in FOLDER.glob("*.py")} - OTHERS)
METHODS = defaults.names()
# What each argument of a file may be; a new file adds a line.
ARGUMENTS = {
  "classify": [
    *(f"method={method},data=bbc" for method in (*METHODS, "head", "full", "bitfit")),
    *(f"data={name}" for name in ("sentiment", "glue/cola", "glue/stsb", "files")),
    "",
  ],
  "causal_lm": [
    *(f"method={method},model=smollm2,quant=none,data=bbc" for method in (*METHODS, "full")),
    *(f"quant={name}" for name in ("nf4", "nf4_textbook", "lloyd_max", "fp4", "int4", "int8")),
    "data=files",
    "data=e2e",
    "",
  ],
  "tag": ["method=lora", "method=bitfit", ""],
  "answer": ["method=adalora", "method=full", ""],
}
CASES = [(name, argument) for name in FILES for argument in ARGUMENTS[name]]


def get_config(name, argument=""):
  return importlib.import_module(f"configs.{name}").get_config(argument)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_config_resolves_to_settings(name, argument):
  """It has the argument's method and data, names no unknown key, and survives JSON."""
  config = get_config(name, argument)
  settings = from_config(config)
  given = dict(part.split("=") for part in argument.split(",") if part)
  if name in ("classify", "causal_lm"):
    assert settings.data.name == given.get("data", "bbc")
    assert settings.data.name in data.corpora.NAMES
  settings.build_method()
  settings.model.options()
  assert (settings.quant.format() is None) == (settings.quant.name == "none")
  again = type(config)(json.loads(config.to_json()))
  assert json.loads(again.to_json()) == json.loads(config.to_json())
  from_config(again).build_method()


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_setting_a_field_leaves_the_next_config_alone(name, argument):
  """Two calls share nothing, the references of their placeholders included."""
  before, config = get_config(name, argument).to_json(), get_config(name, argument)
  for section in config.values():
    if isinstance(section, type(config)):
      for field in section:
        section[field] = {str: "changed", int: 7, float: 0.7, bool: True}.get(
          section.get_type(field), section[field]
        )
  assert config.to_json() != before
  assert get_config(name, argument).to_json() == before


@pytest.mark.parametrize(
  ("name", "results", "score"),
  [("classify", "learning_rate", "accuracy"), ("causal_lm", "learning_rate_lm", "perplexity")],
)
def test_learning_rates_are_the_best_of_the_committed_sweep(name, results, score):
  """On validation; of two that tie within half a percent (of perplexity one), the lower."""
  tie = 0.01 if score == "perplexity" else 0.005
  lines = collections.defaultdict(dict)
  for row in map(json.loads, (RESULTS / f"{results}.jsonl").read_text().splitlines()):
    given = row["overrides"]
    changes = {key: x for key, x in given.items() if key.startswith("method.")}
    reached = row["metrics"]["validation"][score] * (-1 if score == "perplexity" else 1)
    line = lines[given["base"].split("=")[1].partition(",")[0], json.dumps(changes)]
    line[given["optimizer.learning_rate"]] = reached
  expected = importlib.import_module(f"configs.{name}").LEARNING_RATES
  for (method, changes), line in lines.items():
    if not any(apart in changes for apart in ("scaled_parallel", "gamma", "form")):
      best = max(line.values())
      assert expected[method] == min(r for r, x in line.items() if x >= best - tie * abs(best))
  unswept = {"full", "dora", "prefix", "prompt"} if name == "causal_lm" else set()
  assert {method for method, _ in lines} == set(expected) - unswept


@pytest.mark.parametrize(
  ("task", "results"), [("classify", "learning_rate"), ("causal_lm", "learning_rate_lm")]
)
def test_the_sweep_of_learning_rates_has_the_committed_trials(task, results, monkeypatch):
  """Each once, and every one fits its base."""
  monkeypatch.chdir(FOLDER.parent)
  made = trials.expand(learning_rate.get_config(f"task={task}"))
  rows = map(json.loads, (RESULTS / f"{results}.jsonl").read_text().splitlines())
  asked = lambda overrides: json.dumps(overrides, sort_keys=True)
  assert sorted(asked(trial.overrides) for trial in made) == sorted(
    asked(row["overrides"]) for row in rows
  )
  with pytest.raises(ValueError, match="task=classify or task=causal_lm, not 'task=clasify'"):
    learning_rate.get_config("task=clasify")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("argument", ["method=loar", "dta=bbc", "bbc"])
def test_wrong_argument_is_quoted(name, argument):
  """An argument that a config file does not take raises and is quoted."""
  with pytest.raises(ValueError, match=argument.rpartition("=")[2]):
    get_config(name, argument)


@pytest.mark.parametrize("name", FILES)
def test_header_says_command_hardware_time_and_number(name):
  """Whoever opens a config file reads how to run it, on what, how long, and what to expect."""
  header = importlib.import_module(f"configs.{name}").__doc__
  assert f"python -m experiments.train --config=configs/{name}.py" in header
  score = {"classify": "accuracy", "causal_lm": "perplexity"}.get(name, "F1")
  for word in ("CPU", "minutes", score):
    assert word in header


@pytest.mark.fast_for("lora|adalora|prefix|full")
@pytest.mark.parametrize("method", [*METHODS, "head", "full", "bitfit"])
def test_init_and_one_step_of_each_method(method):
  """Abstractly, a step keeps every shape and dtype, and trains what the method says."""
  settings = from_config(get_config("classify", f"method={method},data=bbc"))
  model = bert.BertClassifier(bert.BertConfig.from_hf(tiny.HF_CONFIG, labels=5))
  made, key = settings.build_method(), jax.random.key(0)
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
  params = made.attach(key, params, linen.layout(model, tokens))
  train, frozen = tree.partition(params, made.trainable(params))
  o = settings.optimizer
  schedule = optim.schedule(o.schedule, o.learning_rate, 100, o.warmup_steps(100))
  tx = made.optimizer(optim.adamw(schedule), 100, clip_norm=o.clip_norm, accumulate=o.accumulate)
  current = jax.eval_shape(functools.partial(state.init, tx), train)
  rows = settings.train.batch_size
  batch = {
    **{name: jax.ShapeDtypeStruct((rows, 32), np.int32) for name in ("tokens", "types")},
    "mask": jax.ShapeDtypeStruct((rows, 32), np.bool_),
    "labels": jax.ShapeDtypeStruct((rows,), np.int32),
    "weights": jax.ShapeDtypeStruct((rows,), np.float32),
  }
  run = functools.partial(step.train_step, model, tx, CLASSES)
  after, out = jax.eval_shape(run, current, frozen, batch, key)
  assert jax.tree.structure(after) == jax.tree.structure(current)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), current
  )
  logged = {"loss", "grad_norm"} | ({"orthogonality", "budget"} if method == "adalora" else set())
  assert {name: x.shape for name, x in out.items()} == dict.fromkeys(logged, ())
  trained = {
    "lora": 4 * 8 * 32 + 85,
    "head": 85,
    "full": tree.count(params),
    "bitfit": 85 + sum(v.size for p, v in tiny.weights(0).items() if p.endswith("/bias")) - 2,
  }
  assert tree.count(train) == trained.get(method, tree.count(train)) > 0
  sharding.specs(params, sharding.make_mesh("data:2,fsdp:2,tensor:2"))


def test_scales_of_eight_bit_weights_stay_whole():
  """`pj.quant.int8` advises against quantising them in turn; all else does."""
  for quant in ("int8", "nf4"):
    settings = from_config(get_config("causal_lm", f"quant={quant}"))
    assert settings.quant.format() == getattr(pj.quant, quant)()
