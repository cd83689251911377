"""Logits and token ids equal transformers', for models and vocabularies made on the spot."""

import jax
import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import (
  BertConfig,
  BertForSequenceClassification,
  BertModel,
  BertTokenizerFast,
  RobertaConfig,
  RobertaForSequenceClassification,
  RobertaTokenizerFast,
)

import peftjax as pj
from peftjax import data
from tests.golden.make_bert import draw
from tests.golden.texts import minilm_dir, texts
from tests.parity.reference import assert_near, classifier, compute, inputs, logits

pytestmark = pytest.mark.parity

_BERT = dict(
  vocab_size=150,
  hidden_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  intermediate_size=80,
  max_position_embeddings=20,
)
_CASES = [
  ("bert", dict(num_labels=4)),
  ("bert", dict(num_labels=1, hidden_act="relu", num_attention_heads=1)),
  ("bert", dict(num_labels=2, hidden_act="gelu_new", num_hidden_layers=1, type_vocab_size=3)),
  ("bert", dict(num_labels=3, hidden_act="silu", layer_norm_eps=1e-2, num_attention_heads=12)),
  ("roberta", dict(num_labels=1)),
  ("roberta", dict(num_labels=5, layer_norm_eps=1e-5, hidden_act="gelu_pytorch_tanh")),
  ("roberta", dict(num_labels=2, pad_token_id=3, num_attention_heads=2)),
]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("seed, case", list(enumerate(_CASES)))
def test_tiny_random_models(seed, case, scan, tmp_path):
  family, fields = case
  if family == "bert":
    config = BertConfig(**{**_BERT, **fields})
    model = BertForSequenceClassification(config)
  else:
    fields = {"pad_token_id": 1, "type_vocab_size": 1, **fields}
    config = RobertaConfig(**{**_BERT, **fields})
    model = RobertaForSequenceClassification(config)
  draw(model, seed)
  model.save_pretrained(tmp_path)
  batch = inputs(150, config.pad_token_id, config.type_vocab_size, seed)
  ours, params = pj.load_pretrained(tmp_path, scan_layers=scan)
  assert ours.config.labels == fields["num_labels"]
  got = jax.jit(lambda p: pj.apply(ours, p, *batch))(params)
  assert_near(got, logits(classifier(tmp_path), batch))


@pytest.fixture(scope="module")
def real_batch():
  """Eight real texts in MiniLM's vocabulary: `[tokens, mask, types]`, int32 [8, 64]."""
  encoded = BertTokenizerFast.from_pretrained(minilm_dir())(
    texts()[::125], max_length=64, truncation=True, padding="max_length", return_tensors="np"
  )
  names = ("input_ids", "attention_mask", "token_type_ids")
  return [encoded[name].astype(np.int32) for name in names]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_minilm(real_batch, scan):
  want = compute(BertModel.from_pretrained(minilm_dir(), attn_implementation="eager"), real_batch)
  model, params = pj.load_pretrained(minilm_dir(), scan_layers=scan)
  hidden, pooled = jax.jit(lambda p: pj.apply(model, p, *real_batch, hidden=True))(params)
  real = real_batch[1].astype(bool)
  assert_near(hidden[real], want.last_hidden_state.numpy()[real])
  assert_near(pooled, want.pooler_output.numpy())


def test_minilm_with_a_head(real_batch, tmp_path):
  theirs = classifier(minilm_dir(), num_labels=5)
  draw(theirs, 0, "classifier")
  theirs.save_pretrained(tmp_path)
  model, params = pj.load_pretrained(tmp_path)
  assert_near(pj.apply(model, params, *real_batch), logits(theirs, real_batch))


def _same_ids(directory, theirs, length):
  """Single texts and pairs, cut to `length`: ids and types."""
  first, second = texts(), texts()[::-1]
  tokenizer = data.load_tokenizer(str(directory))
  for pairs in (None, second):
    given = data.Examples(first, pairs, np.zeros(len(first), np.int32))
    ours = data.encode(tokenizer, given, length)
    want = theirs(first, pairs, max_length=length, truncation=True, return_token_type_ids=True)
    assert ours.ids.tolist() == [i for row in want["input_ids"] for i in row]
    assert ours.types.tolist() == [t for row in want["token_type_ids"] for t in row]
    assert ours.lengths.tolist() == [len(row) for row in want["input_ids"]]


@pytest.mark.parametrize("length", [16, 128])
def test_wordpiece_ids(length):
  _same_ids(minilm_dir(), BertTokenizerFast.from_pretrained(minilm_dir()), length)


@pytest.mark.parametrize("files", ["vocab.json", "tokenizer.json"])
def test_byte_level_bpe_ids(files, tmp_path):
  trained = ByteLevelBPETokenizer()
  special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
  trained.train_from_iterator(texts()[::4], 800, special_tokens=special, show_progress=False)
  trained.save_model(str(tmp_path))
  theirs = RobertaTokenizerFast.from_pretrained(tmp_path)
  if files == "tokenizer.json":
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
  _same_ids(tmp_path, theirs, 32)
