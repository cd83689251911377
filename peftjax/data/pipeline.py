"""Batches of arrays, read ahead by index, so that the position is the next batch to consume."""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from peftjax.data.plan import Plan, batch_plan
from peftjax.data.tokenise import Tokens

Batch = dict[str, np.ndarray]

# Gathering a batch takes microseconds, a step milliseconds: one thread keeps the buffer full.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


def read_batch(
  tokens: Tokens, labels: np.ndarray, index_B: np.ndarray, length: int, pad_id: int
) -> Batch:
  """The examples `index_B` (int32 [B], -1 for an empty row), padded to T = `length` tokens.

  Returns:
    "tokens" int32 [B, T], "mask" bool [B, T] (true at tokens), "types" int32 [B, T], "labels" [B]
    or, if each token has one, [B, T] in their dtype, "weights" float32 [B] (1, or 0 for an empty
    row). An empty row has label 0 and only `pad_id`, but its mask is true in the first place: a
    softmax over nothing would be NaN, which weight 0 does not remove.
  """
  real_B = index_B >= 0
  rows_B = np.where(real_B, index_B, 0)
  start_B, end_B = tokens.offsets[rows_B], tokens.offsets[rows_B + 1]
  at_BT = start_B[:, None] + np.arange(length)
  mask_BT = (at_BT < end_B[:, None]) & real_B[:, None]
  at_BT = np.where(mask_BT, at_BT, 0)
  batch = {
    "tokens": np.where(mask_BT, tokens.ids[at_BT], np.int32(pad_id)),
    "types": np.where(mask_BT, tokens.types[at_BT], np.uint8(0)).astype(np.int32),
    "labels": np.where(
      real_B[:, None] if labels.ndim > 1 else real_B, labels[rows_B], labels.dtype.type(0)
    ),
    "weights": real_B.astype(np.float32),
  }
  if labels.ndim > 1:
    batch["labels"] = batch["labels"][:, :length]
  mask_BT[~real_B, 0] = True
  return batch | {"mask": mask_BT}


def batches(
  tokens: Tokens,
  labels: np.ndarray,
  plan: Plan,
  *,
  pad_id: int,
  start: int = 0,
) -> Iterator[Batch]:
  """The batches `start`, `start` + 1, ... of a plan; see `read_batch`."""
  read = functools.partial(_read_step, tokens, labels, pad_id, plan)
  return iterate(read, start, len(plan))


class Stream:
  """The training batches of all epochs, one after the other, by global step from 0.

  They are the same on every process; the sharding of a batch says which rows a process needs.

  Step s is batch s mod S of the plan of epoch ⌊s/S⌋, S being `steps_per_epoch`. Batches depend on
  the step and the arguments alone, so a run that stopped after consuming k batches goes on with
  `iterate(k, stop)`, whatever had been read ahead.

  Args:
    tokens, labels: N examples; labels int32 or float32 [N], or [N, max_length] of each token.
    buckets, batch_size, seed: see `plan.batch_plan`.
    pad_id: the token id of padding.

  Attributes:
    steps_per_epoch: the number of batches of an epoch, the same for every one.
  """

  def __init__(
    self,
    tokens: Tokens,
    labels: np.ndarray,
    buckets: Sequence[int],
    batch_size: int,
    seed: int,
    *,
    pad_id: int,
  ):
    # Two plans are kept: at the end of an epoch the read-ahead is already in the next.
    self._plan = functools.lru_cache(maxsize=2)(
      lambda epoch: batch_plan(tokens.lengths, buckets, batch_size, seed, epoch)
    )
    self._read = functools.partial(_read_step, tokens, labels, pad_id)
    self.steps_per_epoch = len(self._plan(0))

  def batch(self, step: int) -> Batch:
    """One batch; see `read_batch`."""
    epoch, place = divmod(step, self.steps_per_epoch)
    return self._read(self._plan(epoch), place)

  def iterate(self, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps `start` to `stop` - 1, read ahead by a thread."""
    return iterate(self.batch, start, stop)


def _read_step(tokens: Tokens, labels: np.ndarray, pad_id: int, plan: Plan, step: int) -> Batch:
  """One batch of a plan."""
  return read_batch(tokens, labels, plan.index[step], int(plan.length[step]), pad_id)


def iterate(read: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
  """Yields `read(i)` for i from `start` to `stop` - 1, read ahead by a thread."""
  return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(_READ_AHEAD))
