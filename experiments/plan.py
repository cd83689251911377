"""Tells a training step's memory and time on a device, without the device or the weights.

  python -m experiments.plan --config=configs/causal_lm.py:quant=nf4,method=lora \\
    --model=llama-7b --topology=v5e:2x4 --mesh=fsdp:-1 --config.model.dtype=bfloat16

Compiles the step that `experiments.train` would run, from shapes alone: by the TPU compiler for
chips that are not there (pip install 'peftjax[tpu-aot]'), or with --topology=local for this
machine. A program takes it some minutes. Any field of the config is a flag, as for training;
--config.train.batch_size and --config.data.max_length are the shape of a batch. With --suggest it
looks for the mesh, rematerialisation and batches that make the same updates fastest.
"""

import json
import sys
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
DEVICES = flags.DEFINE_integer("devices", None, "Number of chips to use; by default all.")
MESH = flags.DEFINE_string(
  "mesh", "", 'As for training, e.g. "fsdp:-1"; by default all along data.'
)
BASE_DTYPE = flags.DEFINE_string(
  "base_dtype", "bfloat16", "Data type of the pretrained arrays that are not quantised."
)
SUGGEST = flags.DEFINE_integer(
  "suggest", 0, "Compile at most so many programs in search of the fastest that fits.", 0
)
LEAVES = flags.DEFINE_integer(
  "leaves", 0, "Also show where so many of the largest arrays lie, and their bytes on a device.", 0
)
OUT = flags.DEFINE_string("out", None, "Append the plan to this file, as a line of JSON.")
PICTURE = flags.DEFINE_string(
  "picture", None, "Draw the bytes by class into this file (.png, .svg, .pdf)."
)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  check_given()
  chips.prepare(TOPOLOGY.value)
  runtime.set_up(CONFIG.value.get("compilation_cache"))
  from experiments.planning import show
  from experiments.planning.planner import Planner
  from peftjax.training.settings import from_config

  planner = Planner(
    from_config(CONFIG.value),
    MODEL.value,
    BASE_DTYPE.value,
    TOPOLOGY.value,
    chips.devices_of(TOPOLOGY.value, DEVICES.value),
    LEAVES.value,
  )
  row = planner.fastest(SUGGEST.value) if SUGGEST.value else planner.plan(MESH.value or "data:-1")
  row = {"command": " ".join(["python -m experiments.plan", *sys.argv[1:]]), **row}
  show.after(row)
  if OUT.value:
    with Path(OUT.value).open("a", encoding="utf-8") as file:
      file.write(json.dumps(row, sort_keys=True) + "\n")
  if PICTURE.value:
    show.picture([row], Path(PICTURE.value))
  if planner.chip and not row["fits"]:
    raise ValueError(show.excess(row, planner.chip))


def check_given() -> None:
  """Checks that come before anything is compiled.

  Raises:
    ValueError: a file that cannot be written, or a mesh beside --suggest, which looks for one.
  """
  runtime.check_output("--out", OUT.value)
  runtime.check_output("--picture", PICTURE.value, (".png", ".svg", ".pdf"))
  if SUGGEST.value and MESH.value:
    raise ValueError(f"--suggest looks for the mesh itself: leave out --mesh={MESH.value}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=runtime.parse_flags)
