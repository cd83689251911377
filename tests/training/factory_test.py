"""`--config.model.factory`: models of one's own, linen and NNX, trained by import path."""

import json

import numpy as np
import pytest

from peftjax import hf_peft
from peftjax.core import paths
from peftjax.core.weight import is_weight
from peftjax.training import factory, finished
from peftjax.training.predict import Predictor
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from peftjax.training.writer import Writer
from tests import tiny_lm
from tests.training import own_models, runs

HERE = "tests.training.own_models"
SLOW = pytest.mark.slow(reason="trains, or compiles another base")


@pytest.fixture(scope="module")
def own(config):
  """Makes the config of a short run of a classifier of one's own; with changes."""

  def make(name, **changes):
    base = dict(model__factory=f"{HERE}:{name}", method__targets=("all-linear",))
    return config(**{**base, **changes})

  return make


@pytest.fixture(scope="module")
def own_lm(tmp_path_factory):
  """The same of a language model, whose tokenizer says what ends a text."""
  folder = tmp_path_factory.mktemp("own_lm")
  model, rows = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
  for path in (model / "config.json", model / "model.safetensors"):
    path.unlink()

  def make(name, **changes):
    changes = {"model__factory": f"{HERE}:{name}", **changes}
    return tiny_lm.config(model, rows, **changes)

  return make


@pytest.fixture
def interrupted(run_once, monkeypatch):
  """Begins a run that is ended in the middle, after a checkpoint."""

  def run(settings, folder, step):
    place = Run.place

    def stop(self, batch):
      if self.steps_done == step:
        raise RuntimeError("interrupted")
      return place(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
      patch.setattr(Run, "place", stop)
      run_once(settings, folder)

  return run


def first(run):
  """The first batch, and what the untrained run makes of it."""
  batch = next(iter(run.stream.iterate(0, 1)))
  return batch, run.predict(run.state.train, run.frozen, batch)


@pytest.mark.parametrize("name", ["classifier", "nnx_classifier"])
def test_a_classifier_begins_as_its_factory_made_it(name, own):
  """It gets the mask by name, and dropout is off in evaluation."""
  run = Run(from_config(own(name)), None)
  batch, got = first(run)
  if name == "classifier":
    model, params = own_models.classifier()
    want = model.apply({"params": params}, batch["tokens"], batch["mask"], train=False)
  else:
    model = own_models.nnx_classifier()
    model.eval()
    want = model(batch["tokens"], batch["mask"])
  np.testing.assert_allclose(got, want, atol=1e-5)
  trained = {path.split("/")[0] for path, x in paths.leaves(run.state.train).items()}
  assert trained == {"head", "hidden" if name == "classifier" else "layers"}


@pytest.mark.parametrize("quant", ["none", pytest.param("nf4", marks=SLOW)])
@pytest.mark.parametrize("name", ["decoder", "nnx_decoder"])
def test_a_language_model_begins_as_its_factory_made_it(name, quant, own_lm):
  """Of ids alone, or of the segments too; its base in four bits, if that is asked for."""
  run = Run(from_config(own_lm(name, quant__name=quant)), None)
  batch, (total, count) = first(run)
  if name == "decoder":
    model, params = own_models.decoder()
    logits = model.apply({"params": params}, batch["tokens"])
  else:
    logits = own_models.nnx_decoder()(batch["tokens"], batch["segments"])
  want, number = run.task.kind.loss(logits, batch)
  assert count == number
  np.testing.assert_allclose(total, want, rtol=1e-5 if quant == "none" else 0.1)
  weights = [x for x in paths.leaves(run.frozen).values() if is_weight(x)]
  assert weights and all(x.quantised == (quant == "nf4") for x in weights)


REFUSED = {
  "os": "is not of the form package.module:function",
  "no_such_package.models:make": "ModuleNotFoundError: No module named 'no_such_package'",
  f"{HERE}:classifie": "has no function 'classifie'",
  f"{HERE}:VOCAB": "has no function 'VOCAB'",
  f"{HERE}:needs_an_argument": "missing 1 required positional argument",
  f"{HERE}:a_dict": "returned a dict; return (module, params) of Flax linen, or an nnx.Module",
  f"{HERE}:fails": "fails(): RuntimeError: no such file",
  f"{HERE}:variables": 'write variables["params"]',
  f"{HERE}:no_param": "NoParam has no nnx.Param",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_model_is_refused(name):
  with pytest.raises(ValueError) as error:
    factory.call(name)
  assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (dict(name="five_classes"), "needs logits [B, 3]: (1, 3)"),
    (dict(name="decoder"), 'no module "head" to train beside the method'),
    (dict(name="decoder", method__head=False), "give (1, 16, 17), and this task needs logits"),
    (dict(name="classifier", model__dtype="bfloat16"), "decides in which dtype"),
    (dict(name="normed"), "writes to norm/mean (BatchStat)"),
  ],
)
def test_what_does_not_fit_the_task_is_refused(change, told, own):
  with pytest.raises(ValueError) as error:
    Run(from_config(own(**change)), None)
  assert told in str(error.value)


def test_a_vocabulary_that_is_too_small_is_refused(own_lm, monkeypatch):
  monkeypatch.setattr(own_models, "LM_VOCAB", 8)
  with pytest.raises(ValueError, match=r"logits \[B, T, V\] of the tokenizer's ids, V > 1"):
    Run(from_config(own_lm("decoder")), None)


def test_peft_files_hold_no_adapter_of_such_a_model(tmp_path, own):
  run = Run(from_config(own("classifier")), None)
  params = own_models.classifier()[1]
  for call in (hf_peft.save, lambda folder, *given: hf_peft.load(folder, *given)):
    with pytest.raises(ValueError, match="Classifier is not a model of this library"):
      call(tmp_path / "peft", params, run.module)


@SLOW
@pytest.mark.parametrize("name", ["classifier", "nnx_classifier"])
def test_train_resume_and_predict(name, own, run_once, interrupted, tmp_path):
  """A run that was ended goes on to the same bits, and predicts if its factory is named again."""
  settings = own(name, train__epochs=4.0, optimizer__learning_rate=3e-2)
  whole = tmp_path / "whole"
  result = run_once(settings, whole)
  assert result["metrics"]["validation"]["accuracy"] > 0.6
  assert not (whole / "peft").exists() or not list((whole / "peft").iterdir())
  interrupted(settings, tmp_path / "run", 9)
  run_once(settings, tmp_path / "run")
  runs.assert_same(tmp_path / "run", whole)
  given = f"{HERE}:{name}"
  texts = ["the market shares profit", "a goal of the league"]
  predictor = Predictor(whole, given)
  alone = np.concatenate([predictor.logits([text]) for text in texts])
  np.testing.assert_allclose(predictor.logits(texts), alone, atol=1e-5)
  for other in (None, f"{HERE}:another_seed"):
    with pytest.raises(ValueError, match=f"to read it is to run that code.*--factory={given}"):
      Predictor(whole, other)
  with pytest.raises(ValueError, match="and other formats are not"):
    finished.load(whole, factory=given, ours="and other formats are not for it")


@SLOW
def test_a_factory_that_makes_another_model_is_refused(
  own, run_once, interrupted, monkeypatch, tmp_path
):
  """By another name, or of other parameters by the same name."""
  settings = own("classifier")
  interrupted(settings, tmp_path / "run", 6)
  before = runs.contents(tmp_path / "run")
  with pytest.raises(ValueError, match=r"model\.factory: .*:classifier' there.*:another_seed' now"):
    run_once(own("another_seed"), tmp_path / "run")
  monkeypatch.setattr(own_models, "classifier", own_models.another_seed)
  with pytest.raises(ValueError, match="another pretrained model"):
    run_once(settings, tmp_path / "run")
  assert runs.contents(tmp_path / "run") == before
  with pytest.raises(ValueError, match="classifier is not the model .* was trained on"):
    Predictor(tmp_path / "run", f"{HERE}:classifier")


@SLOW
@pytest.mark.parametrize("name", ["decoder", "nnx_decoder"])
def test_train_and_resume_a_language_model(name, own_lm, run_once, interrupted, tmp_path):
  settings = own_lm(name)
  result = run_once(settings, tmp_path / "whole")
  assert result["metrics"]["test"]["loss"] < result["before"]["test"]["loss"]
  interrupted(settings, tmp_path / "run", 8)
  run_once(settings, tmp_path / "run")
  runs.assert_same(tmp_path / "run", tmp_path / "whole")
  with pytest.raises(ValueError, match="keeps no cache of keys and values"):
    Writer(tmp_path / "run")
