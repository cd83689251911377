"""Texts to other texts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from peftjax import data, losses
from peftjax.data.pairs import Pairs, PairStream, columns, widths
from peftjax.io.records import clip
from peftjax.models import configuration
from peftjax.training import evaluate
from peftjax.training.settings import Settings
from peftjax.training.task import Batch, Kind, Stream


def inputs(batch: Batch) -> dict[str, jax.Array]:
  """Padding behind a target is seen by nothing that counts, so it needs no mask."""
  return {name: batch[name] for name in ("tokens", "mask", "targets")}


def sums(logits: jax.Array, batch: Batch) -> losses.Sums:
  return losses.next_token_sums(logits, {"tokens": batch["targets"], "weights": batch["weights"]})


def summed(batch: Batch) -> dict[str, jax.Array]:
  return {"loss_weights": batch["weights"]}


KIND = Kind(inputs, sums, sums, summed)


# What a model must be.
check = configuration.check_encoder_decoder


def shapes(wanted: Any, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch with these settings, whose targets are as long as they allow."""
  target = columns(wanted.target_length)
  kinds = {"tokens": (length, np.int32), "mask": (length, np.bool_)}
  kinds |= {"targets": (target, np.int32), "weights": (target, np.float32)}
  return {field: jax.ShapeDtypeStruct((rows, n), kind) for field, (n, kind) in kinds.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceToSequence:
  """Pairs by part; see `task.Task`.

  Attributes:
    pairs: "train", "validation" and "test".
    lengths, beside: columns of sources and of targets in each bucket.
    dropped: how many pairs were left out, by reason.
  """

  pairs: dict[str, Pairs]
  lengths: tuple[int, ...]
  beside: tuple[int, ...]
  dropped: Mapping[str, int]

  kind = KIND
  outputs = None
  before = final = ("test",)
  peft_type = "SEQ_2_SEQ_LM"

  @property
  def widths(self) -> dict[str, tuple[int, ...]]:
    return {"targets": self.beside, "weights": self.beside}

  def ids(self) -> dict[str, tuple[Any, ...]]:
    found = {part: (pairs.sources.ids,) for part, pairs in self.pairs.items()}
    return found | {f"{part} target": (pairs.targets.ids,) for part, pairs in self.pairs.items()}

  def stream(self, batch_size: int, seed: int) -> Stream:
    return PairStream(self.pairs["train"], self.lengths, self.beside, batch_size, seed)

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    """exp of the mean negative log-likelihood of the targets' tokens, and that mean."""
    pairs = self.pairs[part]
    plan = data.batch_plan(
      pairs.sources.lengths, self.lengths, batch_size, seed=0, epoch=0, shuffle=False
    )
    beside = dict(zip(self.lengths, self.beside, strict=True))
    return evaluate.perplexity(
      predict(pairs.batch(index, length, beside[length]))
      for index, length in zip(plan.index, plan.length.tolist(), strict=True)
    )

  def criterion(self, scores: Mapping[str, float]) -> float:
    return -scores["loss"]

  def describe(self) -> str:
    sizes = ", ".join(f"{len(pairs):,} {part}" for part, pairs in self.pairs.items())
    shapes = ", ".join(f"{s} + {t}" for s, t in zip(self.lengths, self.beside, strict=True))
    return f"files: {sizes} pairs; dropped {dict(self.dropped)}; padded to {shapes} tokens"

  def summary(self) -> dict[str, Any]:
    return {
      "examples": {part: len(pairs) for part, pairs in self.pairs.items()},
      "predicted_tokens": {part: len(pairs.targets.ids) for part, pairs in self.pairs.items()},
      "dropped": dict(self.dropped),
      "buckets": [list(shape) for shape in zip(self.lengths, self.beside, strict=True)],
    }

  def digest(self) -> str:
    """SHA-256 of every token."""
    total = hashlib.sha256()
    for part in sorted(self.pairs):
      for tokens in (self.pairs[part].sources, self.pairs[part].targets):
        for array in (tokens.ids, tokens.offsets):
          total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def load(settings: Settings) -> SequenceToSequence:
  """Reads and tokenises the files; one set of buckets for all parts.

  Raises:
    ValueError: the model has no decoder that reads a source; its tokenizer puts no end behind a
      text, so that targets would never end.
  """
  wanted, path = settings.data, settings.model.path()
  check(path)
  tokenizer = data.load_tokenizer(str(path))
  ends, marks = (
    configuration.end_ids(path),
    (configuration.pad_id(path), configuration.start_id(path)),
  )
  corpus = data.load(seed=settings.seed, **wanted.corpus_arguments())
  parts = {}
  for part, examples in corpus.splits.items():
    size = wanted.eval_examples
    some = examples if part == "train" or size is None else examples.sample(size, settings.seed)
    one = lambda texts, length, like=some: data.encode(
      tokenizer, dataclasses.replace(like, texts=texts, pairs=None), length
    )
    targets = one(some.pairs, wanted.target_length)
    if not np.isin(targets.ids[targets.offsets[1:] - 1], ends).all():
      raise ValueError(
        f"{path}: its tokenizer puts none of the ids {clip(list(ends))}, which end a text, behind "
        "one. Take the tokenizer.json that the model was trained with."
      )
    parts[part] = Pairs(one(some.texts, wanted.max_length), targets, *marks)
  return SequenceToSequence(
    parts, *widths(list(parts.values()), wanted.max_length), dropped=corpus.dropped
  )
