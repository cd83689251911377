"""Checkpoints whose head is another than config.json says, half there, or of another kind."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.core import paths
from peftjax.models import heads
from peftjax.models.pretrained import load
from peftjax.quant.weight import Quantized
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES = {
  "llama3_tiny": "model.embed_tokens.weight",
  "qwen2_tiny": "model.embed_tokens.weight",
  "gpt2_tiny": "transformer.wte.weight",
}


@pytest.fixture
def change(tmp_path):
  """A golden directory with its tensors and its config changed."""

  def make(name, tensors=lambda t: None, **config):
    directory = tmp_path / name
    shutil.copytree(GOLDEN / name, directory)
    made = load_file(directory / "model.safetensors")
    tensors(made)
    save_file(made, directory / "model.safetensors")
    said = json.loads((directory / "config.json").read_text())
    said = {k: v for k, v in {**said, **config}.items() if v != "left out"}
    (directory / "config.json").write_text(json.dumps(said))
    return directory

  return make


def logits(directory, **how):
  model, params = pj.load_pretrained(directory, **how)
  given = load_file(directory / "expected.safetensors")
  run = jit(lambda p: pj.apply(model, p, given["tokens"], given["mask"]))
  return params, np.asarray(run(params))[given["mask"] > 0], given["logits"][given["mask"] > 0]


@pytest.mark.parametrize("name", TABLES)
def test_a_tied_file_with_an_equal_head_stays_tied(name, change):
  directory = change(name, lambda t: t.update({"lm_head.weight": t[TABLES[name]].copy()}))
  assert paths.tied(load(directory).params)


@pytest.mark.parametrize("name, scan", [("llama3_tiny", True), ("gpt2_tiny", False)])
def test_a_tied_file_whose_head_differs_is_loaded_untied(name, scan, change):
  """As transformers does, with a warning. Here the head is twice the table, so are the logits."""
  directory = change(name, lambda t: t.update({"lm_head.weight": 2 * t[TABLES[name]]}))
  with pytest.warns(UserWarning, match=r"config.json says tie_word.*model.safetensors has lm_head"):
    params, got, want = logits(directory, scan_layers=scan)
  assert not paths.tied(params)
  np.testing.assert_allclose(got, 2 * want, atol=2e-4)


def test_a_head_alone_is_table_too(change):
  """As in transformers, where tying goes both ways."""
  directory = change(
    "llama3_tiny", lambda t: t.update({"lm_head.weight": t.pop(TABLES["llama3_tiny"])})
  )
  params, got, want = logits(directory)
  assert paths.tied(params)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_an_untied_gpt2_has_a_head_of_its_own(change):
  directory = change(
    "gpt2_tiny",
    lambda t: t.update({"lm_head.weight": -t[TABLES["gpt2_tiny"]]}),
    tie_word_embeddings=False,
  )
  _, got, want = logits(directory)
  np.testing.assert_allclose(got, -want, atol=1e-4)
  _, quantised = pj.load_pretrained(directory, quant=pj.quant.int8(32), where="lm_head")
  assert isinstance(quantised["lm_head"]["kernel"], Quantized)


def test_an_untied_file_without_a_head_is_refused(change):
  for config in (dict(tie_word_embeddings=False), dict(tie_word_embeddings="left out")):
    directory = change("llama3_tiny", **config)
    with pytest.raises(
      ValueError, match="lm_head.weight\n.*not tied.*write tie_word_embeddings: t"
    ):
      load(directory)
    shutil.rmtree(directory)


def test_tables_are_compared_some_rows_at_a_time(change, monkeypatch):
  def last_row(tensors):
    tensors["lm_head.weight"] = tensors[TABLES["llama3_tiny"]].copy()
    tensors["lm_head.weight"][-1, -1] += 1

  seen = []
  real = heads.np.array_equal
  monkeypatch.setattr(heads.np, "array_equal", lambda a, b: seen.append(a.shape) or real(a, b))
  with pytest.warns(UserWarning, match="loaded apart"):
    load(change("llama3_tiny", last_row))
  assert seen == [(96, 48)]
  assert all(rows * width <= 2**20 for rows, width in seen)


CLASSIFIER = {
  "classifier.weight": np.ones((3, 64), np.float32),
  "classifier.bias": np.ones(3, np.float32),
}


@pytest.mark.parametrize(
  "name, kind",
  [
    ("bert_tiny", "BertForTokenClassification"),
    ("bert_tiny", "BertForMultipleChoice"),
    ("bert_tiny", "BertForQuestionAnswering"),
    ("bert_tiny", "BertForNextSentencePrediction"),
    ("roberta_tiny", "RobertaForTokenClassification"),
  ],
)
def test_a_head_of_another_task_is_not_taken_for_a_classifier(name, kind, change):
  """Unless a new head is asked for, which then is new though one of its shape is there."""

  def tensors(t):
    for head in [n for n in t if "classifier" in n]:
      t.pop(head)
    t.update({n: np.full_like(x, 7) for n, x in CLASSIFIER.items()})

  directory = change(name, tensors, architectures=[kind])
  with pytest.raises(ValueError, match=f"config.json: architectures is {kind}.*num_labels"):
    load(directory, labels_of="text")
  made = load(directory, num_labels=3, labels_of="text")
  heads = [path for path in paths.leaves(made.params) if path.startswith("head/")]
  assert set(heads) <= set(made.new)
  assert all(np.abs(x).max() < 1 for x in jax.tree.leaves(made.params["head"]))


@pytest.mark.parametrize(
  "name, kind, message",
  [
    (
      "llama3_tiny",
      "LlamaForTokenClassification",
      "whose head is not .*only LlamaForCausalLM and LlamaForSequenceClassification are",
    ),
    ("gpt2_tiny", "GPT2ForTokenClassification", "whose head is not .*only GPT2LMHeadModel are"),
    ("llama3_tiny", "GraniteForCausalLM", "model_type 'llama' means Llama.*differ from it"),
    ("bert_tiny", "ElectraForSequenceClassification", "model_type 'bert' means Bert"),
  ],
)
def test_architectures_of_another_task_or_model_are_refused(name, kind, message, change):
  with pytest.raises(ValueError, match=f"config.json: architectures is {kind}, .*{message}"):
    load(change(name, architectures=[kind]))


@pytest.mark.parametrize("kinds", [None, [], ["BertForMaskedLM"], ["BertModel"]])
def test_pretraining_heads_and_bodies_get_a_new_head(kinds, change, caplog):
  def tensors(t):
    t.pop("classifier.weight"), t.pop("classifier.bias")

  directory = change("bert_tiny", tensors, architectures=kinds)
  pj.load_pretrained(directory)
  assert "are new" in caplog.text and "head/classifier/kernel" in caplog.text
  caplog.clear()
  pj.load_pretrained(GOLDEN / "bert_tiny")
  assert not caplog.text


@pytest.mark.parametrize(
  "name, lacks",
  [
    ("roberta_tiny", ["classifier.dense.weight"]),
    ("roberta_tiny", ["classifier.out_proj.weight", "classifier.out_proj.bias"]),
    ("bert_tiny", ["classifier.bias"]),
    ("bert_tiny", ["bert.pooler.dense.weight"]),
    ("bert_tiny", ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]),
  ],
)
@pytest.mark.parametrize("num_labels", [None, 3])
def test_half_a_head_is_refused(name, lacks, num_labels, change):
  directory = change(name, lambda t: [t.pop(n) for n in lacks])
  with pytest.raises(ValueError, match=f"model.safetensors has .* not all of it: .*{lacks[0]}"):
    load(directory, num_labels)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.bool_, np.int64])
@pytest.mark.parametrize("name", [QUERY, "classifier.bias", "bert.embeddings.LayerNorm.weight"])
def test_weights_are_floats(dtype, name, change):
  directory = change("bert_tiny", lambda t: t.update({name: t[name].astype(dtype)}))
  with pytest.raises(
    ValueError,
    match=rf"model.safetensors: tensor {name} has the dtype {dtype.__name__.rstrip('_')}",
  ):
    load(directory)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_floats_of_all_kinds_are(dtype, change):
  load(change("bert_tiny", lambda t: t.update({QUERY: t[QUERY].astype(dtype)})))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(value, dtype, change):
  def tensors(t):
    t[QUERY] = t[QUERY].astype(dtype)
    t[QUERY][3, 5] = value

  with pytest.raises(ValueError, match=f"model.safetensors: tensor {QUERY} has NaN or infinite"):
    load(change("bert_tiny", tensors))


@pytest.mark.parametrize("layers", [1, 3, 10**6, 2**31 - 1])
@pytest.mark.parametrize(
  "name, field", [("bert_tiny", "num_hidden_layers"), ("gpt2_tiny", "n_layer")]
)
def test_layers_are_counted_before_anything_is_traced(name, field, layers, change, monkeypatch):
  monkeypatch.setattr(jax, "eval_shape", None)
  with pytest.raises(ValueError, match=f"there are {layers} layers, and .*safetensors has 2: the"):
    load(change(name, **{field: layers}))


@pytest.mark.parametrize("change_of", [{"vocab_size": 2**31 - 1}, {"hidden_size": 2**30}])
def test_sizes_are_held_against_the_table_before_anything_is_traced(change_of, change, monkeypatch):
  monkeypatch.setattr(jax, "eval_shape", None)
  with pytest.raises(ValueError, match=r"word_embeddings.weight has shape \(120, 64\); .*means"):
    load(change("bert_tiny", **change_of))


INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


@pytest.mark.parametrize(
  "said, message",
  [
    (INT8, r"LLM.int8 \(load_in_8bit\)"),
    ({"load_in_8bit": True}, "LLM.int8"),
    ({"quant_method": "gptq", "bits": 4}, "quantised by GPTQ"),
    ({"quant_method": "awq"}, "quantised by AWQ"),
    ({"quant_method": "fp8"}, "quantised by FP8"),
    ({"quant_method": "compressed-tensors"}, "quantised by compressed-tensors"),
    ({"quant_method": "novel"}, "quantised by 'novel'"),
    ({"bits": 4}, "quantised by None"),
    ("gptq", "quantization_config is 'gptq'; it must be an object"),
    ({"load_in_4bit": "true"}, "load_in_4bit is 'true'; it must be true or false"),
  ],
)
def test_other_quantisations_are_refused_by_name(said, message, change):
  with pytest.raises(ValueError, match=f"config.json.*{message}"):
    load(change("llama3_tiny", quantization_config=said))


@pytest.mark.parametrize(
  "tensor, message",
  [("SCB", "LLM.int8"), ("qweight", "GPTQ or AWQ"), ("weight_scale_inv", "FP8 in blocks")],
)
def test_other_quantisations_are_known_by_their_tensors(tensor, message, change):
  """Where the config does not say it."""
  weight = "model.layers.0.self_attn.q_proj"

  def tensors(t):
    t[f"{weight}.{tensor}"] = np.ones(3, np.float32)
    if tensor != "weight_scale_inv":
      t[f"{weight}.weight"] = t[f"{weight}.weight"].astype(np.int8)

  with pytest.raises(ValueError, match=f"{weight}.*(?s:.*)They look like those of {message}"):
    load(change("llama3_tiny", tensors))
