"""Plans of which examples form which batch: pure functions of lengths, seed and epoch.

Batches are padded to one of a few lengths, the buckets, since every shape costs a compilation.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

# A further bucket must save this share of all tokens. It costs a compilation, seconds even of a
# short run, and on average half a batch of empty rows per epoch.
_BUCKET_COST = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """The S batches of an epoch, each of B rows.

  Attributes:
    index: int32 [S, B]: the example in each row; -1 in the rows that fill up a short batch.
    length: int32 [S]: the bucket of each batch, the length its rows are padded to.
  """

  index: np.ndarray
  length: np.ndarray

  def __len__(self) -> int:
    return len(self.length)


def buckets(
  lengths: np.ndarray, *, max_length: int, max_buckets: int = 4, multiple: int = 16
) -> tuple[int, ...]:
  """At most `max_buckets` ascending lengths; every example is padded to one of them.

  They minimise Σᵢ bucket(lengthᵢ) + 0.02 k Σᵢ lengthᵢ over all sets of k multiples of `multiple`
  (or `max_length`) that fit the longest example: exactly, by dynamic programming. The second term
  keeps out a bucket that saves less than 2 % of the tokens.

  Args:
    lengths: int [N], of all examples of the run: training and evaluation share the buckets.
    max_length: the longest length that the model or the user allows; no bucket is above it.

  Raises:
    ValueError: if there are no lengths, or one is above `max_length`.
  """
  lengths = np.asarray(lengths)
  if not len(lengths) or lengths.max() > max_length:
    raise ValueError(
      f"{len(lengths)} lengths, the longest {lengths.max(initial=0)}: at least one is needed, none"
      f" above max_length {max_length}. Encode with that max_length."
    )
  rounded = np.minimum(-(-lengths // multiple) * multiple, max_length)
  ends, counts = (values.tolist() for values in np.unique(rounded, return_counts=True))
  up_to = [0, *itertools.accumulate(counts)]  # up_to[j + 1]: the number of examples up to ends[j]

  @functools.cache
  def fewest(k: int, j: int) -> tuple[int, tuple[int, ...]]:
    """The fewest padded tokens of the examples up to ends[j] in k buckets, and these buckets."""
    if k == 1:
      return up_to[j + 1] * ends[j], (ends[j],)
    shorter = ((i, *fewest(k - 1, i)) for i in range(k - 2, j))
    return min(
      (tokens + (up_to[j + 1] - up_to[i + 1]) * ends[j], (*chosen, ends[j]))
      for i, tokens, chosen in shorter
    )

  options = [fewest(k, len(ends) - 1) for k in range(1, min(max_buckets, len(ends)) + 1)]
  each = _BUCKET_COST * lengths.sum()
  return min(options, key=lambda option: option[0] + each * len(option[1]))[1]


def batch_plan(
  lengths: np.ndarray,
  buckets: Sequence[int],
  batch_size: int,
  seed: int,
  epoch: int,
  shuffle: bool = True,
) -> Plan:
  """The batches of one epoch: every example once, each batch within one bucket.

  A bucket's last batch is filled up with -1. The order of the examples in a bucket and the order of
  the batches are shuffled by `np.random.default_rng([seed, epoch])`; without `shuffle` buckets come
  in ascending order and examples in their own. The number of batches depends on neither seed nor
  epoch.

  Raises:
    ValueError: if an example is longer than the last bucket, or the batch size below 1.
  """
  lengths = np.asarray(lengths)
  if batch_size < 1:
    raise ValueError(f"batch_size {batch_size} is not a number of rows; write 1 or more.")
  if lengths.max(initial=0) > buckets[-1]:
    raise ValueError(
      f"The longest example has {lengths.max()} tokens, the last bucket {buckets[-1]}. Make the"
      " buckets from the lengths of every split."
    )
  rng = np.random.default_rng([seed, epoch])
  order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
  bucket = np.searchsorted(buckets, lengths)[order]
  index, length = [], []
  for place, end in enumerate(buckets):
    rows = order[bucket == place]
    rows = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1).reshape(-1, batch_size)
    index.append(rows)
    length.append(np.full(len(rows), end))
  batches = np.concatenate(index).astype(np.int32), np.concatenate(length).astype(np.int32)
  turn = rng.permutation(len(batches[1])) if shuffle else np.arange(len(batches[1]))
  return Plan(batches[0][turn], batches[1][turn])
