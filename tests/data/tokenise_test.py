import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from peftjax import data

CLS, SEP = 101, 102


def examples(texts, pairs=None):
  return data.Examples(texts, pairs, np.zeros(len(texts), np.int32))


def rows(tokens):
  return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


def test_the_file_pads_and_truncates_at_128_and_ours_does_not(minilm_dir):
  theirs = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
  ours = data.load_tokenizer(str(minilm_dir))
  assert ours.backend.truncation is None and ours.backend.padding is None
  texts = ["short", "long " * 300]
  assert [len(theirs.encode(text).ids) for text in texts] == [128, 128]
  assert data.encode(ours, examples(texts), 512).lengths.tolist() == [3, 302]


def test_ids_are_the_librarys_own(minilm, sentiment):
  some = sentiment.splits["test"].take(np.arange(1_000))
  tokens = data.encode(minilm, some, 64)
  for text, ids in zip(some.texts, rows(tokens), strict=True):
    whole = minilm.encode(text).ids
    assert ids == (whole if len(whole) <= 64 else [*whole[:63], SEP])
  assert (tokens.ids.dtype, tokens.types.dtype, tokens.offsets.dtype) == (
    np.int32,
    np.uint8,
    np.int64,
  )


def test_truncation_keeps_the_special_tokens_and_leaves_no_trace(minilm):
  tokens = data.encode(minilm, examples(["one two three four five"]), 4)
  assert rows(tokens)[0][0] == CLS and rows(tokens)[0][-1] == SEP and tokens.lengths[0] == 4
  assert minilm.backend.truncation is None and minilm.backend.padding is None


def test_of_a_pair_the_longer_loses_first(minilm):
  pair = examples(["one two three four five six"], ["seven eight"])
  tokens = data.encode(minilm, pair, 8)
  one, two, three, seven, eight = (
    minilm.backend.token_to_id(word) for word in ("one", "two", "three", "seven", "eight")
  )
  assert rows(tokens)[0] == [CLS, one, two, three, SEP, seven, eight, SEP]
  assert tokens.types.tolist() == [0] * 5 + [1] * 3


@pytest.mark.parametrize("pairs, least", [(None, 3), (["b b b"], 5)])
def test_no_room_for_text_raises(minilm, pairs, least):
  assert data.encode(minilm, examples(["a a a"], pairs), least).lengths.tolist() == [least]
  with pytest.raises(ValueError, match=f"max_length {least - 1} is too short.* {least} or more"):
    data.encode(minilm, examples(["a a a"], pairs), least - 1)


def test_no_texts_give_no_tokens(minilm):
  tokens = data.encode(minilm, examples([]), 8)
  assert len(tokens) == 0 and tokens.ids.dtype == np.int32


def test_more_texts_than_a_chunk(minilm, monkeypatch):
  texts = [f"number {i}" for i in range(20)]
  whole = data.encode(minilm, examples(texts), 8)
  monkeypatch.setattr("peftjax.data.text_tokenizer.CHUNK", 7)
  assert rows(data.encode(minilm, examples(texts), 8)) == rows(whole)


def test_a_vocabulary_file_gives_the_same_ids(minilm_dir, minilm, tmp_path, sentiment):
  (tmp_path / "vocab.txt").write_bytes((minilm_dir / "vocab.txt").read_bytes())
  texts = [*sentiment.splits["test"].texts[:1_000], "A [MASK] é 中文 token", ""]
  ours = data.encode(data.load_tokenizer(str(tmp_path)), examples(texts), 64)
  theirs = data.encode(minilm, examples(texts), 64)
  assert rows(ours) == rows(theirs)


def test_a_cased_vocabulary_stays_cased(tmp_path):
  (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "A", "a"]))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
  tokens = data.encode(data.load_tokenizer(str(tmp_path)), examples(["A a"]), 8)
  assert rows(tokens) == [[2, 4, 5, 3]]


def test_roberta_files(tmp_path):
  words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "h", "i", "Ġ", "hi", "Ġhi"]
  (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\nĠ hi\n")
  tokenizer = data.load_tokenizer(str(tmp_path))
  assert rows(data.encode(tokenizer, examples(["hi hi <mask>"]), 8)) == [[0, 8, 9, 7, 4, 2]]
  pair = data.encode(tokenizer, examples(["hi"], ["hi"]), 8)
  assert rows(pair) == [[0, 8, 2, 2, 8, 2]] and not pair.types.any()


def test_a_directory_without_tokenizer_lists_the_files(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer.*tokenizer.json.*vocab.txt.*merges.txt"):
    data.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
  "name, message",
  [("tokenizer.json", "does not hold readable JSON"), ("vocab.txt", "Missing .UNK. token")],
)
def test_a_broken_tokenizer_is_named(tmp_path, name, message):
  (tmp_path / name).write_text("{")
  with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
    data.load_tokenizer(str(tmp_path))
