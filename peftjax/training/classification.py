"""Texts to classes, or to a number."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import data, losses
from peftjax.models import configuration
from peftjax.training import evaluate, factory, metrics
from peftjax.training.settings import Settings
from peftjax.training.task import Batch, Kind, Stream


def inputs(batch: Batch) -> dict[str, jax.Array]:
  return {name: batch[name] for name in ("tokens", "mask", "types")}


def _logits(logits: jax.Array, batch: Batch) -> jax.Array:
  return logits.astype(jnp.float32)


def _cross_entropy(logits: jax.Array, batch: Batch) -> losses.Sums:
  return losses.classification_sums(logits, batch["labels"], batch["weights"])


def _squared_error(logits: jax.Array, batch: Batch) -> losses.Sums:
  return losses.regression_sums(logits, batch["labels"], batch["weights"])


LABELS_OF = "text"  # what the head labels
CLASSES = Kind(inputs, _cross_entropy, _logits)
NUMBER = Kind(inputs, _squared_error, _logits)


@dataclasses.dataclass(frozen=True, eq=False)
class Classification:
  """A corpus and its tokens; see `task.Task`."""

  corpus: data.Corpus
  tokens: dict[str, data.Tokens]
  buckets: tuple[int, ...]
  pad_id: int

  widths: ClassVar[Mapping[str, tuple[int, ...]]] = {}
  before = ()
  peft_type = "SEQ_CLS"

  @property
  def final(self) -> tuple[str, ...]:
    return tuple(part for part in self.tokens if part not in ("train", "validation"))

  @property
  def kind(self) -> Kind:
    return CLASSES if self.corpus.label_names else NUMBER

  @property
  def outputs(self) -> int:
    """The number of the head's outputs: one per class, or one number."""
    return len(self.corpus.label_names) or 1

  @property
  def lengths(self) -> tuple[int, ...]:
    return self.buckets

  def ids(self) -> dict[str, tuple[Any, ...]]:
    return {part: (t.ids, t.types) for part, t in self.tokens.items()}

  def stream(self, batch_size: int, seed: int) -> Stream:
    return data.Stream(
      self.tokens["train"],
      self.corpus.splits["train"].labels,
      self.buckets,
      batch_size,
      seed,
      pad_id=self.pad_id,
    )

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    tokens = self.tokens[part]
    logits = evaluate.logits_of(predict, tokens, self.buckets, batch_size, self.pad_id)
    if not np.isfinite(logits).all():
      return None
    names = self.corpus.further.get(part, self.corpus.metrics)
    return metrics.compute(names, logits, self.corpus.splits[part].labels)

  def criterion(self, scores: Mapping[str, float]) -> float:
    return scores[self.corpus.metrics[0]]

  def describe(self) -> str:
    sizes = ", ".join(f"{len(t):,} {part}" for part, t in self.tokens.items())
    return f"{self.corpus.name}: {sizes}; dropped {self.corpus.dropped}; padded to {self.buckets}"

  def summary(self) -> dict[str, Any]:
    return {
      "labels": list(self.corpus.label_names),
      "examples": {part: len(tokens) for part, tokens in self.tokens.items()},
      "dropped": dict(self.corpus.dropped),
      "buckets": list(self.buckets),
    }

  def digest(self) -> str:
    """SHA-256 of every token and label."""
    total = hashlib.sha256()
    for part in sorted(self.tokens):
      t, labels = self.tokens[part], self.corpus.splits[part].labels
      for array in (t.ids, t.types, t.offsets, labels):
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def load(settings: Settings) -> Classification:
  """Reads and tokenises the corpus; one set of length buckets for all of its splits."""
  if not settings.model.factory:
    configuration.check_texts(settings.model.path())
  wanted = settings.data
  seed = settings.seed if wanted.split_seed is None else wanted.split_seed
  corpus = data.load(seed=seed, **wanted.corpus_arguments())
  sizes = {"train": wanted.train_examples}
  for part, examples in corpus.splits.items():
    size = sizes.get(part, wanted.eval_examples)
    if size is not None:
      corpus.splits[part] = examples.sample(size, seed)
  tokenizer = data.load_tokenizer(str(settings.model.path()))
  length = wanted.max_length
  tokens = {part: data.encode(tokenizer, corpus.splits[part], length) for part in corpus.splits}
  lengths = np.concatenate([t.lengths for t in tokens.values()])
  pad_id = factory.pad_id(settings.model, tokenizer)
  return Classification(corpus, tokens, data.buckets(lengths, max_length=length), pad_id)
