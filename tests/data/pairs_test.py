"""Batches of sources and targets: shapes, what is predicted, every pair once."""

import numpy as np
import pytest

from peftjax.data import Tokens
from peftjax.data.pairs import Pairs, PairStream, widths


def tokens(*texts):
  ids = np.concatenate([np.asarray(text, np.int32) for text in texts])
  offsets = np.cumsum([0, *map(len, texts)])
  return Tokens(ids, np.zeros(len(ids), np.uint8), offsets)


@pytest.fixture
def pairs():
  """Sources of 3 or 20 tokens, targets of 2 to 7, and one of 40 beside a long source."""
  sources = [[*range(2, 2 + n)] for n in (3, 3, 20, 3, 20, 3)]
  targets = [[*range(50, 50 + n)] for n in (2, 7, 40, 3, 4, 2)]
  return Pairs(tokens(*sources), tokens(*targets), pad_id=0, start_id=9)


def test_a_batch_predicts_the_target_from_its_start_on(pairs):
  batch = pairs.batch(np.array([1, 0, -1]), 4, 9)
  assert batch["tokens"].tolist()[:2] == [[2, 3, 4, 0]] * 2
  assert batch["mask"].tolist() == [[True] * 3 + [False]] * 2 + [[True] + [False] * 3]
  assert batch["targets"][0].tolist() == [9, *range(50, 57), 0]
  assert batch["targets"][1].tolist() == [9, 50, 51] + [0] * 6
  assert batch["weights"].tolist() == [[0] + [1] * 7 + [0], [0, 1, 1] + [0] * 6, [0] * 9]
  kinds = {name: x.dtype.name for name, x in batch.items()}
  assert kinds == {"tokens": "int32", "mask": "bool", "targets": "int32", "weights": "float32"}


def test_targets_are_as_wide_as_the_longest_beside_sources_of_a_bucket(pairs):
  """Multiples of 16, the start counted, however long the targets of other buckets are."""
  assert widths([pairs], 32) == ((16, 32), (16, 48))
  assert widths([pairs, pairs], 20, multiple=4) == ((4, 20), (8, 44))


def test_a_stream_has_every_pair_once_an_epoch_in_few_shapes(pairs):
  ends, beside = widths([pairs], 32)
  stream = PairStream(pairs, ends, beside, 4, seed=0)
  epochs = [list(stream.iterate(start, start + 2)) for start in (0, 2)]
  assert stream.steps_per_epoch == 2
  for batches in epochs:
    assert {(b["tokens"].shape, b["targets"].shape) for b in batches} == {
      ((4, 16), (4, 16)),
      ((4, 32), (4, 48)),
    }
    assert sum(batch["weights"].sum() for batch in batches) == len(pairs.targets.ids)
  again = list(stream.iterate(1, 2))[0]
  assert all((again[name] == epochs[0][1][name]).all() for name in again)
