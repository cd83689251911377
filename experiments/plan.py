"""Says what a training step takes of a device's memory and time, without the device or the weights.

  python -m experiments.plan --config=configs/causal_lm.py:quant=nf4,method=lora \\
    --model=llama-7b --topology=v5e:2x4 --mesh=fsdp:-1 --config.model.dtype=bfloat16

Compiles the step that `experiments.train` would run, from shapes alone: by the TPU compiler for
chips that are not there (pip install 'peftjax[tpu-aot]'), or with --topology=local for this
machine. A program takes it some minutes. Any field of the config is a flag, as for training;
--config.train.batch_size and --config.data.max_length are the shape of a batch. With --suggest it
looks for the mesh, rematerialisation and batches that make the same updates fastest.
"""

import functools
import json
import sys
import time
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from experiments import runtime
from experiments.planning import chips

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/causal_lm.py[:ARGUMENT].")
MODEL = flags.DEFINE_string(
  "model", "", "llama-7b, llama-13b, llama-33b or llama-65b; by default the model of the config."
)
TOPOLOGY = flags.DEFINE_string(
  "topology", "local", "Chips: v5e:2x4, v5p:2x2x1, v4:2x2x1, v6e:2x4, ...; or this machine's."
)
DEVICES = flags.DEFINE_integer("devices", None, "How many of them; by default all.")
MESH = flags.DEFINE_string(
  "mesh", "", 'As for training, e.g. "fsdp:-1"; by default all along data.'
)
BASE_DTYPE = flags.DEFINE_string(
  "base_dtype", "bfloat16", "Of the pretrained arrays that are not quantised."
)
SUGGEST = flags.DEFINE_integer(
  "suggest", 0, "Compile at most so many programs in search of the fastest that fits.", 0
)
LEAVES = flags.DEFINE_integer(
  "leaves", 0, "Also show where so many of the largest arrays lie, and their bytes on a device.", 0
)
OUT = flags.DEFINE_string("out", None, "Append the plan to this file, as a line of JSON.")
PICTURE = flags.DEFINE_string(
  "picture", None, "Draw the bytes by class into this file (.png, .svg)."
)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; fields are given as --config.FIELD=VALUE")
  chips.prepare(TOPOLOGY.value)
  runtime.set_up(CONFIG.value.get("compilation_cache"))
  from experiments.planning import show
  from peftjax.training.settings import from_config

  settings = from_config(CONFIG.value)
  devices = chips.devices_of(TOPOLOGY.value, DEVICES.value)
  chip = None if TOPOLOGY.value == "local" else chips.chip_of(TOPOLOGY.value)
  if SUGGEST.value:
    row = _suggested(settings, devices, chip)
  else:
    row = _planned(settings, MESH.value or "data:-1", devices, chip)
  show.after(row)
  if OUT.value:
    with Path(OUT.value).open("a", encoding="utf-8") as file:
      file.write(json.dumps(row, sort_keys=True) + "\n")
  if PICTURE.value:
    show.picture([row], Path(PICTURE.value))
  if chip and not row["fits"]:
    raise ValueError(show.excess(row, chip))


def _planned(settings, mesh_text, devices, chip):
  """The plan of one program, compiled or from the cache."""
  import dataclasses

  from experiments.planning import cache, costs, show
  from experiments.planning.model import planned
  from peftjax import sharding
  from peftjax.training import process

  rows, length = settings.train.batch_size, settings.data.max_length
  mesh = sharding.make_mesh(mesh_text, devices)
  step = planned(settings, MODEL.value, BASE_DTYPE.value, rows, length, mesh)
  show.before(step, chip)
  if LEAVES.value:
    show.leaves(step, LEAVES.value)

  def compute():
    started = time.perf_counter()
    with show.waiting():
      compiled = step.compile()
    found = costs.memory(step, compiled)
    return {
      "commit": process.commit(),
      "chip": chip.name if chip else devices[0].device_kind,
      "devices": len(devices),
      "rows": rows,
      "length": length,
      "bytes": found,
      **costs.estimate(step, compiled, chip),
      **(costs.fits(found, rows, chip) if chip else {}),
      "compile_seconds": round(time.perf_counter() - started, 1),
    }

  asked = {
    "settings": dataclasses.asdict(settings),
    "config": repr(step.module.config),
    "base_dtype": BASE_DTYPE.value,
    "topology": TOPOLOGY.value if chip else [d.device_kind for d in devices],
    "mesh": dict(mesh.shape),
  }
  folder = settings.compilation_cache
  kept = Path(folder).expanduser() if folder else None
  row = cache.cached(kept, asked, compute)
  return {"command": " ".join(["python -m experiments.plan", *sys.argv[1:]]), **row}


def _suggested(settings, devices, chip):
  """The plan of the fastest candidate that fits, of those that were compiled."""
  import jax

  from experiments.planning import search, show
  from experiments.planning.model import planned
  from peftjax import sharding

  if chip is None or MESH.value:
    raise ValueError(
      "--suggest looks for a mesh on chips that are known: write --topology=v5e:2x4 or another, "
      "and no --mesh"
    )
  found = search.candidates(settings, len(devices))
  if not found:
    raise ValueError(
      f"an update has {settings.train.batch_size} x {settings.optimizer.accumulate} rows, which "
      f"{len(devices)} devices cannot share: write --config.train.batch_size={len(devices)}"
    )
  one = sharding.make_mesh("", jax.devices("cpu")[:1])
  length = settings.data.max_length
  whole = planned(found[0].of(settings), MODEL.value, BASE_DTYPE.value, 1, length, one)
  ordered = search.best_first(found, whole, chip)

  @functools.cache
  def compiled(candidate):
    print(candidate.flags(), flush=True)
    try:
      return _planned(candidate.of(settings), candidate.mesh, devices, chip)
    except show.TooMuch as error:
      print(error, flush=True)
      return None

  tried = list(search.search(ordered, compiled, SUGGEST.value))
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


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=runtime.parse_flags)
