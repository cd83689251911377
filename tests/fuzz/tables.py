"""CSV, TSV and JSONL files of texts, against Python's own readers."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

from peftjax.data import tables
from tests.fuzz import damage
from tests.fuzz.tensors import unique

ROWS = [
  ("a text", "sport"),
  ('with "quotes", commas', "tech"),
  ("two\nlines", "sport"),
  ("é 🙂", "x"),
]


class Table:
  share = 6

  def __init__(self, suffix: str):
    self.name = suffix

  def prepare(self, folder: Path) -> None:
    path = folder / f"rows.{self.name}"
    if self.name == "jsonl":
      rows = [json.dumps({"text": t, "label": x}, ensure_ascii=False) for t, x in ROWS]
      path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    elif self.name == "csv":
      with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    else:
      rows = [f"{t}\t{x}" for t, x in [("text", "label"), *ROWS] if "\n" not in t]
      path.write_text("\n".join(rows) + "\n", encoding="utf-8")

  def damage(self, rng: random.Random, folder: Path) -> None:
    path = folder / f"rows.{self.name}"
    data = path.read_bytes()
    if self.name == "jsonl" and rng.random() < 0.7:
      lines = data.split(b"\n")
      at = rng.randrange(len(lines) - 1)
      lines[at] = damage.dumps(rng, damage.of_json(rng, json.loads(lines[at])))
      path.write_bytes(b"\n".join(lines))
    elif rng.random() < 0.3:
      extra = rng.choice(
        (b"label", b"text", b",label", b'"', b"\x00", b"\xef\xbb\xbf", b"\r", b",,")
      )
      at = rng.randrange(len(data))
      path.write_bytes(data[:at] + extra * rng.choice((1, 2, 70_000)) + data[at:])
    else:
      path.write_bytes(damage.of_bytes(rng, data))

  def read(self, folder: Path) -> Any:
    rows = tables.read(str(folder / f"rows.{self.name}"), "text", None, "label")
    return [(row.text, row.label) for row in rows]

  def check(self, folder: Path, got: Any) -> str:
    try:
      want = list(self._parse((folder / f"rows.{self.name}").read_bytes()))
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
      return f"accepted, but {error!r}"
    return "" if got == want else f"rows {str(got)[:200]} instead of {str(want)[:200]}"

  def _parse(self, data: bytes) -> Any:
    text = data.decode("utf-8").removeprefix("\ufeff")
    if self.name == "jsonl":
      for line in text.split("\n"):
        if line.strip():
          row = json.loads(line, object_pairs_hook=unique, parse_constant=_refuse)
          if not isinstance(row["label"], str | int | float):
            raise ValueError("a label that is no scalar")
          yield row["text"] or "", row["label"]
      return
    quoting = csv.QUOTE_NONE if self.name == "tsv" else csv.QUOTE_MINIMAL
    delimiter = "\t" if self.name == "tsv" else ","
    csv.field_size_limit(2**30)
    reader = csv.reader(
      io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    rows = [row for row in reader if row]
    columns = rows[0]
    if len(set(columns)) != len(columns):
      raise ValueError("a column twice")
    for row in rows[1:]:
      if len(row) != len(columns):
        raise ValueError("ragged")
      fields = dict(zip(columns, row, strict=True))
      yield fields["text"], fields["label"]


def _refuse(name: str) -> Any:
  raise ValueError(name)
