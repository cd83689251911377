"""Directories of every kind of tokenizer: ids as transformers', and what is damaged, refused."""

import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftjax import data
from peftjax.data import sentencepiece_file
from tests.golden import tokenizer_dirs
from tests.golden.tokenizer_texts import texts


@pytest.fixture(scope="module")
def golden():
  return load_file(tokenizer_dirs.ROOT / "ids.safetensors")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """Loads a directory of `tokenizer_dirs` by name."""
  root = tmp_path_factory.mktemp("tokenizers")
  return lambda name: data.load_tokenizer(
    root / name if (root / name).exists() else tokenizer_dirs.write(name, root / name)
  )


@pytest.mark.parametrize("name", tokenizer_dirs.DIRECTORIES)
def test_ids_are_those_of_transformers(name, load, golden):
  """500 texts with every kind of white space, script, special token and length."""
  given = texts()
  rows = [np.asarray(e.ids, np.int32) for e in load(name).encodings(given)]
  found = [zlib.crc32(row.tobytes()) for row in rows]
  wrong = np.flatnonzero(golden[name] != np.asarray(found, np.uint32))
  assert [given[i] for i in wrong] == []
  shown = [row for text, row in zip(given, rows, strict=True) if len(text) > 20][:20]
  ends = np.cumsum(golden[f"{name}/lengths"])
  want = np.split(golden[f"{name}/ids"], ends[:-1])
  assert [row.tolist() for row in shown] == [row.tolist() for row in want]


def test_the_directories_differ(golden):
  """Each setting changes some ids, or the comparison would not see it."""
  digests = {name: golden[name].tobytes() for name in tokenizer_dirs.DIRECTORIES}
  same = {
    name
    for name in digests
    for other in digests
    if name < other and digests[name] == digests[other]
  }
  print(sorted(same))
  assert len(set(digests.values())) > 25


def _lacking(*roles):
  return {"tokenizer_config.json": dict.fromkeys(roles)}


DAMAGED = {
  # the directory, files written over it, what is said
  "empty": ("llama3", {"tokenizer.json": ""}, "tokenizer.json does not hold readable JSON"),
  "no model": ("llama3", {"tokenizer.json": {}}, "tokenizer.json cannot be read"),
  "a model of nothing": ("qwen2", {"tokenizer.json": {"model": 7}}, "cannot be read"),
  "added": ("llama3", {"tokenizer.json": {"added_tokens": 7}}, "added_tokens is 7; .* a list"),
  "added id": ("llama3", {"tokenizer.json": {"added_tokens": [{"id": "x"}]}}, "'x' is not a token"),
  "class": ("gpt2", {"tokenizer_config.json": {"tokenizer_class": 7}}, "tokenizer_class is 7"),
  "rebuilt": (
    "llama3",
    {"tokenizer_config.json": {"tokenizer_class": "CodeLlamaTokenizerFast"}},
    "has a CodeLlamaTokenizer, which transformers builds anew",
  ),
  "switch": ("gpt2", {"tokenizer_config.json": {"add_bos_token": "false"}}, "true or false"),
  "role": (
    "gpt2",
    {"tokenizer_config.json": {"bos_token": 7}},
    "bos_token is 7; it must be a text",
  ),
  "no token": (
    "gpt2",
    {"tokenizer_config.json": {"eos_token": True}},
    "eos_token is True; it must",
  ),
  "no content": ("gpt2", {"tokenizer_config.json": {"bos_token": {}}}, "lacks the field content"),
  "side": ("gpt2", {"tokenizer_config.json": {"truncation_side": "up"}}, "truncation_side is 'up'"),
  "decoder": ("gpt2", {"tokenizer_config.json": {"added_tokens_decoder": []}}, "must be an object"),
  "id": ("gpt2", {"tokenizer_config.json": {"added_tokens_decoder": {"-1": {}}}}, "'-1' is not a"),
  "another id": ("bert", {"added_tokens.json": {"<ent>": 900}}, "the id 900, but .* at 700"),
  "map": ("bert", {"special_tokens_map.json": []}, "must hold a JSON object"),
  "no [UNK]": ("bert", {"vocab.txt": "[PAD]\n[CLS]\n[SEP]\na\n"}, "encode every text: .*UNK"),
  "no [CLS]": ("bert", _lacking("cls_token"), "take away 'cls_token'"),
  "not UTF-8": ("bert", {"vocab.txt": b"[UNK]\n\xff"}, "vocab.txt cannot be read: .*UTF-8"),
  "merges": ("gpt2", {"merges.txt": "a b c d"}, "vocab.json with merges.txt cannot be read"),
  "no merges": ("gpt2", {"merges.txt": None}, "no tokenizer. .* vocab.json with merges.txt"),
  "no list": ("gpt2", {"vocab.json": []}, "vocab.json with merges.txt cannot be read"),
  "tiktoken": ("llama2", {"tokenizer.model": "IQ== 0\nIg== 1\n"}, "is not a SentencePiece model"),
  "nothing": (
    "llama2",
    {"tokenizer.model": ""},
    "is not a SentencePiece model .it holds no pieces",
  ),
  "other class": (
    "roberta",
    {"tokenizer_config.json": {"tokenizer_class": "BertweetTokenizer"}},
    "has a 'BertweetTokenizer', which is read from a tokenizer.json",
  ),
  "model type": ("roberta", {"config.json": {"model_type": ["a"]}}, "model_type is"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_named(name, tmp_path):
  """By the directory or file, in one sentence, whatever library found it out."""
  base, files, told = DAMAGED[name]
  folder = tokenizer_dirs.write(base, tmp_path / "model")
  for file, content in files.items():
    if content is None:
      (folder / file).unlink()
    elif isinstance(content, bytes):
      (folder / file).write_bytes(content)
    else:
      (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(ValueError, match=f"{folder}.*{told}"):
    data.load_tokenizer(folder)


def test_a_pattern_that_never_ends_is_stopped(tmp_path):
  """By a panic of the Rust library, which is no Exception."""
  folder = tokenizer_dirs.write("llama3", tmp_path / "model")
  text = json.loads((folder / "tokenizer.json").read_text())
  text["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"
  (folder / "tokenizer.json").write_text(json.dumps(text))
  with pytest.raises(ValueError, match="cannot encode a text: .*retry-limit"):
    data.load_tokenizer(folder).prompts(["a" * 26 + "b"])


def test_merges_stand_by_their_piece_and_then_by_the_length_of_its_first_part():
  """In an ambiguous text, "aba" in "ababa", the first of them is taken."""
  made = sentencepiece_file.merges(["a", "b", "ab", "ba", "aba"])
  assert made == [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]


@pytest.mark.parametrize(
  "file, said",
  [
    ("special_tokens_map.json", {"mask_token": {"content": "<M>", "lstrip": True}}),
    ("special_tokens_map.json", {"mask_token": {"content": "<M>", "special": False}}),
    ("tokenizer_config.json", {"mask_token": "<M>"}),
    (
      "tokenizer_config.json",
      {"mask_token": "<M>", "added_tokens_decoder": {"700": {"content": "<M>", "special": False}}},
    ),
  ],
)
def test_a_token_that_has_a_role_is_special(file, said, tmp_path):
  """Whatever the files say of it, as in transformers.

  It is left out of decoded text, and sought before the normalizer makes a text lower case.
  """
  folder = tokenizer_dirs.write("bert", tmp_path / "model")
  (folder / file).write_text(json.dumps(said))
  tokenizer = data.load_tokenizer(folder)
  ids = tokenizer.encode("a<M>", add_special_tokens=False).ids
  assert len(ids) == 2 and tokenizer.decode(ids) == "a"
  assert tokenizer.encode("a<m>", add_special_tokens=False).ids != ids
