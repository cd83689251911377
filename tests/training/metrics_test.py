"""Metrics against scikit-learn and SciPy themselves."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from peftjax.training import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, 50)
PREDICTED = LOGITS.argmax(1)


def test_classification_metrics_are_sklearns():
  """Accuracy, macro-F1 and Matthews of the argmax."""
  assert metrics.compute(("accuracy", "macro_f1", "matthews"), LOGITS, LABELS) == {
    "accuracy": sk.accuracy_score(LABELS, PREDICTED),
    "macro_f1": sk.f1_score(LABELS, PREDICTED, average="macro"),
    "matthews": sk.matthews_corrcoef(LABELS, PREDICTED),
  }


def test_f1_is_of_the_positive_class():
  """ "f1" of two classes is GLUE's: of class 1."""
  labels = LABELS % 2
  got = metrics.compute(("f1",), LOGITS[:, :2], labels)["f1"]
  assert got == sk.f1_score(labels, LOGITS[:, :2].argmax(1))


def test_correlations_are_scipys():
  """Pearson and Spearman of the single output."""
  labels = RNG.normal(size=50).astype(np.float32)
  got = metrics.compute(("pearson", "spearman"), LOGITS[:, :1], labels)
  assert got["pearson"] == pytest.approx(stats.pearsonr(labels, LOGITS[:, 0])[0])
  assert got["spearman"] == pytest.approx(stats.spearmanr(labels, LOGITS[:, 0])[0])


def test_constant_predictions_score_zero_without_a_warning():
  """A model that always says the same correlates with nothing."""
  same, labels = np.ones((20, 1), np.float32), np.arange(20.0)
  assert metrics.compute(("pearson", "spearman"), same, labels) == {"pearson": 0, "spearman": 0}
  always = np.tile(np.array([[1.0, 0.0, 0.0]], np.float32), (50, 1))
  got = metrics.compute(("accuracy", "macro_f1", "matthews"), always, LABELS)
  assert got["matthews"] == 0 and 0 < got["macro_f1"] < got["accuracy"]


def test_values_are_plain_floats():
  """What goes into JSON is no NumPy scalar."""
  got = metrics.compute(("accuracy", "macro_f1"), LOGITS, LABELS)
  assert {type(value) for value in got.values()} == {float}
