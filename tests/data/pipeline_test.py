import threading

import numpy as np
import pytest

from peftjax import data

BUCKETS = (4, 8, 16)


@pytest.fixture
def tokens(make_tokens):
  return make_tokens(np.random.default_rng(0).integers(3, 17, 101))


@pytest.fixture
def labels():
  return np.arange(101, dtype=np.int32)


@pytest.fixture
def make_stream(tokens, labels):
  def make(**options):
    return data.Stream(tokens, labels, BUCKETS, 8, 0, pad_id=7, **options)

  return make


def assert_equal(ours, theirs):
  for one, other in zip(ours, theirs, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], strict=True)


def test_a_batch_holds_its_examples_and_padding(make_tokens):
  tokens, labels = make_tokens([3, 5, 2]), np.array([4, 5, 6], np.int32)
  plan = data.Plan(np.array([[2, 0, -1]], np.int32), np.array([4], np.int32))
  (batch,) = data.batches(tokens, labels, plan, pad_id=7)
  assert batch["tokens"].tolist() == [[3, 1009, 7, 7], [1, 1001, 1002, 7], [7] * 4]
  assert batch["types"].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4]
  # An empty row has one true place, so that a softmax over its row is defined.
  assert batch["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
  assert batch["labels"].tolist() == [6, 4, 0]
  assert batch["weights"].tolist() == [1, 1, 0]
  assert {name: array.dtype for name, array in batch.items()} == {
    "tokens": np.int32,
    "types": np.int32,
    "mask": np.bool_,
    "labels": np.int32,
    "weights": np.float32,
  }


def test_regression_targets_stay_float32(make_tokens):
  plan = data.Plan(np.array([[0]], np.int32), np.array([4], np.int32))
  (batch,) = data.batches(make_tokens([3]), np.array([0.5], np.float32), plan, pad_id=0)
  assert batch["labels"].dtype == np.float32 and batch["labels"] == [0.5]


def test_every_epoch_has_every_example_once_in_its_own_order(make_stream):
  stream = make_stream()
  orders = set()
  for epoch in range(3):
    first = epoch * stream.steps_per_epoch
    batches = list(stream.iterate(first, first + stream.steps_per_epoch))
    seen = np.concatenate([batch["labels"][batch["weights"] > 0] for batch in batches])
    assert sorted(seen) == list(range(101))
    orders.add(tuple(seen))
  assert len(orders) == 3


@pytest.mark.parametrize("consumed", [0, 1, 14, 20, 33])
def test_resuming_equals_going_on(make_stream, consumed):
  """Also across the epochs' boundaries, and whatever was read ahead before the stop."""
  whole = list(make_stream().iterate(0, 40))
  assert 14 <= make_stream().steps_per_epoch <= 20
  stopped = make_stream().iterate(0, 40)
  head = [next(stopped) for _ in range(consumed)]
  assert_equal([*head, *make_stream().iterate(consumed, 40)], whole)


def test_evaluation_can_start_anywhere(tokens, labels):
  plan = data.batch_plan(tokens.lengths, BUCKETS, 8, 0, 0, shuffle=False)
  whole = list(data.batches(tokens, labels, plan, pad_id=0))
  assert len(whole) == len(plan)
  assert_equal(data.batches(tokens, labels, plan, pad_id=0, start=5), whole[5:])
  assert list(data.batches(tokens, labels, plan, pad_id=0, start=len(plan))) == []


def test_a_finished_stream_is_empty(make_stream):
  assert list(make_stream().iterate(7, 7)) == []


def test_an_abandoned_iterator_leaves_no_thread(make_stream):
  before = set(threading.enumerate())
  iterator = make_stream().iterate(0, 1_000)
  next(iterator)
  readers = set(threading.enumerate()) - before
  assert readers
  del iterator
  for reader in readers:
    reader.join(timeout=10)
    assert not reader.is_alive()


def test_an_error_in_a_batch_reaches_the_consumer(tokens):
  plan = data.Plan(np.array([[1_000]], np.int32), np.array([4], np.int32))
  with pytest.raises(IndexError):
    next(data.batches(tokens, np.zeros(101, np.int32), plan, pad_id=0))


def test_the_whole_way_with_real_texts(minilm, bbc):
  train = bbc.splits["train"].take(np.arange(100))
  tokens = data.encode(minilm, train, 48)
  buckets = data.buckets(tokens.lengths, max_length=48)
  stream = data.Stream(tokens, train.labels, buckets, 32, 0, pad_id=0)
  batch = next(stream.iterate(0, 1))
  assert batch["tokens"].shape == (32, 48) and (batch["tokens"][:, 0] == 101).all()
