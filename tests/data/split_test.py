import numpy as np
import pytest

from peftjax.data import Examples, split

NAMES = ("a", "b", "c")


def examples(labels, prefix="text"):
  texts = [f"{prefix} {i}" for i in range(len(labels))]
  return Examples(texts, None, np.asarray(labels, np.int32))


@pytest.fixture
def train():
  return examples(np.random.default_rng(0).permutation([0] * 600 + [1] * 300 + [2] * 100))


def test_missing_splits_are_a_tenth_each_and_stratified(train):
  splits = split.complete({"train": train}, NAMES, 0)
  assert list(splits) == ["train", "validation", "test"]
  counts = [np.bincount(part.labels).tolist() for part in splits.values()]
  assert counts == [[480, 240, 80], [60, 30, 10], [60, 30, 10]]
  texts = [text for part in splits.values() for text in part.texts]
  assert sorted(texts) == sorted(train.texts)


def test_labels_stay_with_their_texts(train):
  label_of = dict(zip(train.texts, train.labels, strict=True))
  for part in split.complete({"train": train}, NAMES, 0).values():
    assert [label_of[text] for text in part.texts] == part.labels.tolist()


def test_the_seed_and_nothing_else_decides(train):
  first, same, other = (split.complete({"train": train}, NAMES, seed) for seed in (0, 0, 1))
  assert first["test"].texts == same["test"].texts
  assert set(first["test"].texts) != set(other["test"].texts)


@pytest.mark.parametrize("given, missing", [("validation", "test"), ("test", "validation")])
def test_a_given_split_stays_as_it_is(train, given, missing):
  mine = examples([0, 1], "mine")
  splits = split.complete({"train": train, given: mine}, NAMES, 0)
  assert splits[given] is mine
  assert len(splits[missing]) == 100 and len(splits["train"]) == 900


@pytest.mark.parametrize("labels", [[0] * 3 + [1] * 3, [0] * 27 + [1] * 3, [*range(10)] * 3])
def test_three_examples_a_class_are_enough(labels):
  names = tuple("abcdefghij")[: max(labels) + 1]
  splits = split.complete({"train": examples(labels)}, names, 0)
  assert set(splits["train"].labels) == set(labels)


def test_a_class_too_small_to_split_is_named():
  with pytest.raises(ValueError, match="class 'b' has 2 training examples.* least 3"):
    split.complete({"train": examples([0] * 50 + [1] * 2)}, NAMES[:2], 0)


def test_too_few_regression_targets_raise():
  with pytest.raises(ValueError, match="too few"):
    split.complete({"train": Examples(["x"], None, np.zeros(1, np.float32))}, (), 0)


def test_halves_are_stratified(train):
  validation, test = split.halve(train, NAMES, 0)
  assert np.bincount(validation.labels).tolist() == np.bincount(test.labels).tolist()
  assert sorted(validation.texts + test.texts) == sorted(train.texts)


def test_no_text_is_in_two_splits_and_test_stays():
  def part(texts):
    return Examples(texts, None, np.zeros(len(texts), np.int32))

  splits = {
    "train": part(["a", "a", "b b", "c", " d"]),
    "validation": part(["b  b", "c", "c", "e"]),
    "test": part(["c ", "f", "f", "d"]),
  }
  kept, dropped = split.drop_duplicates(splits)
  assert {name: part.texts for name, part in kept.items()} == {
    "train": ["a", "a"],
    "validation": ["b  b", "e"],
    "test": ["c ", "f", "f", "d"],
  }
  assert dropped == {"validation_duplicates": 2, "train_duplicates": 3}


def test_pairs_are_duplicates_only_if_both_texts_are():
  one = Examples(["a", "a"], ["b", "c"], np.zeros(2, np.int32))
  other = Examples(["a"], ["c"], np.zeros(1, np.int32))
  kept, dropped = split.drop_duplicates({"train": one, "validation": other, "test": other.take([])})
  assert kept["train"].pairs == ["b"] and dropped["train_duplicates"] == 1


def test_an_empty_split_and_an_empty_class_are_named():
  full = examples([0, 1])
  with pytest.raises(ValueError, match="validation split has no examples"):
    split.check({"train": full, "validation": full.take([]), "test": full}, NAMES[:2])
  with pytest.raises(ValueError, match="class 'b' has 0 training examples"):
    split.check({"train": full.take([0]), "validation": full, "test": full}, NAMES[:2])
