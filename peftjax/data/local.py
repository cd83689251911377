"""The user's own CSV, TSV and JSONL files as a corpus."""

import math
from typing import Any

import numpy as np

from peftjax.data import tables
from peftjax.data.examples import CLASSIFICATION_METRICS, REGRESSION_METRICS, Corpus, Examples


def read(
  files: dict[str, str],
  text_column: str,
  pair_column: str | None,
  label_column: str | None,
  regression: bool,
) -> Corpus:
  """The corpus in `files` (split -> path, with "train" among them), with those splits alone.

  Without a `label_column` every label is 0 and there are no classes.

  The classes are the labels of the train file, in numerical order if all are integers, else in
  alphabetical order. With `regression` labels are finite numbers.

  Raises:
    ValueError: for what `tables.read` raises, a single class, a label that the train file does not
      have, or a regression target that is no number: with file and line.
  """
  rows = {
    split: tables.read(path, text_column, pair_column, label_column)
    for split, path in files.items()
  }
  bare = label_column is None
  names = () if regression or bare else _class_names(files["train"], rows["train"])
  splits = {}
  for split, path in files.items():
    if bare:
      labels: list[float] = [0.0] * len(rows[split])
    elif regression:
      labels = [_number(path, row) for row in rows[split]]
    else:
      labels = [_class(path, row, names, files["train"]) for row in rows[split]]
    splits[split] = Examples(
      [row.text for row in rows[split]],
      None if pair_column is None else [row.pair or "" for row in rows[split]],
      np.asarray(labels, np.float32 if regression or bare else np.int32),
    )
  metrics = REGRESSION_METRICS if regression or bare else CLASSIFICATION_METRICS
  return Corpus("files", names, metrics, splits, {})


def _name(label: Any) -> str:
  """A class's name: its label without outer spaces."""
  return str(label).strip()


def _class_names(path: str, rows: list[tables.Row]) -> tuple[str, ...]:
  """The sorted classes of the train file."""
  names = {_name(row.label) for row in rows}
  if len(names) < 2:
    raise ValueError(
      f"{path}: the only class is {names.pop()!r}. Classification needs at least two; is this the"
      " right label_column?"
    )
  try:
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  except ValueError:
    return tuple(sorted(names))


def _class(path: str, row: tables.Row, names: tuple[str, ...], train_path: str) -> int:
  """The index of a row's class."""
  try:
    return names.index(_name(row.label))
  except ValueError:
    raise ValueError(
      f"{path} line {row.line}: the label {_name(row.label)!r} is not in {train_path}, which has:"
      f" {', '.join(map(repr, names[:20]))}{', ...' if len(names) > 20 else ''}."
      " Correct the label or delete the row."
    ) from None


def _number(path: str, row: tables.Row) -> float:
  """A row's regression target."""
  try:
    number = float(row.label)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(
      f"{path} line {row.line}: the label {row.label!r} is not a finite number. Write a number, or"
      " drop regression=True for classes."
    )
  return number
