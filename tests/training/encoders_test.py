"""`configs/classify.py` trains every family of encoders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core import paths
from peftjax.io import safetensors_dir
from peftjax.models import families
from tests import tiny

_DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
_DEBERTA = {
  "relative_attention": True,
  "pos_att_type": ["c2p", "p2c"],
  "position_buckets": 8,
  "share_att_key": True,
  "norm_rel_ebd": "layer_norm",
}
pytestmark = pytest.mark.slow(reason="a run of each family; their outputs are tested fast")
CASES = [
  pytest.param("deberta-v2", _DEBERTA, id="deberta-v2"),
  pytest.param("electra", {"embedding_size": 12}, id="electra"),
  pytest.param("distilbert", _DISTIL, id="distilbert"),
  pytest.param("xlm-roberta", {"pad_token_id": 1}, id="xlm-roberta"),
]


def made_dir(source, folder, kind, fields):
  """A directory of this model type with weights drawn and the tokenizer of `source`."""
  shutil.copytree(source, folder)
  config = {**tiny.HF_CONFIG, "model_type": kind, **fields}
  if kind == "distilbert":
    config = {k: v for k, v in config.items() if "hidden_size" not in k and "num_" not in k}
  (folder / "config.json").write_text(json.dumps(config))
  family = families.FAMILIES[kind]
  model = family.MODEL(family.CONFIG.from_hf(config))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  rng, tensors = np.random.default_rng(0), {}
  for path, leaf in paths.leaves(shapes).items():
    if not path.startswith("head/"):
      drawn = rng.normal(path.endswith("scale"), 0.2, leaf.shape).astype(np.float32)
      tensors[family.hf_name(path)] = drawn.T.copy() if path.endswith("kernel") else drawn
  safetensors_dir.write(folder / "model.safetensors", tensors)
  return folder


@pytest.mark.parametrize("kind, fields", CASES)
def test_a_run_of_two_steps(kind, fields, model_dir_of, run_once, config, tmp_path):
  """On a mesh, and the adapter and the new head are in its PEFT directory."""
  made = config(model__directory=str(model_dir_of(kind, fields)), train__steps=2)
  result = run_once(made, tmp_path / "run", mesh="data:2,fsdp:2,tensor:2")
  assert 0 <= result["metrics"]["test"]["accuracy"] <= 1
  stored = safetensors_dir.TensorDir(tmp_path / "run" / "peft", "adapter_model").names()
  assert any("lora_A" in name for name in stored) and any("classifier" in name for name in stored)


@pytest.fixture
def model_dir_of(model_dir, tmp_path):
  return lambda kind, fields: made_dir(model_dir, tmp_path / kind, kind, fields)
