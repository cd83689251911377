"""The task's metrics, by scikit-learn and SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
  return sk.f1_score(labels, predicted, average="macro", zero_division=0)


def _correlation(fn: Callable[..., tuple[float, float]]) -> Callable[..., float]:
  def of(labels: np.ndarray, predicted: np.ndarray) -> float:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", stats.ConstantInputWarning)
      value = fn(labels, predicted)[0]
    return 0.0 if np.isnan(value) else value  # a constant prediction correlates with nothing

  return of


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
  "accuracy": sk.accuracy_score,
  "macro_f1": _macro_f1,
  "f1": lambda labels, predicted: sk.f1_score(labels, predicted, zero_division=0),
  "matthews": sk.matthews_corrcoef,
  "pearson": _correlation(stats.pearsonr),
  "spearman": _correlation(stats.spearmanr),
}


def compute(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """The metrics `names` of logits `[N, K]` against labels `[N]`; K = 1 is a regression."""
  predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
  return {name: float(METRICS[name](labels, predicted)) for name in names}
