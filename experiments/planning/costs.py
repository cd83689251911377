"""What a planned step costs: bytes on a device by class, operations, and seconds at best."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from experiments.planning.chips import Chip
from experiments.planning.model import Planned
from peftjax.collectives import collectives, sent
from peftjax.core import paths
from peftjax.quant.weight import Quantized

# Of a chip's memory, for what a program does not count: the runtime, other programs, fragments.
RESERVE = 0.06


class Work(NamedTuple):
  """Floating-point operations of a step on all devices.

  Attributes:
    model: of the forward and the backward pass: what a share of peak is measured by.
    done: with what is computed again, under rematerialisation.
  """

  model: float
  done: float


def held(planned: Planned) -> dict[str, int]:
  """Bytes of a device's part of what the step takes, by class."""
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
  """Bytes of a device: the classes of `held`, what the step makes for itself, and the peak.

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


def work(planned: Planned) -> Work:
  """Products with matrices and of attention; what scans repeat is counted as often.

  XLA's own count (`cost_analysis`) takes the body of a scan once.
  """
  c = planned.module.config
  rows, length = planned.batch["tokens"].shape
  tokens = rows * length
  frozen = sum(_matrix(path, x) for path, x in paths.leaves(planned.frozen).items())
  trained = sum(x.size for x in jax.tree.leaves(planned.state.train) if x.ndim >= 2)
  frozen += 0 if _has_head(planned) else c.vocab * c.width
  # Scores and sums of values, forward; half of them, since a causal mask hides the others.
  seen = min(length, c.window or length) if hasattr(c, "window") else length
  attention = 2 * 2 * tokens * seen * c.heads * c.head_size * c.layers / 2
  once = 2 * tokens * (frozen + trained) + attention
  model = once + 2 * tokens * (frozen + 2 * trained) + 2 * attention
  return Work(model, model + (once if c.remat else 0))


def _matrix(path: str, leaf: Any) -> int:
  """Entries of a kernel that activations are multiplied with; tables are looked up."""
  base = getattr(leaf, "base", leaf)
  shape = getattr(base, "shape", ())
  return math.prod(shape) if len(shape) >= 2 and path.endswith("kernel") else 0


def _has_head(planned: Planned) -> bool:
  return any("lm_head" in path for path in paths.leaves(planned.frozen))


def estimate(planned: Planned, compiled: Any, chip: Chip | None) -> dict[str, Any]:
  """Operations, what is sent, and of a known chip the seconds that a step takes at the least."""
  done, found = work(planned), sent(collectives(compiled))
  devices = planned.mesh.size
  told: dict[str, Any] = {
    "tflop": done.model / 1e12,
    "tflop_with_remat": done.done / 1e12,
    "sent_bytes": found,
  }
  if chip is None:
    return told
  passes = 3 if planned.module.config.remat else 2
  base = sum(held(planned)[name] for name in ("codes", "scales", "dense base"))
  seconds = {
    "compute": done.done / devices / chip.flops,
    "memory": passes * base / chip.bandwidth,
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
    "share_of_peak": done.model / devices / chip.flops / step,
  }


def fits(bytes_by_class: dict[str, int], rows: int, chip: Chip) -> dict[str, Any]:
  """Whether it does, and how many rows would, as far as what grows with them grows evenly."""
  usable = int(chip.memory * (1 - RESERVE))
  peak, grows = bytes_by_class["peak"], bytes_by_class["temporaries"] + bytes_by_class["batch"]
  spare = usable - (peak - grows)
  most = int(rows * spare / grows) if grows > 0 and spare > 0 else 0
  return {"usable": usable, "fits": peak <= usable, "rows_that_fit": most}
