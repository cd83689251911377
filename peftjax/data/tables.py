"""Rows of a CSV, TSV or JSONL file, with errors that name the file and the line."""

import contextlib
import csv
import io
import math
import pathlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from peftjax.io import records

KINDS = (".csv", ".tsv", ".jsonl")

_EXAMPLE = 'Write one object per line, such as {"text": "...", "label": "..."}.'
_LIMIT = threading.Lock()  # guards the csv module's limit, which all of a process share
_Fields = tuple[int, dict[str, Any]]


class Row(NamedTuple):
  """One row of a file: its line number (from 1), its text or texts, and its label as written."""

  line: int
  text: str
  pair: str | None
  label: Any


def read(
  path: str, text_column: str, pair_column: str | None, label_column: str | None
) -> list[Row]:
  """The rows of a UTF-8 file whose name ends in .csv, .tsv or .jsonl, in the file's order.

  CSV and TSV begin with a line of column names. CSV fields may be quoted; in TSV a quote is an
  ordinary character, so that a stray one cannot swallow the rows after it. JSONL holds one object
  per line. Empty lines are skipped; texts may be empty (JSON null too), labels may not. Labels are
  texts or, in JSONL, finite numbers, true and false too. Without a `label_column` they are None.

  Raises:
    ValueError: naming the file and the line, column or byte, if the file is missing, empty, of
      another kind, not UTF-8, malformed, ambiguous (a column or key twice), or without one of
      the columns.
  """
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in KINDS:
    raise ValueError(
      f"{path}: cannot read a {suffix or 'nameless'} file. Allowed: {', '.join(KINDS)}."
    )
  wanted = [x for x in (text_column, pair_column, label_column) if x is not None]
  rows: list[Row] = []
  for line, fields in _json_lines(path) if suffix == ".jsonl" else _delimited(path, wanted):
    for column in wanted:
      if column not in fields:
        raise ValueError(
          f"{path} line {line}: no column {column!r}. The file has: {_names(fields)}."
          " Name one of these as text_column, pair_column or label_column."
        )
    text = _text(path, line, text_column, fields)
    pair = None if pair_column is None else _text(path, line, pair_column, fields)
    label = None if label_column is None else _label(path, line, label_column, fields)
    rows.append(Row(line, text, pair, label))
  if not rows:
    raise ValueError(f"{path}: the file holds no examples. Write at least one row.")
  return rows


def decode(path: str) -> str:
  """The contents of a regular UTF-8 file, without a byte-order mark.

  Raises:
    ValueError: naming the line of a byte that is not UTF-8, or is zero as in UTF-16.
  """
  try:
    data = records.regular(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}). Name an existing file.") from None
  bad = data.find(b"\0")
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    bad = error.start if bad < 0 else min(bad, error.start)
  if bad >= 0:
    line = data.count(b"\n", 0, bad) + 1
    raise ValueError(
      f"{path} line {line}: byte 0x{data[bad]:02x} (at offset {bad}) is not"
      " UTF-8 text. Convert the file, naming its real encoding, often WINDOWS-1252 or UTF-16:\n"
      f"  iconv -f WINDOWS-1252 -t UTF-8 {path} > converted{pathlib.Path(path).suffix}"
    )
  return text.removeprefix("\ufeff")


def number(label: Any) -> float | None:
  """A label as a number that is finite in float32; None if it is not one."""
  try:
    value = float(label) if isinstance(label, str | int | float) else math.nan
  except (ValueError, OverflowError):
    return None
  finite = abs(value) <= float(np.finfo(np.float32).max) and not isinstance(label, bool)
  return value if finite else None


def check_columns(path: str, columns: Sequence[str], wanted: Collection[str] = ()) -> None:
  """Raises ValueError if a name comes twice, stripped; only those `wanted` may not be empty."""
  names = [name.strip() for name in columns]
  for name, count in Counter(names).items():
    if count > 1 and (name or name in wanted):
      places = [str(i) for i, other in enumerate(names, 1) if other == name]
      raise ValueError(
        f"{path}: the first line names the column {records.clip(name)} {count} times, as columns"
        f" {records.clip(', '.join(places), quote=False)}. Give each a name of its own."
      )


def _names(fields: Collection[str]) -> str:
  return records.clip(", ".join(map(repr, fields)), 1000, quote=False)


@contextlib.contextmanager
def _fields_of(length: int) -> Iterator[None]:
  """A context that reads fields of up to `length` characters; the csv limit is 131,072."""
  with _LIMIT:
    before = csv.field_size_limit(max(length, 1))
    try:
      yield
    finally:
      csv.field_size_limit(before)


def _delimited(path: str, wanted: Collection[str]) -> list[_Fields]:
  """Line number and fields of every row of a CSV or TSV file."""
  tabs = path.lower().endswith(".tsv")
  options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
  text = decode(path)
  reader = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
  columns = None
  rows: list[_Fields] = []
  end = 0  # of the previous row: a quoted field may span lines, and a row is named by its first
  try:
    with _fields_of(len(text)):
      for fields in reader:
        line, end = end + 1, reader.line_num
        if not fields:
          continue
        if columns is None:
          columns = fields
          check_columns(path, columns, wanted)
        elif len(fields) != len(columns):
          advice = "Replace tabs inside a field." if tabs else "Quote a field that holds a comma."
          raise ValueError(
            f"{path} line {line}: {len(fields)} fields, but the first line names {len(columns)}"
            f" columns: {_names(columns)}. {advice}"
          )
        else:
          rows.append((line, dict(zip(columns, fields, strict=True))))
  except csv.Error as error:
    raise ValueError(
      f"{path} line {end + 1}: malformed row ({error}). Allowed: fields without quotes, or in"
      ' double quotes with "" for each quote inside. Or write the examples as .jsonl.'
    ) from None
  return rows


def _json_lines(path: str) -> Iterator[_Fields]:
  """Line number and fields of every row of a JSONL file."""
  # Not splitlines(): JSON strings may hold U+2028 and other characters that it would split at.
  for line, source in enumerate(decode(path).split("\n"), 1):
    if source.strip():
      where = f"{path} line {line}"
      yield line, records.parse_object(source, where, _EXAMPLE, constants=False)


def _text(path: str, line: int, column: str, fields: dict[str, Any]) -> str:
  """The text in a column; ValueError if JSON gave anything but a string of real characters."""
  text = fields[column]
  if text is None:
    return ""
  if not isinstance(text, str):
    raise ValueError(
      f"{path} line {line}: {column!r} is {records.clip(text)}. Write a text in double quotes."
    )
  return _whole(path, line, column, text)


def _whole(path: str, line: int, column: str, text: str) -> str:
  """`text`, if it can be written as UTF-8."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{path} line {line}: {column!r} holds half a surrogate pair ({text[error.start]!a}), which"
      " is not a character. Write the whole pair, or the character itself."
    ) from None
  return text


def _label(path: str, line: int, column: str, fields: dict[str, Any]) -> Any:
  """The label in a column; ValueError unless it is a text, a finite number or a truth value."""
  label = fields[column]
  if label is None or (isinstance(label, str) and not label.strip()):
    raise ValueError(
      f"{path} line {line}: the label {column!r} is empty. Write one or delete the row."
    )
  if isinstance(label, str):
    return _whole(path, line, column, label)
  if not isinstance(label, int | float) or (isinstance(label, float) and not math.isfinite(label)):
    raise ValueError(
      f"{path} line {line}: the label {column!r} is {records.clip(label)}. Write a text, a finite"
      " number, true or false."
    )
  return label
