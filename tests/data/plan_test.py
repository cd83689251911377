import itertools

import numpy as np
import pytest

from peftjax import data


@pytest.fixture
def lengths():
  """Of 1,001 texts, mostly short."""
  return np.minimum(np.random.default_rng(0).geometric(0.05, 1_001) + 2, 120)


def padded(lengths, buckets):
  return np.asarray(buckets)[np.searchsorted(buckets, lengths)].sum()


@pytest.mark.parametrize("max_buckets", [1, 2, 3, 4])
def test_buckets_are_the_best_of_all(lengths, max_buckets):
  chosen = data.buckets(lengths, max_length=128, max_buckets=max_buckets)
  assert len(chosen) <= max_buckets and list(chosen) == sorted(set(chosen))

  def cost(buckets):
    return padded(lengths, buckets) + 0.02 * len(buckets) * lengths.sum()

  last = -(-lengths.max() // 16) * 16
  others = [
    (*some, last)
    for count in range(max_buckets)
    for some in itertools.combinations(range(16, last, 16), count)
  ]
  assert cost(chosen) == min(map(cost, others))


def test_buckets_waste_less(lengths):
  chosen = data.buckets(lengths, max_length=128)
  assert padded(lengths, chosen) < 0.7 * padded(lengths, (128,))


def test_a_nearly_useless_bucket_is_not_made():
  assert data.buckets(np.array([64] * 1_000 + [5]), max_length=64) == (64,)


def test_no_bucket_is_above_the_longest_or_max_length():
  assert data.buckets(np.array([3, 20]), max_length=512, max_buckets=1) == (32,)
  assert data.buckets(np.array([3, 20]), max_length=20, max_buckets=1) == (20,)


@pytest.mark.parametrize("lengths, named", [([], "0 lengths"), ([3, 70], "longest 70.* 64")])
def test_lengths_that_fit_no_buckets_raise(lengths, named):
  with pytest.raises(ValueError, match=named):
    data.buckets(np.array(lengths, int), max_length=64)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_comes_once_and_fits_its_batch(lengths, shuffle):
  buckets = (16, 48, 128)
  plan = data.batch_plan(lengths, buckets, 32, 0, 0, shuffle=shuffle)
  assert plan.index.dtype == plan.length.dtype == np.int32
  assert plan.index.shape == (len(plan), 32)
  assert sorted(plan.index[plan.index >= 0]) == list(range(len(lengths)))
  for index, length in zip(plan.index, plan.length, strict=True):
    real = lengths[index[index >= 0]]
    shorter = max((bucket for bucket in buckets if bucket < length), default=0)
    assert len(real) and real.max() <= length and real.min() > shorter


def test_only_the_last_batch_of_a_bucket_is_short(lengths):
  plan = data.batch_plan(lengths, (16, 48, 128), 32, 0, 0)
  short = plan.length[(plan.index < 0).any(axis=1)]
  assert len(short) == len(set(short))
  assert (np.diff(plan.index < 0, axis=1) >= 0).all()


def test_seed_and_epoch_decide_and_the_number_of_batches_stays(lengths):
  def plan(seed, epoch):
    return data.batch_plan(lengths, (16, 48, 128), 32, seed, epoch)

  np.testing.assert_array_equal(plan(3, 5).index, plan(3, 5).index)
  np.testing.assert_array_equal(plan(3, 5).length, plan(3, 5).length)
  for other in (plan(3, 6), plan(4, 5), plan(5, 3)):
    assert other.index.shape == plan(3, 5).index.shape
    assert (other.index != plan(3, 5).index).any() and (other.length != plan(3, 5).length).any()


def test_without_shuffle_the_order_is_the_examples_own():
  plan = data.batch_plan(np.array([9, 1, 2, 8, 3]), (4, 16), 2, 0, 7, shuffle=False)
  assert plan.index.tolist() == [[1, 2], [4, -1], [0, 3]] and plan.length.tolist() == [4, 4, 16]


def test_a_batch_of_no_rows_raises():
  with pytest.raises(ValueError, match="batch_size 0 .* 1 or more"):
    data.batch_plan(np.array([1]), (4,), 0, 0, 0)


def test_an_example_longer_than_the_buckets_raises():
  with pytest.raises(ValueError, match="longest example has 5 tokens, the last bucket 4"):
    data.batch_plan(np.array([5]), (4,), 1, 0, 0)
