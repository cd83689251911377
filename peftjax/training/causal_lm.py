"""Texts to their own next tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from peftjax import data, losses
from peftjax.data.pack import Rows, RowStream, pack
from peftjax.models import configuration
from peftjax.training import evaluate, factory
from peftjax.training.settings import Settings
from peftjax.training.task import Batch, Kind, Stream


def inputs(batch: Batch) -> dict[str, jax.Array]:
  segments = batch["segments"]
  rest = {"positions": batch["positions"], "segments": segments}
  return {"tokens": batch["tokens"], "mask": segments > 0, **rest}


def summed(batch: Batch) -> dict[str, jax.Array]:
  return {"loss_weights": batch["weights"]}


LABELS_OF = None
KIND = Kind(inputs, losses.next_token_sums, losses.next_token_sums, summed)


# Raises ValueError on a model that is not of this task.
check = configuration.check_decoder


def shapes(wanted: Any, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch with these settings of the data."""
  kinds = dict.fromkeys(("tokens", "segments", "positions"), np.int32) | {"weights": np.float32}
  return {field: jax.ShapeDtypeStruct((rows, length), kind) for field, kind in kinds.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelling:
  """Packed rows by part; see `task.Task`.

  Attributes:
    name: name of the corpus.
    rows: "train", "validation" and "test", and "other", held-out text of another domain.
    idle: rows that training leaves out.
  """

  name: str
  rows: dict[str, Rows]
  idle: int = 0

  kind = KIND
  outputs = None
  widths: ClassVar[Mapping[str, tuple[int, ...]]] = {}
  peft_type = "CAUSAL_LM"

  def __post_init__(self) -> None:
    for part, rows in self.rows.items():
      if not rows.weights.any():
        raise ValueError(
          f"{part}: none of the {rows.documents} texts has a token to predict in rows of "
          f"{rows.tokens.shape[1]} tokens. Write longer rows, --config.data.max_length, or, if "
          "the completions are empty, --config.data.loss=all."
        )

  @property
  def before(self) -> tuple[str, ...]:
    return self.final

  @property
  def final(self) -> tuple[str, ...]:
    return tuple(part for part in ("test", "other") if part in self.rows)

  @property
  def lengths(self) -> tuple[int, ...]:
    return (self.rows["train"].tokens.shape[1],)

  def ids(self) -> dict[str, tuple[Any, ...]]:
    return {part: (rows.tokens,) for part, rows in self.rows.items()}

  def stream(self, batch_size: int, seed: int) -> Stream:
    return RowStream(self.rows["train"], batch_size, seed)

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    """exp of the mean negative log-likelihood of the tokens to be predicted, and that mean."""
    rows = self.rows[part]
    plan = data.batch_plan(
      np.full(len(rows), self.lengths[0]), self.lengths, batch_size, seed=0, epoch=0, shuffle=False
    )
    return evaluate.perplexity(predict(rows.batch(index)) for index in plan.index)

  def criterion(self, scores: Mapping[str, float]) -> float:
    return -scores["loss"]

  def describe(self) -> str:
    sizes = (
      f"{len(rows):,} {part} of {rows.documents:,} texts" for part, rows in self.rows.items()
    )
    told = f"; {self.idle:,} more of train are prompts alone, left out" if self.idle else ""
    return f"{self.name}: rows of {self.lengths[0]} tokens: {', '.join(sizes)}{told}"

  def summary(self) -> dict[str, Any]:
    return {
      "rows": {part: len(rows) for part, rows in self.rows.items()},
      "predicted_tokens": {part: int(rows.weights.sum()) for part, rows in self.rows.items()},
      "row_length": self.lengths[0],
    }

  def digest(self) -> str:
    """SHA-256 of every row."""
    total = hashlib.sha256()
    for part in sorted(self.rows):
      rows = self.rows[part]
      for array in (rows.tokens, rows.segments, rows.weights):
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def load(settings: Settings) -> LanguageModelling:
  """Reads, tokenises and packs the corpus and, to measure forgetting, another one's test texts."""
  wanted = settings.data
  tokenizer = data.load_tokenizer(str(settings.model.path()))
  ends = factory.end_ids(settings.model, tokenizer)
  arguments = wanted.corpus_arguments()
  corpus = data.load(seed=settings.seed, **arguments)
  parts = dict(corpus.splits)
  if wanted.other:
    parts["other"] = data.load(wanted.other, seed=settings.seed).splits["test"]
  rows = {}
  for part, examples in parts.items():
    completions = wanted.loss == "completions" and part != "other"
    documents, prompts = data.documents(tokenizer, examples, ends, completions=completions)
    packed = pack(documents, wanted.max_length, prompts, settings.seed)
    rows[part] = packed if part == "train" else packed.take(wanted.eval_rows)
  idle = 0
  if wanted.loss == "completions":
    rows["train"], idle = trainable_rows(rows["train"])
  return LanguageModelling(corpus.name, rows, idle)


def trainable_rows(rows: Rows) -> tuple[Rows, int]:
  """The rows with a token to predict, and how many are left out; all of them if none has one.

  Rows of prompts alone could be a batch, without a gradient.
  """
  counting = rows.weights.any(1)
  return (rows.where(counting), int((~counting).sum())) if counting.any() else (rows, 0)
