"""Documents packed into rows of one length, for language models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from peftjax.data.pipeline import Batch, iterate
from peftjax.data.plan import batch_plan


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """N rows of T places, each with pieces of one or more documents.

  Attributes:
    tokens: int32 [N, T].
    segments: int32 [N, T]: the piece of each token, from 1; 0 after the last one.
    positions: int32 [N, T]: position of the token in its piece.
    weights: float32 [N, T]: 1 where the token is to be predicted from those before it.
    documents: how many documents the rows hold.
  """

  tokens: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  weights: np.ndarray
  documents: int

  def __len__(self) -> int:
    return len(self.tokens)

  def take(self, count: int | None) -> Rows:
    """The first `count` rows, or all."""
    return self.where(slice(count))

  def where(self, rows: Any) -> Rows:
    """Some of the rows: an index, a slice or a mask."""
    fields = ("tokens", "segments", "positions", "weights")
    return dataclasses.replace(self, **{field: getattr(self, field)[rows] for field in fields})

  def batch(self, index_B: np.ndarray) -> Batch:
    """The rows `index_B`; for an empty row, -1, nothing is to be predicted."""
    real_B1 = (index_B >= 0)[:, None]
    rows_B = np.maximum(index_B, 0)
    fields = ("tokens", "segments", "positions", "weights")
    batch = {field: getattr(self, field)[rows_B] for field in fields}
    return batch | {"weights": np.where(real_B1, batch["weights"], np.float32(0))}


def pack(
  documents: Sequence[np.ndarray],
  length: int,
  prompts: Sequence[int] | None = None,
  seed: int | None = None,
) -> Rows:
  """Cuts documents into pieces of at most `length` tokens and fills rows with them.

  A piece is never continued in another row's middle: one that does not fit starts a new row. The
  first token of a piece has nothing before it and is not predicted.

  Args:
    documents: int arrays of token ids, their end-of-text token included.
    length: T.
    prompts: for each document, how many first tokens are not to be predicted either.
    seed: shuffles the documents first; without it they stay in order.

  Raises:
    ValueError: if there are no documents, or `length` is below 2.
  """
  if length < 2 or not len(documents):
    raise ValueError(f"{len(documents)} documents, rows of {length} tokens: need one, and two")
  order = np.arange(len(documents))
  if seed is not None:
    order = np.random.default_rng(seed).permutation(order)
  rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
  room = 0
  for i in order.tolist():
    ids = np.asarray(documents[i], np.int32)
    asked = np.arange(len(ids)) >= (0 if prompts is None else prompts[i])
    for start in range(0, len(ids), length):
      piece = ids[start : start + length]
      if len(piece) > room:
        rows.append([])
        room = length
      rows[-1].append((piece, asked[start : start + length]))
      room -= len(piece)
  tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
  weights = np.zeros((len(rows), length), np.float32)
  for n, row in enumerate(rows):
    at = 0
    for number, (piece, asked) in enumerate(row, 1):
      place = slice(at, at + len(piece))
      tokens[n, place] = piece
      segments[n, place] = number
      positions[n, place] = np.arange(len(piece))
      weights[n, place] = asked
      weights[n, at] = 0.0
      at += len(piece)
  return Rows(tokens, segments, positions, weights, len(documents))


class RowStream:
  """The training batches of all epochs by global step, as `pipeline.Stream`, of packed rows."""

  def __init__(self, rows: Rows, batch_size: int, seed: int):
    length = rows.tokens.shape[1]
    lengths = np.full(len(rows), length)
    self._plan = functools.lru_cache(maxsize=2)(
      lambda epoch: batch_plan(lengths, (length,), batch_size, seed, epoch)
    )
    self._rows = rows
    self.steps_per_epoch = len(self._plan(0))

  def batch(self, step: int) -> Batch:
    """One batch."""
    epoch, place = divmod(step, self.steps_per_epoch)
    return self._rows.batch(self._plan(epoch).index[place])

  def iterate(self, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps `start` to `stop` - 1, read ahead by a thread."""
    return iterate(self.batch, start, stop)
