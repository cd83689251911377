"""Scores written texts against references.

  python -m experiments.generate --workdir=DIR --part=test --output=written.jsonl
  python -m experiments.score --predictions=written.jsonl --references=testset_w_refs.csv \\
    --source=mr --target=ref --metric=e2e

The references are a .csv, .tsv or .jsonl file of a --source and a --target a row; rows of one
source are references of one text. Predictions are a text a line or, of a .jsonl file, under "text",
one for each source in the order of its first row.
metric: bleu, by sacrebleu; rouge, by rouge-score; e2e, BLEU and ROUGE-L as the E2E challenge counts
them. pip install 'peftjax[scores]' has both.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments import runtime

PREDICTIONS = flags.DEFINE_string("predictions", None, "The written texts.", required=True)
REFERENCES = flags.DEFINE_string("references", None, "The table of references.", required=True)
METRIC = flags.DEFINE_enum("metric", "bleu", ("bleu", "rouge", "e2e"), "What to compute.")
SOURCE = flags.DEFINE_string("source", "document", "The column that was written from.")
TARGET = flags.DEFINE_string("target", "summary", "The column of the reference.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  print(json.dumps(score(PREDICTIONS.value, REFERENCES.value), indent=2))


def score(predictions: str, references: str) -> dict[str, float]:
  """The scores of a file.

  Raises:
    ValueError: a file cannot be read, or there is another number of texts than of sources.
  """
  from peftjax.training import text_scores

  texts = read(predictions)
  sources, found = text_scores.grouped(references, SOURCE.value, TARGET.value)
  if len(texts) != len(sources):
    raise ValueError(
      f"{predictions} has {len(texts)} texts, and {references} has {len(sources)} different "
      f"{SOURCE.value!r}: write a text for each, in the order of their first rows"
    )
  return text_scores.METRICS[METRIC.value](texts, found)


def read(path: str) -> list[str]:
  """The texts of a file: "text" of each row of a .jsonl file, or a text a line."""
  from peftjax.data import tables

  if Path(path).suffix.lower() == ".jsonl":
    return [row.text for row in tables.read(path, "text", None, None)]
  return tables.decode(path).removesuffix("\n").split("\n")


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
