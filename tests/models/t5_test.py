"""T5 and T5 1.1: transformers' outputs and texts, files, adapters, and what is refused."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax import hf_peft, losses, sharding
from peftjax.core import paths
from peftjax.models import configuration, hf_config, pretrained
from peftjax.models.generate import generate
from peftjax.nn.relative_bias import distances, relative_buckets, spread
from peftjax.quant.weight import Quantized
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
T5, GATED = GOLDEN / "t5_tiny", GOLDEN / "t5_gated_tiny"
SLOW = pytest.mark.slow(reason="compiles the other layout")
BOTH = [(T5, False), (GATED, True), *(pytest.param(*x, marks=SLOW) for x in ((T5, 1), (GATED, 0)))]
_INPUTS = ("tokens", "mask", "targets", "target_mask")


def expected(directory):
  want = load_file(directory / "expected.safetensors")
  return want, [want[name] for name in _INPUTS]


@pytest.mark.parametrize("directory, scan", BOTH)
def test_outputs_and_loss_are_those_of_transformers(directory, scan):
  """Padding on either side of source and target; a tied, scaled head and one of its own."""
  model, params = pj.load_pretrained(directory, scan_layers=bool(scan))
  want, inputs = expected(directory)
  weights = want["target_mask"].astype(np.float32)

  @jit
  def run(params):
    return pj.apply(model, params, *inputs), pj.apply(model, params, *inputs, loss_weights=weights)

  logits, (total, count) = run(params)
  real = want["target_mask"] > 0
  np.testing.assert_allclose(logits[real], want["logits"][real], atol=2e-5)
  batch = {"tokens": want["targets"], "weights": weights}
  np.testing.assert_allclose((total, count), losses.next_token_sums(logits, batch), rtol=1e-5)
  assert logits.dtype == jnp.float32 and bool(paths.tied(params)) == (directory == T5)


@pytest.mark.parametrize("directory, scan", BOTH)
def test_greedy_texts_from_a_cache_are_those_of_transformers(directory, scan):
  model, params = pj.load_pretrained(directory, scan_layers=bool(scan))
  want, (tokens, mask, *_) = expected(directory)
  new, counts = generate(model, params, tokens, mask, max_new_tokens=8)
  np.testing.assert_array_equal(new, want["new"])
  assert counts.tolist() == [8] * 4 and len(np.unique(new)) > 2


def test_buckets_of_relative_positions():
  """Of the paper's table: near distances have rows of their own, from the farthest on one."""
  away = distances(200)
  both = relative_buckets(away, 32, 128, causal=False)
  row = dict(zip(away.tolist(), both.tolist(), strict=True))
  assert [row[d] for d in (0, -1, -7, 1, 7)] == [0, 1, 7, 17, 23]
  assert row[-8] == row[-9] == 8 and row[-128] == row[-199] == 15 and row[199] == 31
  one = relative_buckets(away, 32, 128, causal=True)
  row = dict(zip(away.tolist(), one.tolist(), strict=True))
  assert [row[d] for d in (5, 0, -1, -15, -16, -127, -199)] == [0, 0, 1, 15, 16, 31, 31]


def test_a_line_is_spread_by_distance():
  """Also for queries that begin in the middle, as behind a cache."""
  line = jnp.asarray(np.stack([distances(6), 10 * distances(6)], 1))
  got = np.asarray(spread(line, 2, 6, first=3))
  want = np.arange(6)[None] - np.array([[3], [4]])
  np.testing.assert_array_equal(got, [want, 10 * want])


@pytest.mark.parametrize("directory", [T5, GATED])
def test_adapters_and_rules_of_each_kernel(directory):
  """All linear layers but the head; no kernel is left to the rule for what is unknown."""
  _, params = pj.load_pretrained(directory)
  ups = ["wi"] if directory == T5 else ["wi_0", "wi_1"]
  kernels = [p for p in paths.leaves(params) if p.endswith("kernel") and "lm_head" not in p]
  found = pj.tree.select(params, "all-linear")
  assert sorted(found) == sorted(kernels)
  assert {path.split("/")[-2] for path in found} == {*"qkvo", *ups, "wo"}
  assert len(found) == 3 * (5 + len(ups)) + 2 * (9 + len(ups))
  mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
  specs = paths.leaves(sharding.specs(params, mesh))
  wide, narrow = P("fsdp", "tensor"), P("tensor", "fsdp")
  assert all(specs[p] == (narrow if p.split("/")[-2] in ("o", "wo") else wide) for p in found)
  assert specs["embed_tokens/embedding"] == narrow
  houlsby = pj.adapters(2).attach(jax.random.key(0), params, pj.linen.layout(*_example(directory)))
  made = {p.split("/")[-3] for p in paths.leaves(houlsby) if p.endswith("adapter/down")}
  assert made == {"attention_residual", "cross_residual", "mlp_residual"}


def _example(directory):
  return pj.load_pretrained(directory)[0], jax.ShapeDtypeStruct((1, 4), jnp.int32)


@pytest.mark.slow(reason="four gradients through dropout, 10 s")
def test_dropout_and_remat_and_the_gradient_of_positions():
  """Two keys differ, a scanned model computed again draws what an unrolled one does."""
  _, inputs = expected(T5)
  grads = []
  for scan in (False, True):
    model, params = pj.load_pretrained(T5, scan_layers=scan, remat=scan)

    @jit
    def run(params, key, model=model):
      loss = lambda p: jnp.square(
        pj.apply(model, p, *inputs, train=True, rngs={"dropout": key})
      ).mean()
      return jax.value_and_grad(loss)(params)

    one, two = run(params, jax.random.key(0)), run(params, jax.random.key(1))
    assert abs(one[0] - two[0]) > 1e-6
    grads.append(paths.leaves(one[1]))
  names = [f"{stack}/relative_attention_bias/embedding" for stack in ("encoder", "decoder")]
  for name in (*names, "embed_tokens/embedding"):
    assert np.abs(grads[0][name]).max() > 1e-6
    np.testing.assert_allclose(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("directory", [T5, GATED])
def test_a_model_is_written_as_it_was_read(directory, tmp_path):
  _, params = pj.load_pretrained(directory, scan_layers=True)
  pj.save_pretrained(tmp_path / "made", params, of=directory)
  _, again = pj.load_pretrained(tmp_path / "made", scan_layers=True)
  chex.assert_trees_all_equal(again, params)
  was, now = (json.loads((x / "config.json").read_text()) for x in (directory, tmp_path / "made"))
  assert now == was


def test_four_bits_while_loading():
  _, params = pj.load_pretrained(GATED, quant=pj.quant.nf4(32), scan_layers=True)
  kinds = {path: isinstance(leaf, Quantized) for path, leaf in paths.leaves(params).items()}
  assert {path for path, on in kinds.items() if on} == set(pj.tree.select(params, "all-linear"))


def test_peft_directories_both_ways(tmp_path):
  """A scanned layer is a module of its own; the task is named."""
  model, params = pj.load_pretrained(GATED, scan_layers=True)
  attached = pj.lora(2, 4, ["q", "v", "wi_0"]).attach(jax.random.key(0), params)
  hf_peft.save(tmp_path, attached, model)
  said = json.loads((tmp_path / "adapter_config.json").read_text())
  assert said["task_type"] == "SEQ_2_SEQ_LM" and said["target_modules"] == ["q", "v", "wi_0"]
  names = load_file(tmp_path / "adapter_model.safetensors")
  start = "base_model.model.decoder.block.1.layer"
  assert f"{start}.1.EncDecAttention.v.lora_B.weight" in names
  assert f"{start}.2.DenseReluDense.wi_0.lora_A.weight" in names
  loaded, _ = hf_peft.load(tmp_path, params, model)
  chex.assert_trees_all_equal(loaded, attached)


def test_an_adapter_of_the_shared_table_is_not_written(tmp_path):
  model, params = pj.load_pretrained(T5)
  attached = pj.lora(2, 4, ["embed_tokens"]).attach(jax.random.key(0), params)
  with pytest.raises(ValueError, match="shared has an adapter or is saved whole, and transformers"):
    hf_peft.save(tmp_path, attached, model)


@pytest.fixture
def change(tmp_path):
  """A golden directory with its config, or its tensors, changed."""

  def make(directory, tensors=None, **fields):
    shutil.copytree(directory, tmp_path / "made")
    path = tmp_path / "made" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    if tensors:
      held = load_file(tmp_path / "made" / "model.safetensors")
      tensors(held)
      save_file(held, tmp_path / "made" / "model.safetensors")
    return tmp_path / "made"

  return make


def test_the_table_under_its_other_names(change):
  """Alone, or beside the first if it is the same."""

  def rename(held):
    held["decoder.embed_tokens.weight"] = held.pop("shared.weight")
    held["encoder.embed_tokens.weight"] = held["decoder.embed_tokens.weight"].copy()

  _, want = pj.load_pretrained(T5)
  chex.assert_trees_all_equal(pj.load_pretrained(change(T5, rename))[1], want)


def test_tables_that_differ_are_refused(change):
  other = lambda held: held.update({"encoder.embed_tokens.weight": held["shared.weight"] + 1})
  with pytest.raises(ValueError, match="encoder.embed_tokens.weight is another than shared.weight"):
    pj.load_pretrained(change(T5, other))


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"num_decoder_layers": 3},
      "there are 3 decoder layers, and .* has 2: the last is that of dec",
    ),
    ({"num_layers": 2}, "there are 2 layers, and .* has 3"),
    ({"feed_forward_proj": "gated-gelu", "is_gated_act": True}, "DenseReluDense.wi_0.weight"),
    ({"dense_act_fn": "mish"}, "dense_act_fn is 'mish'; the activation must be one of relu, gelu"),
    ({"feed_forward_proj": "x-relu"}, "feed_forward_proj is 'x-relu'; it must be an activation"),
    ({"relative_attention_num_buckets": 7}, "num_buckets is 7; it must be even"),
    ({"relative_attention_max_distance": 4}, "max_distance is 4; of so many buckets .* 5 or more"),
    ({"is_encoder_decoder": False}, "is_encoder_decoder is False; only an encoder with a decoder"),
    (
      {"decoder_start_token_id": 96},
      "decoder_start_token_id is 96; it must be below vocab_size 96",
    ),
    ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel, whose head is not read; only T5For"),
    ({"architectures": ["UMT5ForConditionalGeneration"]}, "model_type 't5' means T5"),
    ({"model_type": "umt5"}, "model_type 'umt5'; supported are"),
  ],
)
def test_what_is_not_computed_is_refused_before_a_weight_is_read(fields, message, change):
  with pytest.raises(ValueError, match=message):
    pretrained.load(change(T5, **fields))


def test_what_takes_other_models_says_so():
  with pytest.raises(ValueError, match=r"which is not a language model; .*seq2seq.py t5"):
    configuration.check_decoder(T5)
  with pytest.raises(ValueError, match="is of a llama, and task=seq2seq takes t5, mt5: name one"):
    configuration.check_encoder_decoder(GOLDEN / "llama_tiny")
  with pytest.raises(ValueError, match="a model of type t5 has no labels"):
    pretrained.load(T5, 3)
  model, params = pj.load_pretrained(T5)
  with pytest.raises(ValueError, match="pj.fit has no data for a T5ForConditionalGeneration"):
    pj.fit(model, params, pj.lora(2, 4, ["q"]), (np.zeros((4, 2)), np.zeros(4)))


def test_mt5_never_scales_and_t5_as_its_file_says():
  scales = lambda kind, **fields: hf_config.read({"model_type": kind, **fields}).scales
  assert scales("t5") and not scales("t5", tie_word_embeddings=False) and not scales("mt5")
  assert not scales("t5", scale_decoder_outputs=False)
