"""A finished run as a function from texts to labels, or to tags of their words."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peftjax import data
from peftjax.core.params import Params
from peftjax.data import conll
from peftjax.data.corpora import text_columns
from peftjax.models import families, limits
from peftjax.training import evaluate, finished, step, tagging
from peftjax.training import factory as factories
from peftjax.training.classification import CLASSES


class Predictor:
  """The best checkpoint of `workdir`, ready to label texts.

  Args:
    workdir: the folder of the run.
    factory: for a run on a model by import path, that path again: its code is run (see
      `training.factory`).

  Attributes:
    labels: names of the classes; empty for a regression.
    columns: names of the text column or, for a run on pairs of texts, of both.
    model, params: with the trained adapter.

  Raises:
    ValueError: see `finished.load`.
  """

  def __init__(self, workdir: str | Path, factory: str | None = None):
    run = finished.load(workdir, "classify", "tag", factory=factory)
    self.settings, self.labels = run.settings, run.labels
    self.model, self.params = run.model, run.params
    wanted = self.settings.data
    self.columns = ["text"]
    if self.settings.task == "classify":
      self.columns = text_columns(wanted.name, wanted.text_column, wanted.pair_column)
    self._predict = jax.jit(functools.partial(step.outputs, run.model, CLASSES))
    self._tokenizer = data.load_tokenizer(str(run.base))
    self._pad_id = factories.pad_id(self.settings.model, self._tokenizer)

  def logits(
    self, texts: Sequence[str], pairs: Sequence[str] | None = None, params: Params = None
  ) -> np.ndarray:
    """Logits `[N, K]` float32, in the order of `texts`; with other parameters, if given.

    Raises:
      ValueError: single texts for a run on pairs, or pairs for one on single texts; a run that
        labels no whole texts.
    """
    self._check_task("classify")
    if (pairs is None) != (len(self.columns) == 1):
      trained, given = ("single texts", "pairs") if pairs is not None else ("pairs", "single texts")
      raise ValueError(f"the run was trained on {trained} and cannot label {given}")
    examples = data.Examples(
      list(texts), None if pairs is None else list(pairs), np.zeros(len(texts), np.int32)
    )
    tokens = data.encode(self._tokenizer, examples, self.settings.data.max_length)
    return np.stack(self._rows(tokens, params))

  def tags(self, texts: Sequence[str]) -> list[list[str]]:
    """The tags of each text's words, as spaces separate them; "O" beyond `max_length`.

    Raises:
      ValueError: the run tags no words.
    """
    self._check_task("tag")
    words = [text.split() for text in texts]
    tokens, firsts = conll.encode(self._tokenizer, words, self.settings.data.max_length)
    return tagging.tags_of(self._rows(tokens, None), firsts, self.labels)

  def _check_task(self, wanted: str) -> None:
    if (task := self.settings.task) != wanted:
      raise ValueError(f"this is a run of task={task}, and task={wanted} is asked for here")

  def _rows(self, tokens: data.Tokens, params: Any) -> list[np.ndarray]:
    """The logits of each text."""
    params = self.params if params is None else params
    if families.ours(self.model):
      limits.check(self.model.config, tokens.ids, tokens.types)
    buckets = data.buckets(tokens.lengths, max_length=self.settings.data.max_length)
    size = min(self.settings.train.eval_batch_size, len(tokens))
    predict = lambda batch: self._predict(params, batch)
    return evaluate.rows_of(predict, tokens, buckets, size, self._pad_id)


def probabilities(logits: np.ndarray) -> np.ndarray:
  """softmax over the last axis."""
  return np.asarray(jax.nn.softmax(logits, axis=-1))
