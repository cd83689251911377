"""What every family of decoders gives for free: adapters, sharding, packing, gradients."""

import csv
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import sharding
from peftjax.models.configuration import check_decoder
from peftjax.models.llama import LlamaConfig, LlamaForCausalLM
from peftjax.models.pretrained import load as load_all
from peftjax.training import build, loop
from tests import tiny, tiny_lm
from tests.core.programs import jit
from tests.models.decoder_test import GOLDEN, RARE, load

_rng = np.random.default_rng(0)

# The projections of a block, and the two that LoRA's authors adapt.
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {
  "qwen3_tiny": (SPLIT, ["q_proj", "v_proj"]),
  "phi3_tiny": (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ["qkv_proj"]),
  "gemma2_tiny": (SPLIT, ["q_proj", "v_proj"]),
  "gemma3_tiny": (SPLIT, ["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_and_sharding_of_each_kernel(name):
  """All linear layers and the usual two; no kernel is left to the rule for what is unknown."""
  modules, usual = FAMILIES[name]
  _, params, _ = load(name)
  found = pj.tree.select(params, "all-linear")
  assert sorted({path.split("/")[-2] for path in found}) == sorted(modules)
  assert len(found) == 2 * len(modules)
  adapted = pj.lora(2, 4, usual).attach(jax.random.key(0), params)
  assert len(pj.tree.select(adapted, usual)) == 2 * len(usual)
  rules = [pattern for pattern, _ in sharding.RULES]
  for path in found:
    matched = next(i for i, pattern in enumerate(rules) if re.fullmatch(pattern, path))
    assert matched < rules.index(r"(.*/)?kernel"), path


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[] if n == "gemma3_tiny" else RARE) for n in FAMILIES]
)
def test_documents_in_one_row_do_not_see_each_other(name):
  """Through windows and all."""
  model, params, _ = load(name, scan_layers=True)
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (1, 12)), jnp.int32)
  segments = jnp.array([[1] * 5 + [2] * 7])
  positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
  forward = jit(lambda *given: pj.apply(model, params, *given))
  packed = forward(tokens, None, positions, segments)
  alone = [forward(part) for part in (tokens[:, :5], tokens[:, 5:])]
  np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


def test_the_scale_of_embeddings_is_rounded_in_their_dtype():
  """√48 = 6.928 is 6.9375 in bfloat16, as Gemma was trained."""
  said = {"model_type": "gemma2", "hidden_size": 48, "num_attention_heads": 4}
  config = LlamaConfig.from_hf(said, layers=1, vocab=8, ffn=8, head_size=4, dtype=jnp.bfloat16)
  assert config.embedding_scale == 48**0.5
  model = LlamaForCausalLM(config)
  params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  seen = []

  def watch(next_fun, args, kwargs, context):
    if context.module.name == "layers_0":
      seen.append(args[0])
    return next_fun(*args, **kwargs)

  @jit
  def first(params):
    with nn.intercept_methods(watch):
      model.apply(params, jnp.array([[3]]))
    return seen[0][0, 0], params["params"]["model"]["embed_tokens"]["embedding"][3]

  got, row = first(params)
  np.testing.assert_array_equal(got, row.astype(jnp.bfloat16) * jnp.bfloat16(6.9375))


def test_the_score_of_a_text_is_its_last_tokens():
  """Whatever padding stands behind or before it; the new head is drawn, and all else is read."""
  model, params, new = load_all(GOLDEN / "gemma3_tiny", 3, scan_layers=True)
  assert new == ("head/score/kernel",) and "lm_head" not in params
  texts = np.array([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
  score = jit(lambda tokens, mask: pj.apply(model, params, tokens, mask))
  one, two, other = np.asarray(score(texts, texts > 0))
  np.testing.assert_allclose(one, two, atol=1e-6)
  assert np.abs(one - other).max() > 1e-3


def test_a_decoder_that_classifies_is_no_language_model(tmp_path):
  said = json.loads((GOLDEN / "llama3_tiny" / "config.json").read_text())
  said["architectures"] = ["LlamaForSequenceClassification"]
  (tmp_path / "config.json").write_text(json.dumps(said))
  with pytest.raises(ValueError, match="LlamaForSequenceClassification, which is not a lang"):
    check_decoder(tmp_path)
  assert LlamaConfig.from_hf(said).labels == 2


@pytest.mark.slow(reason="trains a model")
def test_a_decoder_learns_to_classify(tmp_path, monkeypatch):
  """configs/classify.py on a tiny Llama; the exported adapter has the head beside it."""
  monkeypatch.setattr(build, "mesh_of", lambda text: None)
  folder = tiny_lm.model_dir(tmp_path / "model")
  rows = [("text", "label")]
  for high in (0, 1) * 48:
    rows.append((" ".join(map(str, _rng.integers(0, 5, 6) + 5 * high)), ("low", "high")[high]))
  with (tmp_path / "corpus.csv").open("w", newline="") as file:
    csv.writer(file).writerows(dict.fromkeys(rows))
  config = tiny.config(
    *(folder, tmp_path / "corpus.csv"),
    method__targets=("q_proj", "v_proj"),
    data__max_length=8,
    train__epochs=2.0,
    optimizer__learning_rate=1e-2,
  )
  result = loop.train_and_evaluate(config, tmp_path / "run")
  assert result["metrics"]["test"]["accuracy"] > 0.8
  saved = load_file(tmp_path / "run" / "peft" / "adapter_model.safetensors")
  assert "base_model.model.score.weight" in saved
