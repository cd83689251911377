"""Labelled texts, and the corpus they belong to."""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """N labelled texts, or N labelled pairs of texts.

  Attributes:
    texts: the N texts.
    pairs: the N second texts of a sentence-pair task, or None.
    labels: int32 [N] class indices, or float32 [N] regression targets.
  """

  texts: list[str]
  pairs: list[str] | None
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.texts)

  def take(self, rows: np.ndarray) -> "Examples":
    """The examples at `rows` (int [M]), in that order."""
    rows = np.asarray(rows, np.int64)
    return Examples(
      [self.texts[row] for row in rows],
      None if self.pairs is None else [self.pairs[row] for row in rows],
      self.labels[rows],
    )

  def sample(self, size: int, seed: int) -> "Examples":
    """At most `size` of the examples, drawn without replacement, in their old order."""
    return self.take(subset(len(self), size, seed))

  def keys(self) -> list[tuple[str, ...]]:
    """Keys by which two examples are duplicates: the texts, each run of whitespace as one space."""
    columns = [self.texts] if self.pairs is None else [self.texts, self.pairs]
    return [tuple(" ".join(text.split()) for text in row) for row in zip(*columns, strict=True)]


def subset(count: int, size: int | None, seed: int) -> np.ndarray:
  """At most `size` of 0 to `count` - 1, drawn without replacement, ascending; all for None."""
  if size is not None and size < 1:
    raise ValueError(f"a subset of {size} examples is empty; write a number from 1 on, or null")
  return np.sort(np.random.default_rng(seed).permutation(count)[:size])


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """A task: its texts in splits, the meaning of its labels, and its metrics.

  Attributes:
    name: the name it was loaded by.
    label_names: class names by class index; empty for regression.
    metrics: names of the task's metrics, the one to select models by first.
    splits: "train", "validation" and "test", and those of `further`.
    dropped: how many examples were left out, by reason.
    further: parts that are scored besides, with their metrics.
  """

  name: str
  label_names: tuple[str, ...]
  metrics: tuple[str, ...]
  splits: dict[str, Examples]
  dropped: dict[str, int]
  further: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


CLASSIFICATION_METRICS = ("accuracy", "macro_f1")
REGRESSION_METRICS = ("pearson", "spearman")
