"""Logits of a whole split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from peftjax.data import Tokens, batch_plan, batches


def logits_of(
  predict: Callable[[Any], jax.Array],
  tokens: Tokens,
  buckets: Sequence[int],
  batch_size: int,
  pad_id: int,
) -> np.ndarray:
  """`predict(batch)` on every example, in the examples' order: `[N, K]` float32."""
  return np.stack(rows_of(predict, tokens, buckets, batch_size, pad_id))


def rows_of(
  predict: Callable[[Any], jax.Array],
  tokens: Tokens,
  buckets: Sequence[int],
  batch_size: int,
  pad_id: int,
) -> list[np.ndarray]:
  """The row of `predict(batch)` that is each example's, float32, padded as its batch.

  Args:
    predict: a jitted function of a batch; compiled once for each of `buckets`.
    tokens: N examples.
    buckets, batch_size, pad_id: parameters of the batches; see `peftjax.data`.
  """
  plan = batch_plan(tokens.lengths, buckets, batch_size, seed=0, epoch=0, shuffle=False)
  labels = np.zeros(len(tokens), np.int32)
  out: list[np.ndarray] = [np.zeros(0)] * len(tokens)
  pending = []
  for index, batch in zip(plan.index, batches(tokens, labels, plan, pad_id=pad_id), strict=True):
    pending.append((index, predict(batch)))  # dispatched ahead: fetched once all run
  for index, values in pending:
    host = np.asarray(jax.device_get(values), np.float32)
    for i, row in zip(index, host, strict=True):
      if i >= 0:
        out[i] = row
  if not out:
    raise ValueError("nothing to evaluate: the split is empty")
  return out
