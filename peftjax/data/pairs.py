"""Pairs of a source and a target, each with tokens of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from peftjax.data.pipeline import Batch, iterate, read_batch
from peftjax.data.plan import batch_plan, buckets
from peftjax.data.tokenise import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
  """N sources and their targets.

  Attributes:
    sources, targets: N texts each.
    pad_id: of padding.
    start_id: what a decoder reads before a target.
  """

  sources: Tokens
  targets: Tokens
  pad_id: int
  start_id: int

  def __len__(self) -> int:
    return len(self.sources)

  def batch(self, index_B: np.ndarray, source: int, target: int) -> Batch:
    """The pairs `index_B` (int32 [B], -1 for an empty row), S = `source` and T = `target` columns.

    Returns:
      "tokens" int32 [B, S] and "mask" bool [B, S], see `pipeline.read_batch`; "targets" int32
      [B, T], behind the start; "weights" float32 [B, T], 1 on what is to be predicted.
    """
    read = lambda tokens, length: read_batch(
      tokens, np.zeros(len(tokens), np.int32), index_B, length, self.pad_id
    )
    one, other = read(self.sources, source), read(self.targets, target - 1)
    start = np.full((len(index_B), 1), self.start_id, np.int32)
    wanted = other["mask"] * other["weights"][:, None]
    return {
      "tokens": one["tokens"],
      "mask": one["mask"],
      "targets": np.concatenate([start, other["tokens"]], 1),
      "weights": np.concatenate([np.zeros_like(start, np.float32), wanted], 1),
    }


def widths(
  parts: Sequence[Pairs], max_length: int, multiple: int = 16
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Columns of sources and of targets in each bucket, by the lengths of all parts.

  Sources have the buckets of `plan.buckets`; beside each goes one width of targets, that of its
  longest behind the start. So there are as many programs as buckets, and not their square.
  """
  lengths = [
    np.concatenate([getattr(p, of).lengths for p in parts]) for of in ("sources", "targets")
  ]
  ends = buckets(lengths[0], max_length=max_length, multiple=multiple)
  bucket = np.searchsorted(ends, lengths[0])
  longest = [lengths[1][bucket == i].max(initial=1) for i in range(len(ends))]
  return ends, tuple(columns(int(n), multiple) for n in longest)


def columns(target: int, multiple: int = 16) -> int:
  """T of a target of so many tokens: behind the start, rounded up."""
  return -(-(target + 1) // multiple) * multiple


class PairStream:
  """The training batches of all epochs by global step, as `pipeline.Stream`, of pairs."""

  def __init__(
    self, pairs: Pairs, ends: Sequence[int], beside: Sequence[int], batch_size: int, seed: int
  ):
    self._plan = functools.lru_cache(maxsize=2)(
      lambda epoch: batch_plan(pairs.sources.lengths, ends, batch_size, seed, epoch)
    )
    self._pairs, self._beside = pairs, dict(zip(ends, beside, strict=True))
    self.steps_per_epoch = len(self._plan(0))

  def batch(self, step: int) -> Batch:
    """One batch; see `Pairs.batch`."""
    epoch, place = divmod(step, self.steps_per_epoch)
    plan = self._plan(epoch)
    length = int(plan.length[place])
    return self._pairs.batch(plan.index[place], length, self._beside[length])

  def iterate(self, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps `start` to `stop` - 1, read ahead by a thread."""
    return iterate(self.batch, start, stop)
