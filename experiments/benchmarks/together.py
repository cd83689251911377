"""Eight trials in one process and one compiled step, against eight single ones.

  python -m experiments.benchmarks.together --out=together.jsonl

LoRA and AdaLoRA of MiniLM on sentiment, four learning rates by two ranks, batches of at most
--batch x --length tokens.

  steps  a step of all trials against the sum of the single steps, in one process, turn by turn
  total  the whole sweep of --total steps, from the start of the process to the last test score,
         against eight runs of experiments.train one after the other; both begin without any
         compiled program and keep those that they compile

float32. About 25 minutes on two cores that nothing else uses; --total=0 leaves the second out.
--chunk=8 computes all trials at once, by vmap, as a sweep does on a GPU where batches are of one
length: texts of --length=16 are.
"""

import itertools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict

from configs import classify
from experiments import runtime, timing
from experiments.benchmarks import report
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from peftjax.training.together import Together

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
METHODS = flags.DEFINE_list("methods", ["lora", "adalora"], "Methods of configs/classify.py.")
TURNS = flags.DEFINE_integer("turns", 6, "Number of turns that each side takes.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps per turn.")
TOTAL = flags.DEFINE_integer("total", 200, "Steps of the whole sweep.")

LENGTH = flags.DEFINE_integer("length", 64, "Tokens per text, at most.")
BATCH = flags.DEFINE_integer("batch", 16, "Texts per batch.")
CHUNK = flags.DEFINE_integer("chunk", None, "Trials per vmap in `steps`; by default as in a sweep.")

RATES, RANKS = (5e-4, 1e-3, 2e-3, 4e-3), (6, 12)
DATA = {
  "data.split_seed": 0,
  "data.train_examples": 4000,
  "data.eval_examples": 1000,
  "train.eval_batch_size": 100,
}


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    runtime.set_up(cache)
    for method in METHODS.value:
      rows.append(steps(method))
      if TOTAL.value:
        rows.append(total(method))
  report.end("Eight trials together", rows, OUT.value)


def budget() -> dict[str, int]:
  return {**DATA, "data.max_length": LENGTH.value, "train.batch_size": BATCH.value}


def trials(method: str) -> list[dict[str, float | int]]:
  return [
    {"optimizer.learning_rate": rate, "method.rank": rank, **aim(method, rank)}
    for rate, rank in itertools.product(RATES, RANKS)
  ]


def aim(method: str, rank: int) -> dict[str, float]:
  return {"method.target_rank": 2 * rank / 3} if method == "adalora" else {}


def config(method: str, trial: dict[str, float | int]) -> ConfigDict:
  made = classify.get_config(f"method={method},data=sentiment")
  steps = (1 + TURNS.value) * (STEPS.value + 1)
  made.update_from_flattened_dict({**budget(), "train.steps": max(steps, 100), **trial})
  return made


def steps(method: str) -> report.Row:
  """Milliseconds of a step of all eight: in one program, and one after the other."""
  configs = [config(method, trial) for trial in trials(method)]
  made = Together(configs, CHUNK.value)
  group = made.steps()
  # With the rate in their state, trials of one rank share one program, which is compiled once.
  single = [Run(from_config(one), None, rate_in_state=True) for one in configs]
  streams = [run.steps() for run in single]

  def together() -> None:
    jax.block_until_ready(next(group)[1])

  def one_by_one() -> None:
    for run, stream in zip(single, streams, strict=True):
      next(stream)
      run.fetch(all_of_them=True)

  costs = timing.medians((together, one_by_one), TURNS.value, steps=STEPS.value, uncounted=1)
  told = f"{len(configs)} trials of {BATCH.value} x {LENGTH.value}, {made.chunk} at once"
  return report.Row.of(f"steps_{method}", costs, "ms", told)


def total(method: str) -> report.Row:
  """Seconds of the commands."""
  base = f"configs/classify.py:method={method},data=sentiment"
  common = {**budget(), "train.steps": TOTAL.value}
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    sweep = folder / "sweep.py"
    listed = [{**trial, **common, "compilation_cache": f"{name}/one"} for trial in trials(method)]
    whole = json.dumps(dict(base=base, trials=listed, together=8))
    sweep.write_text(
      "import json\nfrom ml_collections import ConfigDict\n\n\n"
      "def get_config():\n"
      f"  return ConfigDict(json.loads({whole!r}))\n"
    )
    ours = timed("experiments.sweep", f"--config={sweep}", f"--workdir={folder / 'together'}")
    peer = 0.0
    for i, trial in enumerate(trials(method)):
      fields = {**trial, **common, "compilation_cache": f"{name}/other"}
      given = [f"--config.{path}={value}" for path, value in fields.items()]
      peer += timed("experiments.train", f"--config={base}", f"--workdir={folder / str(i)}", *given)
  return report.Row.of(f"total_{method}", (ours, peer), "s", f"{TOTAL.value} steps")


def timed(module: str, *arguments: str) -> float:
  """Seconds of a command, which has to succeed."""
  command = [sys.executable, "-m", module, *arguments]
  begun = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
  return time.perf_counter() - begun


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
