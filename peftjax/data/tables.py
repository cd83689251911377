"""Rows of a CSV, TSV or JSONL file, with errors that name the file and the line."""

import csv
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple


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
  ordinary character, so that a stray one cannot swallow the rows after it. JSONL holds one object a
  line. Empty lines are skipped; texts may be empty (JSON null too), labels may not. Without a
  `label_column` labels are None.

  Raises:
    ValueError: naming the file and the line, column or byte, if the file is missing, empty, of
      another kind, not UTF-8, malformed, or without one of the columns.
  """
  readers = {".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines}
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in readers:
    raise ValueError(
      f"{path}: cannot read a {suffix or 'nameless'} file. Allowed: .csv, .tsv, .jsonl."
    )
  rows = []
  for line, fields in readers[suffix](path):
    for column in (text_column, pair_column, label_column):
      if column is not None and column not in fields:
        raise ValueError(
          f"{path} line {line}: no column {column!r}. The file has: {', '.join(map(repr, fields))}."
          " Name one of these as text_column, pair_column or label_column."
        )
    text = _text(path, line, text_column, fields)
    pair = None if pair_column is None else _text(path, line, pair_column, fields)
    label = None if label_column is None else fields[label_column]
    if label_column is not None and (label is None or not str(label).strip()):
      raise ValueError(
        f"{path} line {line}: the label {label_column!r} is empty. Write one or delete the row."
      )
    rows.append(Row(line, text, pair, label))
  if not rows:
    raise ValueError(f"{path}: the file holds no examples. Write at least one row.")
  return rows


def decode(path: str) -> str:
  """The contents of a UTF-8 file, without a byte-order mark; ValueError names a bad byte's line."""
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror}). Name an existing file.") from None
  try:
    return data.decode("utf-8").removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"{path} line {line}: byte 0x{data[error.start]:02x} (at offset {error.start}) is not"
      " UTF-8. Convert the file, naming its real encoding, often WINDOWS-1252 or UTF-16:\n"
      f"  iconv -f WINDOWS-1252 -t UTF-8 {path} > converted{pathlib.Path(path).suffix}"
    ) from None


def _delimited(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Line number and fields of every row of a CSV or TSV file."""
  tabs = path.lower().endswith(".tsv")
  options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
  reader = csv.reader(io.StringIO(decode(path), newline=""), strict=True, **options)
  columns = None
  end = 0  # of the previous row: a quoted field may span lines, and a row is named by its first
  try:
    for fields in reader:
      line, end = end + 1, reader.line_num
      if not fields:
        continue
      if columns is None:
        columns = fields
      elif len(fields) != len(columns):
        advice = "Replace tabs inside a field." if tabs else "Quote a field that holds a comma."
        raise ValueError(
          f"{path} line {line}: {len(fields)} fields, but the first line names {len(columns)}"
          f" columns: {', '.join(map(repr, columns))}. {advice}"
        )
      else:
        yield line, dict(zip(columns, fields, strict=True))
  except csv.Error as error:
    raise ValueError(
      f"{path} line {end + 1}: malformed row ({error}). Allowed: fields without quotes, or in"
      ' double quotes with "" for each quote inside. Or write the examples as .jsonl.'
    ) from None


def _json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Line number and fields of every row of a JSONL file."""
  # Not splitlines(): JSON strings may hold U+2028 and other characters that it would split at.
  for line, source in enumerate(decode(path).split("\n"), 1):
    if not source.strip():
      continue
    try:
      fields = json.loads(source)
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{path} line {line}: not JSON ({error.msg} at column {error.colno}). "
        'Write one object a line, such as {"text": "...", "label": "..."}.'
      ) from None
    if not isinstance(fields, dict):
      raise ValueError(
        f"{path} line {line}: a JSON {type(fields).__name__}, not an object. "
        'Write one object a line, such as {"text": "...", "label": "..."}.'
      )
    yield line, fields


def _text(path: str, line: int, column: str, fields: dict[str, Any]) -> str:
  """The text in a column; ValueError if JSON gave anything but a string of real characters."""
  text = fields[column]
  if text is None:
    return ""
  if not isinstance(text, str):
    raise ValueError(f"{path} line {line}: {column!r} is {text!r}. Write a text in double quotes.")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{path} line {line}: {column!r} holds half a surrogate pair ({text[error.start]!a}), which"
      " is no character. Write the whole pair, or the character itself."
    ) from None
  return text
