"""Labels texts with a trained adapter.

  python -m experiments.predict --workdir=DIR --text="Shares rose after the earnings report"
  python -m experiments.predict --workdir=DIR --file=texts.txt --output=labels.jsonl
  python -m experiments.predict --workdir=DIR --text="It rains." --pair="The street is wet."

A .csv, .tsv or .jsonl file has the columns that the run was trained on, its labels aside; any other
file has one text per line. Prints one line per text: the label, its probability and the text (for
a regression, the value); for pairs, both texts. For a run of configs/tag.py it prints one word and
its tag per line, and an empty line after each text.
"""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import app, flags

from experiments import runtime

if TYPE_CHECKING:
  from peftjax.training.predict import Predictor

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a run of experiments.train, here or in a bucket.", required=True
)
TEXT = flags.DEFINE_multi_string("text", [], "A text; may be given several times.")
PAIR = flags.DEFINE_multi_string("pair", [], "The second text of each --text, for a run on pairs.")
FILE = flags.DEFINE_string("file", None, "A UTF-8 file: .csv, .tsv, .jsonl, or one text per line.")
FACTORY = flags.DEFINE_string(
  "factory", None, "The --config.model.factory of the run, once more: its code is run."
)
OUTPUT = flags.DEFINE_string(
  "output", None, "Also write JSON lines with every class's probability."
)


class Texts(NamedTuple):
  """Texts or, with `pairs`, pairs of them."""

  texts: list[str]
  pairs: list[str] | None


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  check_given(TEXT.value, PAIR.value, FILE.value, OUTPUT.value)
  runtime.set_up("~/.cache/peftjax")
  from peftjax.training.logs import write_atomic
  from peftjax.training.predict import Predictor, probabilities

  predictor = Predictor(WORKDIR.value, FACTORY.value)
  given = read(predictor, TEXT.value, PAIR.value, FILE.value)
  rows: list[dict[str, Any]] = []
  if predictor.settings.task == "tag":
    for text, tags in zip(given.texts, predictor.tags(given.texts), strict=True):
      rows.append({"words": text.split(), "tags": tags})
      print("\n".join(map("\t".join, zip(text.split(), tags, strict=True))), end="\n\n")
  for i, logits in enumerate(() if rows else predictor.logits(*given)):
    row = {"text": given.texts[i]} | ({} if given.pairs is None else {"pair": given.pairs[i]})
    shown = "\t".join(re.sub(r"[\t\r\n]", " ", text) for text in row.values())  # one line per text
    if not predictor.labels:
      rows.append({**row, "value": float(logits[0])})
      print(f"{logits[0]:.4f}\t{shown}")
      continue
    p = probabilities(logits)
    label = predictor.labels[int(p.argmax())]
    named = dict(zip(predictor.labels, map(float, p), strict=True))
    rows.append({**row, "label": label, "probabilities": named})
    print(f"{label}\t{p.max():.3f}\t{shown}")
  if OUTPUT.value:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(Path(OUTPUT.value), "".join(lines))


def check_given(texts: list[str], pairs: list[str], path: str | None, output: str | None) -> None:
  """Checks that do not need the run.

  Raises:
    ValueError: there is no text, a pair is not whole, or the output cannot be written.
  """
  from peftjax.data import tables

  if not texts and not path:
    raise ValueError('no text; write --text="..." or --file=FILE with one text per line')
  if pairs and len(pairs) != len(texts):
    raise ValueError(f"{len(texts)} --text and {len(pairs)} --pair; give a --pair for each --text")
  if path and Path(path).suffix.lower() not in tables.KINDS and not lines_of(path)[0]:
    raise ValueError(f"no text in {path}; write one per line")
  runtime.check_output("--output", output)
  if output and path and Path(output).exists() and Path(output).samefile(path):
    raise ValueError(f"--output={output} is the file to be read; name another")


def read(predictor: "Predictor", texts: list[str], pairs: list[str], path: str | None) -> Texts:
  """The texts of the flags and of the file, in the run's form: alone or in pairs.

  Raises:
    ValueError: they are of the other kind, or the file does not have the run's columns.
  """
  from peftjax.data import tables

  columns = predictor.columns
  wanted = " and ".join(map(repr, columns))
  both = len(columns) == 2
  table = path is not None and Path(path).suffix.lower() in tables.KINDS
  if both and ((texts and not pairs) or (path and not table)):
    raise ValueError(
      "the run was trained on pairs of texts. Write --text=FIRST --pair=SECOND, or --file=FILE with"
      f" a .csv, .tsv or .jsonl file of the columns {wanted}"
    )
  if pairs and not both:
    raise ValueError("the run was trained on single texts; leave --pair out")
  found, seconds = list(texts), list(pairs)
  if table:
    rows = tables.read(str(path), columns[0], columns[1] if both else None, None)
    found += [row.text for row in rows]
    seconds += [row.pair or "" for row in rows]
  elif path:
    lines, blank = lines_of(path)
    found += lines
    if blank:
      print(f"{blank} empty lines of {path} are left out", file=sys.stderr)
  return Texts(found, seconds if both else None)


def lines_of(path: str) -> tuple[list[str], int]:
  """The lines of a text file that are not empty, without outer spaces; and how many are empty."""
  from peftjax.data import tables

  *lines, last = re.split(r"\r\n|\n|\r", tables.decode(path))
  lines += [last] if last else []
  texts = [line.strip() for line in lines if line.strip()]
  return texts, len(lines) - len(texts)


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
