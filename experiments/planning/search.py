"""The mesh, rematerialisation and rows per batch with the highest estimate that fits a chip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.planning import costs
from experiments.planning.chips import Chip
from experiments.planning.model import Planned
from peftjax.training import flops
from peftjax.training.settings import Settings

# Activations of a layer that are kept for the backward pass: all, some, its input.
KEPT = ("none", "products", "layer")


class Candidate(NamedTuple):
  """One way to make the same updates.

  Attributes:
    fsdp, tensor: devices that split the base; the others are along data.
    kept: one of `KEPT`, for a layer.
    rows: rows per batch.
    accumulate: batches per update.
  """

  mesh: str
  fsdp: int
  tensor: int
  kept: str
  rows: int
  accumulate: int

  def of(self, settings: Settings) -> Settings:
    """The settings of a run by this candidate."""
    return dataclasses.replace(
      settings,
      model=dataclasses.replace(settings.model, remat=self.kept),
      train=dataclasses.replace(settings.train, batch_size=self.rows),
      optimizer=dataclasses.replace(settings.optimizer, accumulate=self.accumulate),
    )

  def flags(self) -> str:
    """The flags that select it."""
    return (
      f"--mesh={self.mesh} --config.model.remat={self.kept} "
      f"--config.train.batch_size={self.rows} --config.optimizer.accumulate={self.accumulate}"
    )


class Tried(NamedTuple):
  """A candidate and its plan; None if its arguments do not fit, whatever it computes."""

  candidate: Candidate
  row: Mapping[str, Any] | None


def candidates(settings: Settings, devices: int) -> list[Candidate]:
  """All ways to have the rows of an update in equal batches on that many devices."""
  update = settings.train.batch_size * settings.optimizer.accumulate
  found = []
  for tensor in _divisors(devices):
    for fsdp in _divisors(devices // tensor):
      sizes = {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
      mesh = ",".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1) or "data:1"
      for rows in _divisors(update):
        if rows % (devices // tensor) == 0:
          found += [Candidate(mesh, fsdp, tensor, k, rows, update // rows) for k in KEPT]
  return found


def best_first(
  found: Sequence[Candidate], whole: Planned, chip: Chip
) -> list[tuple[float, Candidate]]:
  """Candidates with the tokens per second that none can exceed, as if devices sent nothing.

  Of equal ones those that split their arrays come first, in large batches, and "tensor" last.

  Args:
    found: candidates to order.
    whole: a plan of the model, on one device.
    chip: chip of all devices.
  """
  held = costs.held(whole)
  base = sum(held[name] for name in ("codes", "scales", "dense base"))
  length = whole.batch["tokens"].shape[1]

  def bound(c: Candidate) -> float:
    config = dataclasses.replace(whole.module.config, remat=c.kept != "none" and c.kept)
    work = flops.step_work(config, whole.state.train, whole.frozen, c.rows, length)
    devices = math.prod(int(part.split(":")[1]) for part in c.mesh.split(","))
    compute = work.done / devices / flops.PEAKS[chip.name]
    memory = costs.passes(config) * base / (c.fsdp * c.tensor) / chip.bandwidth
    return c.rows * length / max(compute, memory)

  order = lambda pair: (-round(pair[0], 6), pair[1].tensor, -pair[1].fsdp, pair[1].accumulate)
  return sorted(((bound(c), c) for c in found), key=order)


def search(
  ordered: Sequence[tuple[float, Candidate]],
  compiled: Callable[[Candidate], Mapping[str, Any] | None],
  tries: int,
) -> Iterator[Tried]:
  """Compiles one after the other until none that is left could be better than the best that fits.

  Args:
    ordered: candidates in the order of `best_first`.
    compiled: makes the plan of a candidate, or None if it cannot fit, which is soon told.
    tries: programs to compile at most.
  """
  best, worse = 0.0, list[Callable[[Candidate], bool]]()
  for bound, candidate in ordered:
    if tries <= 0 or bound <= best:
      return
    if any(rule(candidate) for rule in worse):
      continue
    row = compiled(candidate)
    tries -= row is not None
    if row is not None and row["fits"]:
      best = max(best, row["tokens_per_second"])
    else:
      worse.append(_needs_as_much(candidate, row["rows_that_fit"] if row else 0))
    yield Tried(candidate, row)


def _needs_as_much(failed: Candidate, rows_that_fit: int) -> Callable[[Candidate], bool]:
  """A test whether a candidate needs as much as one that did not fit."""

  def needs(c: Candidate) -> bool:
    if c.mesh != failed.mesh or KEPT.index(c.kept) > KEPT.index(failed.kept):
      return False
    if failed.accumulate > 1 and c.accumulate == 1:  # holds no float32 sums of gradients
      return False
    return c.rows >= failed.rows or c.rows > max(rows_that_fit, 1)

  return needs


def _divisors(number: int) -> list[int]:
  return [i for i in range(1, number + 1) if number % i == 0]
