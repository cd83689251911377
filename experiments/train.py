"""Fine-tunes a pretrained model.

  python -m experiments.train --config=configs/classify.py:method=lora,data=bbc --workdir=DIR

Any field of the config is a flag: --config.method.rank=4. Run the same command again to go on
after an interruption. See configs/classify.py for the fields.
"""

import time

STARTED = time.perf_counter()

import json
import sys

from absl import app, flags
from ml_collections import config_flags

from experiments import processes, runtime

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:ARGUMENT].")
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; gs://BUCKET/RUN or s3://BUCKET/RUN too.",
  required=True,
)
MESH = flags.DEFINE_string(
  "mesh", "", 'Devices, e.g. "data:2,fsdp:2,tensor:2"; one may be -1, the rest.'
)
DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  "off",
  "Processes that share the run: off, auto (as the cluster says: Cloud TPU, GKE, SLURM, Open MPI, "
  "Kubernetes) or ADDRESS,COUNT,ID, the same command in each but for the last number.",
)

PROFILE = flags.DEFINE_integer(
  "profile", 0, "Trace so many warm steps into WORKDIR/profile (xprof, Perfetto).", lower_bound=0
)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.quiet()
  processes.join(DISTRIBUTED.value)
  runtime.set_up(CONFIG.value.get("compilation_cache"))
  from peftjax.training.loop import train_and_evaluate

  result = train_and_evaluate(
    CONFIG.value, WORKDIR.value, mesh=MESH.value, started=STARTED, traced=PROFILE.value
  )
  if not processes.is_main():
    return
  shown = ("method", "trainable_params", "total_params", "metrics", "best_step", "seconds")
  json.dump({key: result[key] for key in shown}, sys.stdout, indent=2)
  print(f"\n\nAll of it: {WORKDIR.value}/result.json")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=runtime.parse_flags)
