"""What a run needs to know of what it trains for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Batch = Mapping[str, jax.Array]


class Kind(NamedTuple):
  """The pure part of a task: plain functions, so that it is static under jit.

  Attributes:
    inputs: a batch to the positional arguments of the module.
    loss: logits and a batch to a sum and what it counts: float32 scalars, of which a step makes
      the mean, and accumulation and devices the mean over all batches.
    output: logits and a batch to what evaluation needs of them.
    summed: a batch to keyword arguments, or None. A module that takes all of them gives, in place
      of logits, what `loss` makes of these: there `loss` and `output` are this result.
  """

  inputs: Callable[[Batch], tuple[Any, ...]]
  loss: Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]
  output: Callable[[jax.Array, Batch], Any]
  summed: Callable[[Batch], Mapping[str, jax.Array]] | None = None


class Stream(Protocol):
  """Batches by global step, the same whenever they are asked for."""

  steps_per_epoch: int

  def iterate(self, start: int, stop: int) -> Iterator[Any]: ...


class Task(Protocol):
  """Data, loss and metrics of a run.

  Attributes:
    kind: the pure part.
    outputs: of a new head, or None.
    lengths: tokens of a row, ascending: each a program of its own.
    widths: columns of those arrays of a batch that have others, at each of `lengths`.
    before: parts that are also scored before training.
    final: parts that are scored once, with the best parameters.
    peft_type: what Hugging Face PEFT calls the task.
  """

  kind: Kind
  outputs: int | None
  lengths: tuple[int, ...]
  widths: Mapping[str, tuple[int, ...]]
  before: tuple[str, ...]
  final: tuple[str, ...]
  peft_type: str

  def ids(self) -> Mapping[str, tuple[Any, ...]]:
    """All token ids of each part and, of an encoder's, their types."""
    ...

  def stream(self, batch_size: int, seed: int) -> Stream:
    """The training batches, whole on every process."""
    ...

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    """Metrics of a part; None if what `predict` gave is not finite."""
    ...

  def criterion(self, scores: Mapping[str, float]) -> float:
    """What the best parameters have most of, of the scores of the validation part."""
    ...

  def describe(self) -> str:
    """One line for people."""
    ...

  def summary(self) -> dict[str, Any]:
    """What `result.json` says of the data."""
    ...

  def digest(self) -> str:
    """SHA-256 of all data; a continuation has to have the same."""
    ...
