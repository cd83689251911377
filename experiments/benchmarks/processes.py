"""Two processes of one core each against one process of two, on the same batches.

  python -m experiments.benchmarks.processes --out=processes.jsonl

MiniLM with LoRA on the corpus of configs/classify.py, batches of 32, split over "data". The sides
take turns, each in new processes; a cost is the median over the turns of a side's median step,
compilation left out. Two processes speak over gloo. Some three minutes.
"""

import os
import socket
import statistics
import subprocess
import sys
import time

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import report

OUT = flags.DEFINE_string("out", None, "Append the row to this file as a JSON line.")
TURNS = flags.DEFINE_integer("turns", 3, "Number of turns that each side takes.", 1)
STEPS = flags.DEFINE_integer("steps", 30, "Steps per turn.", 2)
WARM_UP = 5
WORKER = "--worker"


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    raise ValueError(f"this compares one process of two cores with two of one; here is {cores}")
  sides: list[list[float]] = [[], []]
  for _ in range(TURNS.value):
    sides[0].append(_seconds([cores[:1], cores[1:2]]))
    sides[1].append(_seconds([cores[:2]]))
  costs = [statistics.median(side) for side in sides]
  row = report.Row.of("two_processes_step", costs, "s", "two of one core, one of two")
  report.end("Two processes (ours) against one (peer)", [row], OUT.value)


def _seconds(cores: list[list[int]]) -> float:
  """The seconds of a step of as many processes, each on its own cores."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  name = [sys.executable, "-m", "experiments.benchmarks.processes", WORKER]
  processes = [
    subprocess.Popen(
      [*name, address, *map(str, (len(cores), i, STEPS.value, *own))],
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i, own in enumerate(cores)
  ]
  printed = [process.communicate()[0] for process in processes]
  if any(process.returncode for process in processes):
    raise RuntimeError("a process of the benchmark ended early; its output is above")
  return float(printed[0].splitlines()[-1])


def worker(address: str, count: int, index: int, steps: int, *cores: int) -> None:
  """One of `count` processes; the first prints the median seconds of a step."""
  os.sched_setaffinity(0, cores)
  import jax

  from configs.classify import get_config
  from peftjax.training.run import Run
  from peftjax.training.settings import from_config

  if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index)
  config = get_config("method=lora,data=bbc")
  config.train.steps = steps + WARM_UP
  run, seconds = Run(from_config(config), "data:-1"), []
  begun = time.perf_counter()
  for _ in run.steps():
    jax.block_until_ready(run.state)
    seconds.append(time.perf_counter() - begun)
    begun = time.perf_counter()
  if index == 0:
    print(statistics.median(seconds[WARM_UP:]))


if __name__ == "__main__":
  if sys.argv[1:2] == [WORKER]:
    worker(sys.argv[2], *map(int, sys.argv[3:]))
  else:
    app.run(main, flags_parser=runtime.parse_flags)
