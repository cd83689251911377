"""`Planner`: plans of one model's step on the devices of a topology."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.planning import cache, chips, costs, search, show
from experiments.planning.chips import Chip
from experiments.planning.model import Planned, planned
from experiments.planning.search import Candidate
from peftjax import sharding
from peftjax.core import tree
from peftjax.training import process
from peftjax.training.settings import Settings

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Planner:
  """The common part of all plans of a command.

  Attributes:
    settings: settings of the run.
    model, base_dtype: see `model.planned`.
    topology: the topology as it is written.
    devices: the devices of it that are used.
    leaves: how many of the largest arrays to show the places of.
  """

  settings: Settings
  model: str
  base_dtype: str
  topology: str
  devices: Sequence[Any]
  leaves: int = 0

  @property
  def chip(self) -> Chip | None:
    """The chip; None for this machine."""
    return None if self.topology == "local" else chips.chip_of(self.topology)

  def plan(self, mesh: str, settings: Settings | None = None) -> Row:
    """The plan of one program, compiled or from the cache; for JSON.

    Args:
      mesh: see `sharding.make_mesh`.
      settings: used in place of its own.

    Raises:
      ValueError: there is no such step; see `model.planned`.
      show.TooMuch: its arguments do not fit, whatever it computes.
    """
    settings = settings or self.settings
    step = self._step(settings, settings.train.batch_size, sharding.make_mesh(mesh, self.devices))
    show.before(step, self.chip)
    if self.leaves:
      show.leaves(step, self.leaves)
    asked = {
      "settings": dataclasses.asdict(settings),
      "config": repr(step.module.config),
      "base_dtype": self.base_dtype,
      "topology": self.topology if self.chip else [d.device_kind for d in self.devices],
      "mesh": dict(step.mesh.shape),
    }
    folder = settings.compilation_cache
    kept = Path(folder).expanduser() if folder else None
    return cache.cached(kept, asked, lambda: self._compiled(settings, step))

  def fastest(self, tries: int) -> Row:
    """The plan of the fastest candidate that fits, among those that were compiled.

    Args:
      tries: how many programs to compile at most.

    Raises:
      ValueError: no chip is named, no batch can be split, or nothing that was tried fits.
    """
    if (chip := self.chip) is None:
      raise ValueError(
        "--suggest looks for a mesh on chips that are known: write --topology=v5e:2x4 or another"
      )
    found = search.candidates(self.settings, len(self.devices))
    if not found:
      update = f"{self.settings.train.batch_size} x {self.settings.optimizer.accumulate}"
      raise ValueError(
        f"an update has {update} rows, which {len(self.devices)} devices cannot share: write "
        f"--config.train.batch_size={len(self.devices)}"
      )
    one = sharding.make_mesh("", jax.devices("cpu")[:1])
    ordered = search.best_first(found, self._step(found[0].of(self.settings), 1, one), chip)

    @functools.cache
    def compiled(candidate: Candidate) -> Row | None:
      print(candidate.flags(), flush=True)
      try:
        return self.plan(candidate.mesh, candidate.of(self.settings))
      except show.TooMuch as error:
        print(error, flush=True)
        return None

    tried = list(search.search(ordered, compiled, tries))
    fitting = [(c, row) for c, row in tried if row is not None and row["fits"]]
    show.tried(tried)
    if not fitting:
      raise ValueError(
        f"none of the {len(tried)} that were tried fits: more chips, quant=nf4, a shorter "
        "--config.data.max_length, fewer rows, or a higher --suggest"
      )
    best, row = max(fitting, key=lambda pair: pair[1]["tokens_per_second"])
    print(f"write {best.flags()}")
    return {**row, "suggested": best.flags()}

  def _step(self, settings: Settings, rows: int, mesh: sharding.Mesh) -> Planned:
    length = settings.data.max_length
    return planned(settings, self.model, self.base_dtype, rows, length, mesh)

  def _compiled(self, settings: Settings, step: Planned) -> Row:
    started = time.perf_counter()
    with show.waiting():
      compiled = step.compile()
    found, rows = costs.memory(step, compiled), settings.train.batch_size
    return {
      "commit": process.commit(),
      "chip": self.chip.name if self.chip else self.devices[0].device_kind,
      "devices": len(self.devices),
      "model": self.model or str(settings.model.path()),
      "total_params": tree.count(tree.combine(step.state.train, step.frozen)),
      "rank": settings.method.get("rank"),
      "rows": rows,
      "length": settings.data.max_length,
      "bytes": found,
      **costs.estimate(step, compiled, self.chip),
      **(costs.fits(found, rows, self.chip) if self.chip else {}),
      "compile_seconds": round(time.perf_counter() - started, 1),
    }
