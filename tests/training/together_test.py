"""Runs trained together do what each does alone."""

import functools
import json

import jax
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import tree
from peftjax.methods.swap import cut_ranks
from peftjax.training.loop import train_and_evaluate
from peftjax.training.predict import Predictor
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from peftjax.training.together import Together, group_of, train_together
from tests import tiny

# What differs from run to run.
VARIED = (
  {"seed": 0, "method.rank": 4, "method.alpha": 8.0, "optimizer.learning_rate": 2e-2},
  {"seed": 1, "method.rank": 2, "method.alpha": 16.0, "optimizer.learning_rate": 1e-2},
  {"seed": 2, "method.rank": 3, "method.alpha": 4.0, "optimizer.learning_rate": 5e-3},
)
METHODS = {
  "lora": {"method.dropout": 0.1},
  "rslora": {"method.rslora": True},
  "dora": {},
  "adalora": {"method.interval": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("together")
  return tiny.model_dir(folder / "model"), tiny.corpus(folder / "train.csv")


def configs(files, name, count=3, **more):
  made = []
  for i, varied in enumerate(VARIED[:count]):
    method = name if name != "rslora" else "lora"
    config = tiny.config(*files, method)
    # One length is one program of a step; two are tested once. The programs round differently, and
    # of a tiny gradient's rounding Adam makes a whole step, unless eps is larger.
    common = {"train.steps": 10, "data.max_length": 16, "data.split_seed": 0, "optimizer.eps": 1e-5}
    config.update_from_flattened_dict({**METHODS[name], **varied, **common, **more})
    if name == "adalora":
      config.method.target_rank = (2.0, 1.0, 1.5)[i]
    made.append(config)
  return made


def changed(length, accumulate):
  return {"data.max_length": length, "optimizer.accumulate": accumulate}


@pytest.fixture(scope="module")
def alone(files):
  """Each run by itself: its parameters before and after, and its adapter; of all tests the same."""

  @functools.cache
  def train(name, count, length, accumulate):
    made = []
    for config in configs(files, name, count, **changed(length, accumulate)):
      run = Run(from_config(config), None)
      before = jax.device_get(tree.combine(run.state.train, run.frozen))
      for _ in run.steps():
        pass
      after = jax.device_get(tree.combine(run.state.train, run.frozen))
      trained = [jax.tree.leaves(tree.partition(p, run.mask)[0]) for p in (before, after)]
      moved = max(float(np.abs(x - y).max()) for x, y in zip(*trained, strict=True))
      made.append((run.adapter()["adapter"], moved))
    return made

  return train


_SLOW = pytest.mark.slow(reason="the same laws for more settings; 10 to 20 s each")


@pytest.mark.parametrize(
  ("name", "count", "chunk", "length", "accumulate"),
  [
    pytest.param("lora", 2, 2, 32, 1, marks=_SLOW),
    # Two updates of four batches, and one of two.
    pytest.param("adalora", 2, 1, 16, 4, marks=_SLOW),
    *(
      pytest.param(name, 3, *case, 1, marks=_SLOW)
      for name, *case in (
        *(("lora", chunk, 32) for chunk in (1, 2, 3)),
        *((name, 1, 16) for name in ("rslora", "dora")),
        *((name, 2, 16) for name in ("lora", "adalora")),
      )
    ),
  ],
)
def test_parameters_are_those_of_single_runs(name, count, chunk, length, accumulate, files, alone):
  """After ten steps, ranks and rates and orders of data their own."""
  group = Together(configs(files, name, count, **changed(length, accumulate)), chunk)
  assert (len(group._lengths) > 1) == (length == 32)
  for _ in group.steps():
    pass
  assert group._step._cache_size() == 1
  shared = {id(x) for x in jax.tree.leaves(group.base)}
  for run in group.runs:  # one base in memory
    assert shared <= {id(x) for x in jax.tree.leaves(run.frozen)}
  for i, (want, moved) in enumerate(alone(name, count, length, accumulate)):
    group.take(i)
    got = cut_ranks(group.runs[i].adapter()["adapter"])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    assert moved > 1e-2 / (1 if accumulate == 1 else 2)  # three updates instead of ten
    if name == "adalora":
      ranks = [pj.tree.ranks(tree.combine(part, group.base)) for part in (got, want)]
      assert ranks[0] == ranks[1]


@_SLOW
@pytest.mark.parametrize("i", [0, 2])
def test_folders_and_results_are_those_of_single_runs(i, files, tmp_path):
  """Scores, counts and files; each is the start of a prediction. One that diverges harms none."""
  wanted = configs(files, "lora")
  wanted[1].optimizer.learning_rate = 1e30
  folders = [tmp_path / f"together{i}" for i in range(3)]
  results = train_together(wanted, folders)
  assert isinstance(results[1], FloatingPointError)
  assert not (folders[1] / "result.json").exists()
  alone = train_and_evaluate(wanted[i], tmp_path / "alone")
  same = ("method", "trainable_params", "total_params", "seed", "steps", "config", "labels")
  assert {key: results[i][key] for key in same} == {key: alone[key] for key in same}
  assert results[i]["metrics"] == alone["metrics"] and results[i]["together"] == 3
  assert json.loads((folders[i] / "result.json").read_text()) == results[i]
  texts = ["one good day", "a bad one"]
  one, two = (Predictor(folder).logits(texts) for folder in (folders[i], tmp_path / "alone"))
  np.testing.assert_allclose(one, two, atol=1e-4)
  assert (folders[i] / "peft" / "adapter_model.safetensors").exists()
  assert train_and_evaluate(wanted[i], folders[i]) == results[i]  # it is done


def test_what_may_differ_is_told(files):
  one, two, three = configs(files, "lora")
  groups = [group_of(json.loads(config.to_json())) for config in (one, two, three)]
  assert len(set(groups)) == 1
  two.method.dropout = 0.3
  with pytest.raises(
    ValueError, match=r"may differ in method\.alpha, method\.rank, optimizer\.learning_rate, seed"
  ):
    train_together([one, two], ["a", "b"])
  for config in (one, three):
    config.method.init = "pissa"
  assert group_of(json.loads(one.to_json())) != group_of(json.loads(three.to_json()))


@pytest.mark.parametrize(
  "change",
  [
    {"method.target_rank": None},  # a schedule that never allocates
    {"method.regrow": "random"},  # what is drawn has the padded shape
    {"optimizer.name": "adamw8bit"},  # blocks of moments run over the padding
  ],
  ids=str,
)
def test_what_depends_on_the_rank_is_apart(files, change):
  one, two, _ = configs(files, "adalora")
  group = lambda config: group_of(json.loads(config.to_json()))
  assert group(one) == group(two)
  one.update_from_flattened_dict(change)
  if "method.target_rank" not in change:
    two.update_from_flattened_dict(change)
  assert group(one) != group(two)


def test_several_processes_are_refused(monkeypatch, tmp_path):
  """In a sentence, before a folder is made."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="trained together in one process; give each of several"):
    train_together([], [tmp_path / "a"])
  assert not list(tmp_path.iterdir())
