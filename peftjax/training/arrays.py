"""Arrays to classes, or to numbers: the task of a module of your own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from peftjax import data
from peftjax.core.layout import Layout
from peftjax.data.pipeline import iterate
from peftjax.training import classification, metrics
from peftjax.training.factory import layout_of
from peftjax.training.task import Kind


def inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {"inputs": batch["inputs"]}


CLASSES = classification.CLASSES._replace(inputs=inputs)
NUMBER = classification.NUMBER._replace(inputs=inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """N rows and their labels by part; see `task.Task`.

  Attributes:
    parts: `(inputs [N, ...], labels [N])` by name, int32 classes or float32 numbers.
  """

  parts: Mapping[str, tuple[np.ndarray, np.ndarray]]

  name = "arrays"
  source = "."
  label_names = ()
  outputs = None
  lengths = (1,)
  before = ()
  final = ()
  peft_type = ""

  @classmethod
  def of(cls, rows: Any, labels: Any, what: str) -> Arrays:
    """One part, "train".

    Raises:
      ValueError: no rows, another number of labels, or labels that are not a vector of numbers.
    """
    rows, labels = np.asarray(rows), np.asarray(labels)
    kind = "int32" if np.issubdtype(labels.dtype, np.integer) else "float32"
    numbers = labels.ndim == 1 and labels.dtype.kind in "iuf" and rows.dtype.kind in "biuf"
    if not numbers or not len(labels) or rows.shape[:1] != labels.shape:
      raise ValueError(
        f"{what} has inputs {rows.shape} {rows.dtype} and labels {labels.shape} {labels.dtype}; "
        "give numbers, inputs [N, ...] and labels [N], and at least one row"
      )
    return cls({"train": (rows, labels.astype(kind))})

  def __repr__(self) -> str:
    rows, labels = self.parts["train"]
    return f"<arrays: inputs {rows.shape} {rows.dtype}, labels {labels.dtype}>"

  def task(self, held_out: Arrays | None, seed: int) -> Arrays:
    """The data as a run trains on it; `held_out` is its validation part."""
    more = {} if held_out is None else {"validation": held_out.parts["train"]}
    return Arrays({**self.parts, **more})

  def layout(self, model: Any, params: Any) -> Layout:
    """The layout of the model, called with one row."""
    row = self.parts["train"][0][:1]
    return layout_of(model, params, jax.ShapeDtypeStruct(row.shape, row.dtype))

  @property
  def kind(self) -> Kind:
    return CLASSES if self._classes else NUMBER

  @property
  def _classes(self) -> bool:
    return self.parts["train"][1].dtype == np.int32

  def ids(self) -> dict[str, tuple[Any, ...]]:
    return {}

  def stream(self, batch_size: int, seed: int) -> _Stream:
    return _Stream(*self.parts["train"], batch_size, seed)

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    rows, labels = self.parts[part]
    plan = data.batch_plan(np.ones(len(rows), int), (1,), batch_size, 0, 0, shuffle=False)
    pending = [predict(_batch(rows, labels, index)) for index in plan.index]
    logits = np.concatenate([np.asarray(x, np.float32) for x in jax.device_get(pending)])
    logits = logits[: len(rows)]
    if not np.isfinite(logits).all():
      return None
    if self._classes:
      return metrics.compute(("accuracy",), logits, labels)
    return {"loss": float(np.square(logits[:, 0] - labels).mean())}

  def criterion(self, scores: Mapping[str, float]) -> float:
    return scores["accuracy"] if self._classes else -scores["loss"]

  def describe(self) -> str:
    return ", ".join(f"{len(labels):,} rows {part}" for part, (_, labels) in self.parts.items())

  def summary(self) -> dict[str, Any]:
    return {"examples": {part: len(labels) for part, (_, labels) in self.parts.items()}}

  def digest(self) -> str:
    """SHA-256 of every row and label."""
    total = hashlib.sha256()
    for part in sorted(self.parts):
      for array in self.parts[part]:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


class _Stream:
  """The training batches of all epochs by global step, as `pipeline.Stream`."""

  def __init__(self, rows: np.ndarray, labels: np.ndarray, batch_size: int, seed: int):
    lengths = np.ones(len(rows), int)
    self._plan = functools.lru_cache(maxsize=2)(
      lambda epoch: data.batch_plan(lengths, (1,), batch_size, seed, epoch)
    )
    self._arrays = rows, labels
    self.steps_per_epoch = len(self._plan(0))

  def batch(self, step: int) -> data.Batch:
    """One batch."""
    epoch, place = divmod(step, self.steps_per_epoch)
    return _batch(*self._arrays, self._plan(epoch).index[place])

  def iterate(self, start: int, stop: int) -> Iterator[data.Batch]:
    """The batches of steps `start` to `stop` - 1, read ahead by a thread."""
    return iterate(self.batch, start, stop)


def _batch(rows: np.ndarray, labels: np.ndarray, index_B: np.ndarray) -> data.Batch:
  """The rows `index_B`; an empty one, -1, is the first row with weight 0."""
  at = np.maximum(index_B, 0)
  return {
    "inputs": rows[at],
    "labels": labels[at],
    "weights": (index_B >= 0).astype(np.float32),
  }
