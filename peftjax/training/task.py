"""The parts of a task that a run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Batch = Mapping[str, jax.Array]


class Kind(NamedTuple):
  """The pure part of a task: plain functions, so that it is static under jit.

  Attributes:
    inputs: a batch to the arguments of the module: the first by position, the others by name, as
      far as it takes them.
    loss: logits and a batch to a sum and its count: float32 scalars, of which a step makes
      the mean, and accumulation and devices the mean over all batches.
    output: logits and a batch to the values that evaluation needs.
    summed: a batch to keyword arguments, or None. A module that takes all of them gives, in place
      of logits, the result of `loss` on these: `loss` and `output` then take this result.
  """

  inputs: Callable[[Batch], dict[str, Any]]
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
    outputs: number of outputs of a new head, or None.
    lengths: tokens per row, ascending: each a program of its own.
    before: parts that are also scored before training.
    final: parts that are scored once, with the best parameters.
    peft_type: the task's name in Hugging Face PEFT.
  """

  kind: Kind
  outputs: int | None
  lengths: tuple[int, ...]
  before: tuple[str, ...]
  final: tuple[str, ...]
  peft_type: str

  def ids(self) -> Mapping[str, tuple[Any, ...]]:
    """All token ids of each part and, for an encoder, their types."""
    ...

  def stream(self, batch_size: int, seed: int) -> Stream:
    """The training batches, whole on every process."""
    ...

  def evaluate(
    self, predict: Callable[[Any], Any], part: str, batch_size: int
  ) -> dict[str, float] | None:
    """Metrics of a part; None if a result of `predict` is not finite."""
    ...

  def criterion(self, scores: Mapping[str, float]) -> float:
    """The score of the validation part by which parameters are compared; more is better."""
    ...

  def describe(self) -> str:
    """One line for people."""
    ...

  def summary(self) -> dict[str, Any]:
    """The entries about the data in `result.json`."""
    ...

  def digest(self) -> str:
    """SHA-256 of all data; a continuation has to have the same."""
    ...
