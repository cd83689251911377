"""Texts, pairs, chats and what is written, of every kind of tokenizer, live with transformers."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peftjax import data
from peftjax.data import chat
from peftjax.training.loop import train_and_evaluate
from peftjax.training.settings import from_config
from peftjax.training.writer import Writer
from tests import tiny_lm
from tests.golden import tokenizer_dirs
from tests.golden.chat_templates import CONVERSATIONS, TEMPLATES
from tests.golden.texts import minilm_dir
from tests.golden.tokenizer_texts import texts

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """The directory `name` in both libraries."""
  root = tmp_path_factory.mktemp("tokenizers")

  def load(name):
    folder = root / name
    folder = folder if folder.exists() else tokenizer_dirs.write(name, folder)
    folder = minilm_dir() if name == "minilm" else folder
    return data.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)

  load("bert")
  return load


@pytest.mark.parametrize("name", [*tokenizer_dirs.DIRECTORIES, "minilm"])
def test_ids_texts_and_special_tokens(name, both):
  ours, theirs = both(name) if name != "minilm" else _minilm()
  given = texts()
  want = theirs(given, padding=False)["input_ids"]
  assert [e.ids for e in ours.encodings(given)] == want
  bare = theirs(given, add_special_tokens=False, padding=False)["input_ids"]
  assert [e.ids for e in ours.encodings(given, special=False)] == bare
  skipped = [theirs.decode(ids, skip_special_tokens=True) for ids in want]
  if not theirs.clean_up_tokenization_spaces:
    assert [ours.decode(ids) for ids in want] == skipped
  assert ours.special == theirs.special_tokens_map


@pytest.mark.parametrize("length", [8, 40])
@pytest.mark.parametrize("name", tokenizer_dirs.DIRECTORIES)
def test_pairs_are_cut_alike(name, length, both):
  """To any length, with the types that the model has; transformers takes an empty text for none."""
  ours, theirs = both(name)
  one, two = texts()[100:300], [text or "a" for text in texts()[300:500]]
  for pairs in (None, two):
    found = data.encode(ours, data.Examples(one, pairs, np.zeros(200, np.int32)), length)
    want = theirs(one, pairs, max_length=length, truncation=True, padding=False)
    assert found.ids.tolist() == [i for row in want["input_ids"] for i in row]
    types = want.get("token_type_ids", [[0] * len(row) for row in want["input_ids"]])
    assert found.types.tolist() == [t for row in types for t in row]


def _minilm():
  return data.load_tokenizer(minilm_dir()), AutoTokenizer.from_pretrained(minilm_dir())


@pytest.mark.parametrize("name", ["llama2", "llama2_json", "llama3", "mistral", "qwen2"])
@pytest.mark.parametrize("template", ["llama2", "llama3", "chatml", "zephyr"])
def test_a_chat_has_the_ids_of_apply_chat_template(name, template, both, tmp_path):
  """With <s> once, from the template alone."""
  folder = tokenizer_dirs.write(name, tmp_path / "model")
  (folder / "chat_template.jinja").write_text(TEMPLATES[template])
  ours, theirs = data.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
  special = {"bos_token": "", "eos_token": "", **ours.special}
  said = CONVERSATIONS[2]
  want = theirs.apply_chat_template(
    said, add_generation_prompt=True, return_dict=False, bos_token=special["bos_token"]
  )
  text = chat.render(chat.template(folder), said, special)
  assert ours.prompts([text], special=False) == [want]


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def trained(request, tmp_path_factory):
  """A directory with a tiny Llama that starts texts with <s>, and a run on it of one step."""
  folder = tokenizer_dirs.write(request.param, tmp_path_factory.mktemp("lm") / "model")
  (folder / "chat_template.jinja").write_text(TEMPLATES["llama2"])
  tokenizer = AutoTokenizer.from_pretrained(folder)
  torch.manual_seed(0)
  config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.5,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
  )
  LlamaForCausalLM(config).save_pretrained(folder)
  rows = [{"text": text} for text in texts() if 30 < len(text) < 120 and text.isascii()]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = dict(
    data__text_column="text",
    data__pair_column=None,
    data__loss="all",
    data__max_length=192,
    data__eval_rows=None,
    train__steps=1,
    train__eval_batch_size=8,
  )
  made = tiny_lm.config(folder, folder / "rows.jsonl", "quant=none", **changes)
  result = train_and_evaluate(made, folder / "run")
  theirs = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
  return folder, result, made, theirs, AutoTokenizer.from_pretrained(folder)


def test_perplexity_before_training(trained):
  """exp of the mean over all tokens of the test split but each text's first, its end included."""
  folder, result, made, model, tokenizer = trained
  corpus = data.load(seed=made.seed, **from_config(made).data.corpus_arguments())
  total, count = 0.0, 0
  for text in corpus.splits["test"].texts:
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) <= 192
    with torch.no_grad():
      loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    total, count = total + loss * (len(ids) - 1), count + len(ids) - 1
  assert result["before"]["test"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("as_chat", [False, True], ids=["plain", "chat"])
def test_greedy_continuation(trained, as_chat):
  folder, _, _, model, tokenizer = trained
  writer = Writer(folder / "run", adapted=False)
  for prompt in ("the film rose", "for i in range(10):\n  print", "naïve 🙃"):
    if as_chat:
      said = [{"role": "user", "content": prompt}]
      ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    else:
      ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
      whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0].tolist()
    new = writer.write([prompt], max_new_tokens=12, as_chat=as_chat)[0]
    before = tokenizer.decode(ids, skip_special_tokens=True)
    assert before + new == tokenizer.decode(whole, skip_special_tokens=True)
