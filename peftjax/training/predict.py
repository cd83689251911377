"""A finished run as a function from texts to labels."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from peftjax import data
from peftjax.core import tree
from peftjax.models import limits, pretrained
from peftjax.training import build, evaluate, step
from peftjax.training.checkpoint import Checkpoints, digest
from peftjax.training.classification import CLASSES
from peftjax.training.settings import from_config


class Predictor:
  """The best checkpoint of `workdir`, ready to label texts.

  Attributes:
    labels: names of the classes; empty for a regression.
    params: of the model, with the trained adapter.

  Raises:
    ValueError: if `workdir` holds no trained run, or the pretrained model is another one now.
  """

  def __init__(self, workdir: str | Path):
    workdir = build.resolve(workdir)
    untrained = ValueError(
      f"{workdir} holds no evaluated run; train first:\n  python -m experiments.train "
      f"--config=configs/classify.py --workdir={workdir}"
    )
    if not (workdir / "checkpoints" / "best").is_dir():
      raise untrained
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    self.settings = from_config(config)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
      meta = checkpoints.meta("best")
      if meta is None:
        raise untrained
      if meta["base"] != digest(self.settings.model.path()):
        raise ValueError(f"{self.settings.model.path()} is not the model {workdir} was trained on")
      self.labels: list[str] = meta["labels"]
      model = build.adapted(self.settings, len(self.labels) or 1)
      keep = tree.adapter_mask(model.params, model.mask)
      adapter, base = tree.partition(model.params, keep)
      adapter = checkpoints.arrays("best", {"adapter": adapter})["adapter"]
    finally:
      checkpoints.close()
    # An adapter from a checkpoint wins over what `attach` has just drawn.
    self.params = tree.combine(adapter, base)
    self._config = model.module.config
    self._predict = jax.jit(functools.partial(step.outputs, model.module, CLASSES))
    self._tokenizer = data.load_tokenizer(str(self.settings.model.path()))
    self._pad_id = pretrained.pad_id(self.settings.model.path())

  def logits(
    self, texts: Sequence[str], pairs: Sequence[str] | None = None, params: Any = None
  ) -> np.ndarray:
    """`[N, K]` float32, in the order of `texts`; with other parameters of this model, if given."""
    params = self.params if params is None else params
    length = self.settings.data.max_length
    examples = data.Examples(
      list(texts), None if pairs is None else list(pairs), np.zeros(len(texts), np.int32)
    )
    tokens = data.encode(self._tokenizer, examples, length)
    limits.check(self._config, tokens.ids, tokens.types)
    buckets = data.buckets(tokens.lengths, max_length=length)
    size = min(self.settings.train.eval_batch_size, len(texts))
    predict = lambda batch: self._predict(params, batch)
    return evaluate.logits_of(predict, tokens, buckets, size, self._pad_id)


def probabilities(logits: np.ndarray) -> np.ndarray:
  """softmax over the last axis."""
  return np.asarray(jax.nn.softmax(logits, axis=-1))
