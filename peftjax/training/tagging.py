"""Words to tags, such as names of persons and places."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import data, losses
from peftjax.data import conll
from peftjax.data.conll import NO_LABEL, Sentence
from peftjax.data.examples import subset
from peftjax.models import configuration
from peftjax.training import evaluate
from peftjax.training.classification import CLASSES, Classification
from peftjax.training.settings import Settings
from peftjax.training.task import Batch, Kind


def _cross_entropy(logits_BTK: jax.Array, batch: Batch) -> losses.Sums:
  """Over the first token of each word: no other has a label."""
  labels_BT = batch["labels"]
  weights_BT = (labels_BT != NO_LABEL) * batch["weights"][:, None]
  return losses.classification_sums(logits_BTK, jnp.maximum(labels_BT, 0), weights_BT)


LABELS_OF = "token"
KIND = CLASSES._replace(loss=_cross_entropy)
inputs = KIND.inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Tagging(Classification):
  """`Classification` of words; an example is a sentence, and `corpus` has labels of its tokens.

  Attributes:
    sentences: by part.
    firsts: by part, of each sentence where its words begin; see `conll.encode`.
  """

  sentences: dict[str, list[Sentence]]
  firsts: dict[str, list[np.ndarray]]

  peft_type = "TOKEN_CLS"

  @property
  def kind(self) -> Kind:
    return KIND

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    """Scores of whole entities, by seqeval; a word that was cut off counts as tagged "O"."""
    tokens = self.tokens[part]
    logits = evaluate.rows_of(predict, tokens, self.buckets, batch_size, self.pad_id)
    if not all(np.isfinite(row).all() for row in logits):
      return None
    found = tags_of(logits, self.firsts[part], self.corpus.label_names)
    return scores([list(sentence.tags) for sentence in self.sentences[part]], found)

  def describe(self) -> str:
    cut = sum(int((first < 0).sum()) for part in self.firsts.values() for first in part)
    told = f"; {cut:,} words are beyond max_length, and count as tagged O" if cut else ""
    return super().describe() + told


def tags_of(
  logits: Sequence[np.ndarray], firsts: Sequence[np.ndarray], names: Sequence[str]
) -> list[list[str]]:
  """The likeliest tag of each word by the logits `[T, K]` of its sentence, "O" if it has none."""
  return [
    [names[rows[place].argmax()] if place >= 0 else "O" for place in first]
    for rows, first in zip(logits, firsts, strict=True)
  ]


def scores(gold: list[list[str]], found: list[list[str]]) -> dict[str, float]:
  """F1, precision and recall of entities, as conlleval counts them, and accuracy of words.

  Raises:
    ValueError: seqeval is not installed.
  """
  s = seqeval()
  if not any(tag != "O" for tags in (*gold, *found) for tag in tags):
    return dict(f1=0.0, precision=0.0, recall=0.0, accuracy=1.0)
  options = dict(zero_division=0)
  return {
    "f1": float(s.f1_score(gold, found, **options)),
    "precision": float(s.precision_score(gold, found, **options)),
    "recall": float(s.recall_score(gold, found, **options)),
    "accuracy": float(s.accuracy_score(gold, found)),
  }


def seqeval() -> Any:
  """Its metrics.

  Raises:
    ValueError: it is not installed.
  """
  try:
    return importlib.import_module("seqeval.metrics")
  except ImportError:
    raise ValueError("task=tag is scored by seqeval: pip install 'peftjax[scores]'") from None


def load(settings: Settings) -> Tagging:
  """Reads and tokenises the sentences; the tags are those of the train file.

  Raises:
    ValueError: a file is missing or malformed, another part has a tag that train has not, or
      seqeval is not installed.
  """
  seqeval()  # before anything is read or trained
  wanted = settings.data
  sentences = {part: conll.read(path) for part, path in wanted.paths().items()}
  names = conll.names(sentences["train"])
  tokenizer = data.load_tokenizer(str(settings.model.path()))
  tokens, firsts, splits = {}, {}, {}
  for part, every in sentences.items():
    if strange := [name for name in conll.names(every) if name not in names]:
      raise ValueError(
        f"{wanted.paths()[part]} has the tag {strange[0]}, and {wanted.train_file} does not. "
        "Correct it there, or train on sentences that have it."
      )
    chosen = subset(len(every), wanted.size(part), settings.seed)
    sentences[part] = every = [every[i] for i in chosen]
    words = [sentence.words for sentence in every]
    tokens[part], firsts[part] = conll.encode(tokenizer, words, wanted.max_length)
    tags = [np.array([names.index(tag) for tag in one.tags]) for one in every]
    labels = conll.labels_of(firsts[part], tags, wanted.max_length)
    splits[part] = data.Examples([" ".join(one) for one in words], None, labels)
  corpus = data.Corpus("conll", names, ("f1",), splits, {})
  lengths = np.concatenate([t.lengths for t in tokens.values()])
  buckets = data.buckets(lengths, max_length=wanted.max_length)
  pad_id = configuration.pad_id(settings.model.path())
  return Tagging(corpus, tokens, buckets, pad_id, sentences, firsts)
