"""The user's own CSV, TSV and JSONL files as a corpus."""

import math
from typing import Any

import numpy as np

from peftjax.data import tables
from peftjax.data.examples import CLASSIFICATION_METRICS, REGRESSION_METRICS, Corpus, Examples
from peftjax.io import records


def read(
  files: dict[str, str],
  text_column: str,
  pair_column: str | None,
  label_column: str | None,
  regression: bool,
) -> Corpus:
  """The corpus in `files` (a path per split, "train" among them), with those splits alone.

  Without a `label_column` every label is 0 and there are no classes.

  The classes are the labels of the train file, in numerical order if all are integers, else in
  alphabetical order. With `regression` labels are numbers that float32 holds.

  Raises:
    ValueError: for anything `tables.read` refuses, a single class, ambiguous classes ("1" and
      1, "1" and "1.0", "nan" among numbers), a label that the train file does not have, or a
      regression target that is not a number: with file and line.
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
  """A class's name: its label without outer spaces; 1.0, which JSON has for 1, is "1"."""
  whole = isinstance(label, float) and label.is_integer() and abs(label) < 2**53
  return str(int(label) if whole else label).strip()


def _class_names(path: str, rows: list[tables.Row]) -> tuple[str, ...]:
  """The sorted classes of the train file."""
  names = {_name(row.label) for row in rows}
  if len(names) < 2:
    raise ValueError(
      f"{path}: the only class is {records.clip(names.pop())}. Classification needs at least two;"
      " is this the right label_column?"
    )
  _check_types(path, rows)
  _check_numbers(path, rows, names)
  try:
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  except ValueError:
    return tuple(sorted(names))


def _check_types(path: str, rows: list[tables.Row]) -> None:
  """Raises ValueError if one class is written as a text and as a number or truth value."""
  first: dict[str, tables.Row] = {}
  for row in rows:
    other = first.setdefault(_name(row.label), row)
    if isinstance(other.label, str) != isinstance(row.label, str):
      raise ValueError(
        f"{path} line {row.line}: the label is {records.clip(row.label)}, but on line {other.line}"
        f" it is {records.clip(other.label)}. Write all labels as texts, or none."
      )


def _check_numbers(path: str, rows: list[tables.Row], names: set[str]) -> None:
  """Raises ValueError if classes are numbers, and two of them are equal or one is not finite."""
  try:
    values = {name: float(name) for name in names}
  except ValueError:  # words, then
    return
  line = {_name(row.label): row.line for row in reversed(rows)}
  seen: dict[float, str] = {}
  for name in sorted(names, key=line.__getitem__):
    if not math.isfinite(values[name]):
      raise ValueError(
        f"{path} line {line[name]}: the label is {name!r}, while others are numbers. Write the"
        " number, or delete the row."
      )
    same = seen.setdefault(values[name], name)
    if same != name:
      raise ValueError(
        f"{path} line {line[name]}: the label {name!r} is the number {same!r} of line"
        f" {line[same]}, and would be another class. Write all labels in one way."
      )


def _class(path: str, row: tables.Row, names: tuple[str, ...], train_path: str) -> int:
  """The index of a row's class."""
  try:
    return names.index(_name(row.label))
  except ValueError:
    raise ValueError(
      f"{path} line {row.line}: the label {records.clip(_name(row.label))} is not in {train_path},"
      f" which has: {', '.join(map(records.clip, names[:20]))}{', ...' if len(names) > 20 else ''}."
      " Correct the label or delete the row."
    ) from None


def _number(path: str, row: tables.Row) -> float:
  """A row's regression target."""
  number = tables.number(row.label)
  if number is None:
    raise ValueError(
      f"{path} line {row.line}: the label {records.clip(row.label)} is not a finite number of"
      " float32. Write a number, or drop regression=True for classes."
    )
  return number
