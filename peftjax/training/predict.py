"""A finished run as a function from texts to labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from peftjax import data
from peftjax.core.params import Params
from peftjax.data.corpora import text_columns
from peftjax.models import limits, pretrained
from peftjax.training import evaluate, finished, step
from peftjax.training.classification import CLASSES


class Predictor:
  """The best checkpoint of `workdir`, ready to label texts.

  Attributes:
    labels: names of the classes; empty for a regression.
    columns: names of the text column or, of a run on pairs of texts, of both.
    model, params: with the trained adapter.

  Raises:
    ValueError: see `finished.load`.
  """

  def __init__(self, workdir: str | Path):
    run = finished.load(workdir, "classify")
    self.settings, self.labels = run.settings, run.labels
    self.model, self.params = run.model, run.params
    wanted = self.settings.data
    self.columns = text_columns(wanted.name, wanted.text_column, wanted.pair_column)
    self._predict = jax.jit(functools.partial(step.outputs, run.model, CLASSES))
    self._tokenizer = data.load_tokenizer(str(run.base))
    self._pad_id = pretrained.pad_id(run.base)

  def logits(
    self, texts: Sequence[str], pairs: Sequence[str] | None = None, params: Params = None
  ) -> np.ndarray:
    """`[N, K]` float32, in the order of `texts`; with other parameters of this model, if given.

    Raises:
      ValueError: single texts for a run on pairs, or pairs for one on single texts.
    """
    params = self.params if params is None else params
    if (pairs is None) != (len(self.columns) == 1):
      trained, given = ("single texts", "pairs") if pairs is not None else ("pairs", "single texts")
      raise ValueError(f"the run was trained on {trained} and cannot label {given}")
    length = self.settings.data.max_length
    examples = data.Examples(
      list(texts), None if pairs is None else list(pairs), np.zeros(len(texts), np.int32)
    )
    tokens = data.encode(self._tokenizer, examples, length)
    limits.check(self.model.config, tokens.ids, tokens.types)
    buckets = data.buckets(tokens.lengths, max_length=length)
    size = min(self.settings.train.eval_batch_size, len(texts))
    predict = lambda batch: self._predict(params, batch)
    return evaluate.logits_of(predict, tokens, buckets, size, self._pad_id)


def probabilities(logits: np.ndarray) -> np.ndarray:
  """softmax over the last axis."""
  return np.asarray(jax.nn.softmax(logits, axis=-1))
