"""Packing: every token once, pieces apart, and only what is to be predicted has weight."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from peftjax import data
from peftjax.data.pack import RowStream, pack


def documents(seed=0, count=30):
  """Documents of 1 to 40 different ids; no two documents share an id."""
  rng = np.random.default_rng(seed)
  return [1000 * i + 1 + np.arange(rng.integers(1, 41)) for i in range(count)]


@pytest.mark.parametrize("seed", [None, 3])
def test_every_token_is_in_one_place(seed):
  """Nothing is lost, doubled or torn, whatever the order."""
  docs = documents()
  rows = pack(docs, 16, seed=seed)
  placed = rows.tokens[rows.segments > 0]
  assert sorted(placed.tolist()) == sorted(np.concatenate(docs).tolist())
  assert rows.documents == len(docs) and (rows.tokens[rows.segments == 0] == 0).all()
  for tokens, segments, positions in zip(rows.tokens, rows.segments, rows.positions, strict=True):
    for piece in range(1, segments.max() + 1):
      at = np.flatnonzero(segments == piece)
      assert (np.diff(at) == 1).all() and (np.diff(tokens[at]) == 1).all()
      np.testing.assert_array_equal(positions[at], np.arange(len(at)))
    assert (np.diff(segments[segments > 0]) >= 0).all()


def test_what_is_predicted():
  """Not the first token of a piece, nor a prompt, nor padding; all the rest."""
  rows = pack([np.arange(10, 15), np.arange(20, 26), np.arange(30, 32)], 8, prompts=[2, 0, 2])
  assert rows.tokens.tolist() == [[10, 11, 12, 13, 14, 0, 0, 0], [20, 21, 22, 23, 24, 25, 30, 31]]
  assert rows.weights.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]]
  assert rows.segments.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2]]
  assert rows.positions.tolist()[1] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_a_long_document_is_cut():
  """Into rows of its own; what is left shares one."""
  rows = pack([np.arange(1, 21), np.arange(50, 54)], 8)
  assert rows.tokens[:2].tolist() == [list(range(1, 9)), list(range(9, 17))]
  assert rows.tokens[2].tolist() == [17, 18, 19, 20, 50, 51, 52, 53]


def test_too_little_is_refused():
  with pytest.raises(ValueError, match="0 documents"):
    pack([], 8)
  with pytest.raises(ValueError, match="rows of 1 tokens"):
    pack([np.arange(3)], 1)


def test_the_stream_has_every_row_each_epoch_and_resumes_anywhere():
  """In another order each epoch; a step's batch depends on nothing but its number."""
  rows = pack(documents(), 16)
  stream = RowStream(rows, 4, seed=1)
  assert stream.steps_per_epoch == -(-len(rows) // 4)
  epochs = []
  for epoch in range(2):
    steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
    epochs.append([stream.batch(step) for step in steps])
    seen = np.concatenate([b["tokens"][b["weights"].any(1)] for b in epochs[-1]])
    real = rows.tokens[rows.weights.any(1)]
    assert sorted(map(tuple, seen)) == sorted(map(tuple, real))
  assert (epochs[0][0]["tokens"] != epochs[1][0]["tokens"]).any()
  later = list(RowStream(rows, 4, seed=1).iterate(3, 6))
  for step, batch in enumerate(later, 3):
    for field, value in stream.batch(step).items():
      np.testing.assert_array_equal(batch[field], value)


@pytest.fixture
def tokenizer():
  """A token for every word."""
  words = "title of a text body goes here more".split()
  made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words, 1)}, unk_token="a"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  return data.TextTokenizer(made, "words")


def test_documents_end_and_begin_with_their_prompt(tokenizer):
  """The first line of a text, or the first text of a pair, if completions are asked for."""
  texts = data.Examples(["title of\nbody goes here", "a text"], None, np.zeros(2))
  ids, prompts = data.documents(tokenizer, texts, (99, 98), completions=True)
  assert [x.tolist() for x in ids] == [[1, 2, 5, 6, 7, 99], [3, 4, 99]] and prompts == [2, 2]
  assert data.documents(tokenizer, texts, (99, 98), completions=False)[1] == [0, 0]
  pairs = data.Examples(["title"], [" more text"], np.zeros(1))
  ids, prompts = data.documents(tokenizer, pairs, (99, 98), completions=True)
  assert ids[0].tolist() == [1, 8, 4, 99] and prompts == [1]
