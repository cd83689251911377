"""T5, T5 1.1 and mT5 equal transformers': random shapes, generation, files and adapters."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, T5Tokenizer
from transformers.models.t5.modeling_t5 import T5Attention

import peftjax as pj
from peftjax import data, hf_peft
from peftjax.models import hf_config
from peftjax.nn.relative_bias import distances, relative_buckets
from tests.golden.make_t5 import batch, load, make, run, write

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # peft's of tied models
]
_UNTIED = {"tie_word_embeddings": False}
_GELU = {"feed_forward_proj": "gated-gelu"}


def _shape(width, size, heads, ffn, layers, **fields):
  encoder, decoder = layers
  return {
    "vocab_size": 96,
    "d_model": width,
    "d_kv": size,
    "num_heads": heads,
    "d_ff": ffn,
    "num_layers": encoder,
    "num_decoder_layers": decoder,
    "decoder_start_token_id": 0,
    **fields,
  }


_FEW = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
# Model type, fields, whether the head is its own.
CASES = {
  "first version": ("t5", _shape(32, 8, 4, 64, (4, 6)), False),
  "its own head, scaled": ("t5", _shape(24, 10, 3, 40, (5, 4), **_FEW), True),
  "1.1": ("t5", _shape(24, 4, 6, 40, (4, 5), **_GELU, **_UNTIED, **_FEW), True),
  "1.1 tied": ("t5", _shape(16, 10, 2, 40, (6, 4), **_GELU, layer_norm_epsilon=1e-2), False),
  "tied, not scaled": ("t5", _shape(24, 4, 6, 40, (4, 4), **_UNTIED), False),
  "gated-silu, another start": (
    "t5",
    _shape(16, 5, 2, 24, (4, 4), feed_forward_proj="gated-silu", decoder_start_token_id=7, **_FEW),
    False,
  ),
  "mt5": ("mt5", _shape(24, 10, 3, 40, (4, 5)), True),
  "mt5 tied": ("mt5", _shape(24, 6, 4, 40, (5, 4), feed_forward_proj="relu"), False),
}


def _files(name, path):
  make(*CASES[name], seed=list(CASES).index(name)).save_pretrained(path)
  return load(path)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_generation(name, tmp_path):
  """Within 2e-5 of the largest, layers scanned and unrolled, padding on either side of both."""
  theirs, inputs = _files(name, tmp_path), batch(1)
  real, want = inputs["target_mask"] > 0, run(theirs, inputs)
  written = write(theirs, inputs, 10)
  assert len(np.unique(written)) > 2
  for scan in (False, True):
    model, params = pj.load_pretrained(tmp_path, scan_layers=scan)
    got = jax.jit(lambda p, m=model: pj.apply(m, p, *inputs_of(inputs)))(params)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-5 * np.abs(want).max())
    new, _ = pj.generate(model, params, inputs["tokens"], inputs["mask"], max_new_tokens=10)
    np.testing.assert_array_equal(new, written)


def inputs_of(inputs):
  return [inputs[name] for name in ("tokens", "mask", "targets", "target_mask")]


@pytest.mark.parametrize("buckets, farthest", [(32, 128), (8, 9), (64, 1000), (6, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_of_every_distance(buckets, farthest, causal):
  away = distances(3000)
  want = T5Attention._relative_position_bucket(
    torch.from_numpy(away), not causal, buckets, farthest
  )
  np.testing.assert_array_equal(relative_buckets(away, buckets, farthest, causal=causal), want)


@pytest.mark.parametrize(
  "name", ["first version", "its own head, scaled", "1.1", "tied, not scaled"]
)
@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
def test_what_is_written_has_the_logits(name, four_bits, tmp_path):
  """Adapters merged, quantised while loading or not; once the table has one, the head is apart."""
  _files(name, tmp_path / "base")
  fmt = pj.quant.nf4(32) if four_bits else None
  model, params = pj.load_pretrained(tmp_path / "base", quant=fmt, scan_layers=four_bits)
  method = pj.lora(2, 4, ["q", "wo", "embed_tokens", "relative_attention_bias"])
  params = _stirred(method.attach(jax.random.key(0), params), method)
  pj.save_pretrained(tmp_path / "made", params, of=tmp_path / "base")
  inputs = batch(2)
  real = inputs["target_mask"] > 0
  want = np.asarray(jax.jit(lambda p: pj.apply(model, p, *inputs_of(inputs)))(params))[real]
  near = lambda got: np.testing.assert_allclose(got[real], want, atol=2e-5 * np.abs(want).max())
  near(run(load(tmp_path / "made"), inputs))
  again, dense = pj.load_pretrained(tmp_path / "made")
  near(np.asarray(pj.apply(again, dense, *inputs_of(inputs))))
  assert np.abs(run(load(tmp_path / "base"), inputs)[real] - want).max() > 1e-3


def _stirred(params, method):
  rng = np.random.default_rng(3)
  draw = lambda m, x: np.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if m else x
  return jax.tree.map(draw, method.trainable(params), params)


_TARGETS = {
  "usual": {"target_modules": ["q", "v"], "r": 3},
  "feed-forward": {"target_modules": ["wi_0", "wi_1", "wo", "EncDecAttention.o"], "r": 2},
  "all": {"target_modules": "all-linear", "r": 2, "use_dora": True},
  "bias": {"target_modules": ["relative_attention_bias", "k"], "r": 2},
  "head": {"target_modules": ["q"], "modules_to_save": ["lm_head"], "r": 2},
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", ["1.1", "1.1 tied"])
@pytest.mark.parametrize("fields", _TARGETS.values(), ids=_TARGETS)
def test_adapters_both_ways(fields, name, scan, tmp_path):
  base, inputs = _files(name, tmp_path / "base"), batch(3)
  theirs = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", lora_alpha=3, **fields))
  draw_adapters(theirs)
  theirs.save_pretrained(tmp_path / "theirs")
  peft = lambda path: run(PeftModel.from_pretrained(load(tmp_path / "base"), path).eval(), inputs)
  want, real = peft(tmp_path / "theirs"), inputs["target_mask"] > 0
  model, params = pj.load_pretrained(tmp_path / "base", scan_layers=scan)
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  got = np.asarray(jax.jit(lambda p: pj.apply(model, p, *inputs_of(inputs)))(loaded))
  np.testing.assert_allclose(got[real], want[real], atol=2e-5 * np.abs(want).max())
  assert np.abs(run(load(tmp_path / "base"), inputs)[real] - want[real]).max() > 1e-3
  hf_peft.save(tmp_path / "ours", loaded, model, trained=mask)
  said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
  assert said["task_type"] == "SEQ_2_SEQ_LM"
  np.testing.assert_allclose(peft(tmp_path / "ours"), want, atol=1e-5)


def draw_adapters(model):
  """All that is trained."""
  rng = np.random.default_rng(4)
  with torch.no_grad():
    for _, value in sorted(model.named_parameters()):
      if value.requires_grad:
        value.copy_(torch.from_numpy(0.2 * rng.standard_normal(tuple(value.shape))))


def test_an_adapter_of_the_table_is_none_in_transformers(tmp_path):
  """Each stack has a copy of the table: why one in a directory is refused, both ways."""
  base, inputs = _files("first version", tmp_path / "base"), batch(3)
  want = run(base, inputs)
  theirs = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["shared"]))
  draw_adapters(theirs)
  np.testing.assert_array_equal(run(theirs, inputs), want)
  theirs.save_pretrained(tmp_path / "theirs")
  model, params = pj.load_pretrained(tmp_path / "base")
  with pytest.raises(ValueError, match="shared has an adapter or is saved whole"):
    hf_peft.load(tmp_path / "theirs", params, model)
  attached = pj.lora(2, 4, ["embed_tokens"]).attach(jax.random.key(0), params)
  with pytest.raises(ValueError, match="params: shared has an adapter"):
    hf_peft.save(tmp_path / "ours", attached, model)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": None},
    {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    {"tie_word_embeddings": False, "scale_decoder_outputs": True},
    {"feed_forward_proj": "gated-gelu"},
    {"feed_forward_proj": "gated-relu"},
    {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
    {"feed_forward_proj": "relu", "is_gated_act": True},
  ],
)
def test_fields_that_others_follow_from(fields):
  want, said = AutoConfig.for_model("t5", **fields), hf_config.read({"model_type": "t5", **fields})
  assert (said.scales, said.gated) == (want.scale_decoder_outputs, want.is_gated_act)
  curves = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu"}
  assert said.curve == curves[want.dense_act_fn]


def test_the_ids_of_its_tokenizer(tmp_path):
  """Of what transformers' class writes: pieces without a charsmap, sentinels, an end."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
  pieces += [(piece, -4.0 - i / 9) for i, piece in enumerate("▁the ▁film ▁a b c il m s".split())]
  pieces += [(f"<extra_id_{i}>", 0.0) for i in (1, 0)]
  T5Tokenizer(vocab=pieces, extra_ids=2).save_pretrained(tmp_path)
  AutoConfig.for_model("t5", vocab_size=32).save_pretrained(tmp_path)
  theirs, ours = AutoTokenizer.from_pretrained(tmp_path), data.load_tokenizer(tmp_path)
  for text in ("the film", " a  <extra_id_0> b\n\nthe", "ilm?", "films </s> a", ""):
    ids = theirs(text)["input_ids"]
    assert ours.encode(text).ids == ids and ids[-1] == 1
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
