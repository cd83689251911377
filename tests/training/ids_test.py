"""A run whose tokenizer knows more tokens than its model, or whose base is not finite."""

import json
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny


def test_a_tokenizer_of_another_model_is_found_before_the_first_step(tmp_path):
  model = tiny.model_dir(tmp_path / "model")
  tensors = load_file(model / "model.safetensors")
  name = "bert.embeddings.word_embeddings.weight"
  tensors[name] = tensors[name][:2000].copy()
  save_file(tensors, model / "model.safetensors")
  said = json.loads((model / "config.json").read_text())
  (model / "config.json").write_text(json.dumps({**said, "vocab_size": 2000}))
  settings = from_config(tiny.config(model, tiny.corpus(tmp_path / "a.csv", 60)))
  with pytest.raises(ValueError, match=r"the train texts have the token id \d+, .* 2000 rows"):
    Run(settings, None)


@pytest.mark.parametrize(
  "base, message",
  [
    (np.ones(3), "nan not finite. Try a lower"),
    (np.array([1.0, np.nan]), "pretrained model's body/kernel, which is not trained"),
  ],
)
def test_divergence_is_blamed_on_what_is_known(base, message):
  run = types.SimpleNamespace(frozen={"body": {"kernel": base}, "ids": np.arange(2)})
  told = Run._diverged(run, "step 1: loss nan")
  assert message in told
  assert ("learning_rate" in told) == ("not trained" not in told)
