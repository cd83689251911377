"""Encoders equal transformers', for models made on the spot: outputs, and PEFT's directories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
  AutoTokenizer,
  CamembertTokenizer,
  DebertaV2Tokenizer,
  XLMRobertaTokenizer,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

import peftjax as pj
from peftjax import data, hf_peft
from peftjax.core import paths
from peftjax.nn.disentangled import relative_rows
from tests.golden import make_bert
from tests.golden.make_encoders import CLASSES, DEBERTA, batch, make, run
from tests.golden.tokenizer_texts import plain, texts

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

_BERT = dict(
  vocab_size=90,
  hidden_size=24,
  num_hidden_layers=4,
  num_attention_heads=3,
  intermediate_size=40,
  max_position_embeddings=30,
  num_labels=4,
)
_DISTIL = dict(
  vocab_size=90,
  dim=24,
  n_layers=5,
  n_heads=3,
  hidden_dim=40,
  max_position_embeddings=30,
  num_labels=4,
)
_PLAIN = dict(relative_attention=True, max_relative_positions=7)
_CASES = [
  ("bert", "token", _BERT),
  ("bert", "token", {**_BERT, "num_labels": 1, "hidden_act": "gelu_new"}),
  ("roberta", "token", {**_BERT, "pad_token_id": 3}),
  ("xlm-roberta", "text", {**_BERT, "layer_norm_eps": 1e-5, "type_vocab_size": 1}),
  ("xlm-roberta", "token", {**_BERT, "num_attention_heads": 1}),
  ("camembert", "text", {**_BERT, "num_labels": 1}),
  ("camembert", "token", {**_BERT, "num_hidden_layers": 6}),
  ("electra", "text", {**_BERT, "embedding_size": 14}),
  ("electra", "text", {**_BERT, "embedding_size": 24, "hidden_act": "relu"}),
  ("electra", "token", {**_BERT, "embedding_size": 33}),
  ("distilbert", "text", _DISTIL),
  ("distilbert", "text", {**_DISTIL, "activation": "relu", "n_heads": 12, "num_labels": 1}),
  ("distilbert", "token", {**_DISTIL, "sinusoidal_pos_embds": True}),
  ("deberta-v2", "text", {**_BERT, **DEBERTA}),
  ("deberta-v2", "token", {**_BERT, **DEBERTA, "position_buckets": 8, "num_hidden_layers": 5}),
  ("deberta-v2", "text", {**_BERT, **DEBERTA, "share_att_key": False, "pos_att_type": "c2p|p2c"}),
  ("deberta-v2", "text", {**_BERT, **_PLAIN, "pos_att_type": ["c2p"], "type_vocab_size": 2}),
  ("deberta-v2", "text", {**_BERT, **_PLAIN, "pos_att_type": ["p2c"], "share_att_key": True}),
  ("bert", "span", {**_BERT, "num_labels": 2}),
  ("roberta", "span", {**_BERT, "num_labels": 2, "pad_token_id": 3}),
  ("electra", "span", {**_BERT, "num_labels": 2}),
  ("distilbert", "span", {**_DISTIL, "num_labels": 2}),
  ("deberta-v2", "span", {**_BERT, **DEBERTA, "num_labels": 2}),
]
_BATCHES = [((11, 1, 2, 7), False), ((20, 13), True), ((5,), False)]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
  "seed, case", [pytest.param(i, case, id=f"{case[0]}-{i}") for i, case in enumerate(_CASES)]
)
def test_tiny_random_models(seed, case, scan, tmp_path):
  """Padded on either side and not at all, within 2e-5."""
  theirs = make(*case, seed)
  theirs.save_pretrained(tmp_path)
  ours, params = pj.load_pretrained(tmp_path, scan_layers=scan)
  assert ours.config.labels_of == case[1] and ours.config.layers >= 4
  both = jax.jit(lambda p, *x: (pj.apply(ours, p, *x), pj.apply(ours, p, *x, hidden=True)[0]))
  for lengths, left in _BATCHES:
    inputs = batch(theirs.config, seed, lengths, left)
    want, real = run(theirs, inputs), inputs["mask"] > 0
    if left and ours.config.labels_of == "text":  # what is first is then no token
      continue
    logits, hidden = both(params, *inputs.values())
    of = ... if ours.config.labels_of == "text" else real
    np.testing.assert_allclose(np.asarray(logits)[of], want["logits"][of], atol=2e-5)
    np.testing.assert_allclose(np.asarray(hidden)[real], want["hidden"][real], atol=2e-5)


@pytest.mark.parametrize("length", [1, 40, 600])
@pytest.mark.parametrize(
  "buckets, farthest", [(256, 512), (32, 128), (6, 20), (7, 9), (2, 50), (0, 30)]
)
def test_rows_of_relative_positions(buckets, farthest, length):
  """To the bit of the rounding: all distances, those at the ends of buckets too."""
  x = torch.zeros(1, length, 1)
  far = build_relative_position(x, x, bucket_size=buckets or -1, max_position=farthest)[0]
  span = buckets or farthest
  want = (far + span).clamp(0, 2 * span - 1).numpy()
  np.testing.assert_array_equal(relative_rows(length, buckets, farthest), want)


def _vocabulary(special):
  """Of unigrams, with scores; the special ones first, the unknown one last among them."""
  made = Tokenizer(models.Unigram())
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=400, special_tokens=special, unk_token=special[-1], show_progress=False
  )
  made.train_from_iterator(plain(), trainer)
  return [tuple(item) for item in json.loads(made.to_str())["model"]["vocab"]]


@pytest.mark.parametrize(
  "kind, made, special",
  [
    ("xlm-roberta", XLMRobertaTokenizer, ["<s>", "<pad>", "</s>", "<unk>"]),
    ("camembert", CamembertTokenizer, ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>"]),
    ("deberta-v2", DebertaV2Tokenizer, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]),
  ],
)
def test_tokenizers_that_transformers_saves(kind, made, special, tmp_path):
  made(vocab=_vocabulary(special)).save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
  ours, theirs = data.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
  assert isinstance(theirs, made)
  assert [e.ids for e in ours.encodings(texts())] == theirs(texts())["input_ids"]
  one, two = texts()[100:300], [text or "a" for text in texts()[300:500]]
  found = data.encode(ours, data.Examples(one, two, np.zeros(200, np.int32)), 20)
  want = theirs(one, two, max_length=20, truncation=True)["input_ids"]
  assert found.ids.tolist() == [i for row in want for i in row]
  assert ours.special == theirs.special_tokens_map


_NAMES = {"distilbert": ["q_lin", "v_lin"], "deberta-v2": ["query_proj", "value_proj"]}
_PEFT = [_CASES[i] for i in (0, 3, 7, 10, 13, 15, 18, 21)]
_TYPES = {"text": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}


def _both(case, tmp_path, scan):
  make(*case, 3).save_pretrained(tmp_path / "base")
  model, params = pj.load_pretrained(tmp_path / "base", scan_layers=scan)
  load = lambda: CLASSES[case[1]].from_pretrained(tmp_path / "base", attn_implementation="eager")
  return model, params, load


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["default", "all-linear"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", _PEFT, ids=lambda case: f"{case[0]}-{case[1]}")
def test_lora_goes_to_peft_and_comes_back(case, scan, targets, tmp_path):
  model, params, load = _both(case, tmp_path, scan)
  method = pj.lora(2, 4) if targets is None else pj.lora(2, 4, targets)
  method = pj.chain(method, pj.unfreeze("head/.*"))
  layout = pj.linen.layout(model, np.zeros((1, 4), np.int32))
  attached = method.attach(jax.random.key(0), params, layout)
  mask = method.trainable(attached)
  rng = np.random.default_rng(5)
  drawn = jax.tree.map(
    lambda on, x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if on else x,
    mask,
    attached,
  )
  hf_peft.save(tmp_path / "ours", drawn, model, trained=mask, task_type=_TYPES[case[1]])
  adapted = PeftModel.from_pretrained(load(), tmp_path / "ours")
  inputs = batch(load().config, 1)
  got = jax.jit(lambda p: pj.apply(model, p, *inputs.values()))(drawn)
  # Without peft's class around it, which for QUESTION_ANS leaves token_type_ids out.
  want = run(adapted.get_base_model(), inputs)["logits"]
  of = ... if case[1] == "text" else inputs["mask"] > 0
  np.testing.assert_allclose(np.asarray(got)[of], want[of], atol=1e-4)
  assert np.abs(want - run(load(), inputs)["logits"]).max() > 0.05
  loaded, again = hf_peft.load(tmp_path / "ours", params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, drawn)
  assert again == mask
  if targets is None:  # the names are those that peft itself adapts by default
    config = LoraConfig(r=2, target_modules=_NAMES.get(case[0], ["query", "value"]))
    names = get_peft_model(load(), config).targeted_module_names
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}.lora_A.weight" for name in names} <= set(stored)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", _PEFT, ids=lambda case: f"{case[0]}-{case[1]}")
def test_pefts_lora_in_ours(case, scan, tmp_path):
  model, params, load = _both(case, tmp_path, scan)
  # peft leaves a head that it saves whole out of "all-linear" for some tasks and names alone.
  apart = dict(exclude_modules=".*(classifier|qa_outputs).*")
  config = LoraConfig(task_type=_TYPES[case[1]], r=3, target_modules="all-linear", **apart)
  theirs = get_peft_model(load(), config)
  make_bert.draw(theirs, 5, "lora_")
  make_bert.draw(theirs, 6, "modules_to_save")
  theirs.save_pretrained(tmp_path / "theirs")
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  inputs = batch(load().config, 2)
  want = run(theirs.get_base_model(), inputs)["logits"]
  got = jax.jit(lambda p: pj.apply(model, p, *inputs.values()))(loaded)
  of = ... if case[1] == "text" else inputs["mask"] > 0
  np.testing.assert_allclose(np.asarray(got)[of], want[of], atol=1e-4)
  trained = sum(x.numel() for x in theirs.parameters() if x.requires_grad)
  assert pj.count(loaded, mask) == trained
  assert any(paths.leaves(mask).values())
