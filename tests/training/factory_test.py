"""`--config.model.factory`: models of one's own, linen and NNX, trained by import path."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax as pj
from peftjax.training import factory, finished
from peftjax.training.predict import Predictor
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from peftjax.training.writer import Writer
from tests import tiny, tiny_lm
from tests.training import own_models, runs

HERE = "tests.training.own_models"


@pytest.fixture(scope="module")
def own(config):
  """Makes the config of a short run of a classifier of one's own; with changes."""

  def make(name, **changes):
    base = dict(model__factory=f"{HERE}:{name}", method__targets=("all-linear",), train__epochs=1.0)
    return config(**{**base, **changes})

  return make


@pytest.mark.parametrize("name", ["classifier", "nnx_classifier"])
def test_a_run_begins_as_the_model_that_the_factory_made(name, own):
  """Loss and scores of the untrained run are the model's own, adapters and mask in place."""
  run = Run(from_config(own(name)), None)
  batch = next(iter(run.stream.iterate(0, 1)))
  made = getattr(own_models, name)()
  if name == "nnx_classifier":
    made.eval()
    want = made(batch["tokens"], batch["mask"])
  else:
    want = made[0].apply({"params": made[1]}, batch["tokens"], batch["mask"], train=False)
  got = run._predict(run.state.train, run.frozen, batch)
  np.testing.assert_allclose(got, want, atol=1e-5)
  print(run.trainable)


def test_refusals(own):
  for name, told in {
    "classifie": "no function",
    "needs_an_argument": "missing 1 required positional argument",
    "a_dict": "returned a dict; return (module, params)",
    "fails": "fails(): RuntimeError: no such file",
    "variables": 'write variables["params"]',
    "no_param": "has no nnx.Param",
    "five_classes": r"needs logits [B, 3]: (1, 3)",
  }.items():
    with pytest.raises(ValueError) as error:
      Run(from_config(own(name)), None)
    print(error.value)
    assert told in str(error.value), name
