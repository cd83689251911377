"""The cost of a planned step: bytes on a device by class, operations, and seconds at best."""

from __future__ import annotations

import math
from typing import Any

import jax

from experiments.planning.chips import Chip
from experiments.planning.model import Planned
from peftjax.collectives import collectives, sent
from peftjax.quant.weight import Quantized
from peftjax.training import flops

# Share of a chip's memory for uncounted uses: the runtime, other programs, fragments.
RESERVE = 0.06


def held(planned: Planned) -> dict[str, int]:
  """Bytes, by class, of the step's arguments on a device."""
  total = dict.fromkeys(("codes", "scales", "dense base", "adapters", "optimizer", "batch"), 0)

  def add(name: str, tree: Any) -> None:
    total[name] += sum(map(_local, jax.tree.leaves(tree)))

  quantised = lambda x: isinstance(x, Quantized)
  for leaf in jax.tree.leaves(planned.frozen, is_leaf=quantised):
    if quantised(leaf):
      add("codes", leaf.codes)
      add("scales", leaf.scales)
    else:
      add("dense base", leaf)
  add("adapters", planned.state.train)
  add("optimizer", (planned.state.opt_state, planned.state.step))
  add("batch", planned.batch)
  return total


def _local(x: Any) -> int:
  shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
  size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
  return math.prod(shape) * size


def memory(planned: Planned, compiled: Any) -> dict[str, int]:
  """Bytes of a device: the classes of `held`, the arrays that the step makes, and the peak.

  "gradients" are as large as the adapters; "temporaries" the rest of what the compiler needs.
  """
  stats = compiled.memory_analysis()
  classes = held(planned)
  if planned.mesh.devices.flat[0].platform == "tpu":
    peak = stats.peak_memory_in_bytes
  else:  # XLA:CPU's peak leaves out its temporaries
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    peak += stats.output_size_in_bytes - stats.alias_size_in_bytes
  gradients = classes["adapters"]
  rest = max(0, peak - sum(classes.values()) - gradients)
  code = stats.generated_code_size_in_bytes
  return {**classes, "gradients": gradients, "temporaries": rest, "code": code, "peak": peak + code}


def work(planned: Planned) -> flops.Work:
  rows, length = planned.batch["tokens"].shape
  return flops.step_work(planned.module.config, planned.state.train, planned.frozen, rows, length)


def estimate(planned: Planned, compiled: Any, chip: Chip | None) -> dict[str, Any]:
  """Operations, bytes sent, and for a known chip the least seconds that a step takes."""
  done, found = work(planned), sent(collectives(compiled))
  devices = planned.mesh.size
  told: dict[str, Any] = {
    "tflop": done.model / 1e12,
    "tflop_with_remat": done.done / 1e12,
    "sent_bytes": found,
  }
  if chip is None:
    return told
  peak = flops.PEAKS[chip.name]
  base = sum(held(planned)[name] for name in ("codes", "scales", "dense base"))
  seconds = {
    "compute": done.done / devices / peak,
    "memory": passes(planned.module.config) * base / chip.bandwidth,
    "links": sum(found.values()) / chip.links,
  }
  step = max(seconds.values())
  tokens = math.prod(planned.batch["tokens"].shape)
  return {
    **told,
    "seconds": seconds,
    "step_seconds": step,
    "bound_by": max(seconds, key=lambda name: seconds[name]),
    "tokens_per_second": tokens / step,
    "share_of_peak": done.model / devices / peak / step,
  }


def passes(config: Any) -> int:
  """The number of times a step reads the base: forward, backward, and in recomputation."""
  return 2 if config.remat in (False, "products") else 3


def fits(bytes_by_class: dict[str, int], rows: int, chip: Chip) -> dict[str, Any]:
  """Tells whether a plan fits, and how many rows would, if memory grows evenly with rows."""
  usable = int(chip.memory * (1 - RESERVE))
  peak, grows = bytes_by_class["peak"], bytes_by_class["temporaries"] + bytes_by_class["batch"]
  spare = usable - (peak - grows)
  most = int(rows * spare / grows) if grows > 0 and spare > 0 else 0
  return {"usable": usable, "fits": peak <= usable, "rows_that_fit": most}
