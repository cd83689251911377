"""Scores of written texts against references, by sacrebleu and rouge-score."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftjax.data import tables

References = Sequence[Sequence[str]]  # of each text, one or more


def grouped(path: str, source: str, target: str) -> tuple[list[str], list[list[str]]]:
  """The sources of a table, each once, and the targets of each: its references.

  E2E's files have a row for each reference; rows of one source need not be next to each other.

  Raises:
    ValueError: for what `tables.read` raises.
  """
  found: dict[str, list[str]] = {}
  for row in tables.read(path, source, target, None):
    found.setdefault(row.text, []).append(row.pair or "")
  return list(found), list(found.values())


def bleu(texts: Sequence[str], references: References) -> dict[str, float]:
  """BLEU of the corpus, 0 to 100: mteval-v13a's tokens, case kept, all references at once."""
  return {"bleu": _bleu(texts, references, lowercase=False)}


def e2e(texts: Sequence[str], references: References) -> dict[str, float]:
  """BLEU as E2E's scorer has it, without case, and the ROUGE-L that fits best of each text.

  Its NIST, METEOR and CIDEr are not here.
  """
  rouge_l = rouge(texts, references)["rougeL"]
  return {"bleu": _bleu(texts, references, lowercase=True), "rougeL": rouge_l}


def _bleu(texts: Sequence[str], references: References, lowercase: bool) -> float:
  most = max(map(len, references))
  # As many lists as there are references at most; None where a text has fewer.
  turned = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
  metric = _library("sacrebleu.metrics", "sacrebleu").BLEU(lowercase=lowercase)
  return float(metric.corpus_score([*texts], turned).score)


def rouge(texts: Sequence[str], references: References) -> dict[str, float]:
  """F1 of ROUGE-1, 2, L and, with a sentence a line, Lsum, 0 to 100: means over texts.

  Words are stemmed. Of several references the best counts, for each score.
  """
  names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
  scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(names, use_stemmer=True)
  made = [scorer.score_multi([*own], text) for text, own in zip(texts, references, strict=True)]
  return {name: 100 * sum(one[name].fmeasure for one in made) / len(made) for name in names}


METRICS: Mapping[str, Callable[[Sequence[str], References], dict[str, float]]] = {
  "bleu": bleu,
  "rouge": rouge,
  "e2e": e2e,
}


def _library(module: str, package: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError:
    raise ValueError(f"{package} is not installed: pip install 'peftjax[scores]'") from None
