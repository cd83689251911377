"""Questions about a passage to the span of it that answers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import data, losses
from peftjax.data import squad
from peftjax.data.examples import subset
from peftjax.data.squad import END, START, Question, Windows
from peftjax.models import configuration
from peftjax.training import evaluate
from peftjax.training.classification import CLASSES, Classification
from peftjax.training.settings import Settings
from peftjax.training.task import Batch, Kind


def _cross_entropy(logits_BT2: jax.Array, batch: Batch) -> losses.Sums:
  """The mean of that of the start and that of the end, each over the tokens of a window."""
  total: Any = 0.0
  for i, bit in enumerate((START, END)):
    logits_BT = jnp.where(batch["mask"], logits_BT2[..., i].astype(jnp.float32), -1e9)
    place_B = (batch["labels"] & bit > 0).argmax(1)
    each_B = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BT, place_B)
    total = total + (each_B * batch["weights"]).sum() / 2
  return total, batch["weights"].sum()


LABELS_OF = "span"
KIND = CLASSES._replace(loss=_cross_entropy)
inputs = KIND.inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Answering(Classification):
  """`Classification` of tokens as starts and ends; an example is a window.

  Attributes:
    questions: by part.
    windows: by part.
    max_answer, no_answer_threshold: see `squad.answers_of`.
  """

  questions: dict[str, list[Question]]
  windows: dict[str, Windows]
  max_answer: int
  no_answer_threshold: float | None

  peft_type = "QUESTION_ANS"

  @property
  def kind(self) -> Kind:
    return KIND

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    made, questions = self.windows[part], self.questions[part]
    logits = evaluate.rows_of(predict, made.tokens, self.buckets, batch_size, self.pad_id)
    if not all(np.isfinite(row).all() for row in logits):
      return None
    found = squad.answers_of(
      made,
      logits,
      questions,
      max_answer=self.max_answer,
      no_answer_threshold=self.no_answer_threshold,
    )
    return squad.scores(questions, found)

  def describe(self) -> str:
    sizes = ", ".join(f"{len(q):,} {part}" for part, q in self.questions.items())
    return f"{super().describe()}; windows of questions: {sizes}"

  def summary(self) -> dict[str, Any]:
    return {
      **super().summary(),
      "questions": {part: len(every) for part, every in self.questions.items()},
    }


def load(settings: Settings) -> Answering:
  """Reads the questions and cuts their passages into windows.

  Where the train file has a question without an answer, "" is an answer, as in SQuAD v2.0.
  """
  wanted = settings.data
  questions = {}
  for part, path in wanted.paths().items():
    every = squad.read(path)
    questions[part] = [every[i] for i in subset(len(every), wanted.size(part), settings.seed)]
  tokenizer = data.load_tokenizer(str(settings.model.path()))
  made = {
    part: squad.windows(tokenizer, every, wanted.max_length, wanted.stride)
    for part, every in questions.items()
  }
  splits = {}
  for part, windows in made.items():
    labels = squad.labels_of(windows, questions[part], wanted.max_length)
    splits[part] = data.Examples([questions[part][i].text for i in windows.question], None, labels)
  corpus = data.Corpus("squad", ("start", "end"), ("f1",), splits, {})
  tokens = {part: windows.tokens for part, windows in made.items()}
  lengths = np.concatenate([t.lengths for t in tokens.values()])
  buckets = data.buckets(lengths, max_length=wanted.max_length)
  pad_id = configuration.pad_id(settings.model.path())
  some_have_none = any(not question.answers for question in questions["train"])
  threshold = wanted.no_answer_threshold if some_have_none else None
  return Answering(corpus, tokens, buckets, pad_id, questions, made, wanted.max_answer, threshold)
