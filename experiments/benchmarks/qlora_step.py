"""Our QLoRA step against Hugging Face PEFT's with bitsandbytes.

  python -m experiments.benchmarks.qlora_step --out=qlora_step.jsonl

SmolLM2-135M in NF4 with double quantisation, r = 16 on all linear layers, batch 4 x 256, gradient
checkpointing, float32, AdamW: both sides train the same weights on the same tokens with the same
threads, each in its own process, and take turns. Costs are medians; memory is the peak resident
size of the process, loading included. Needs `make parity`'s packages.
"""

import statistics

from absl import app, flags

from experiments.benchmarks import report
from experiments.benchmarks.turns import Worker

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
BATCH = flags.DEFINE_integer("batch", 4, "Rows of a batch.")
LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a row.")
TURNS = flags.DEFINE_integer("turns", 5, "How often the sides change.")
STEPS = flags.DEFINE_integer("steps", 2, "Steps of a turn.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  args = (str(BATCH.value), str(LENGTH.value))
  sides = [Worker(f"experiments.benchmarks.qlora_step_{side}", *args) for side in ("ours", "peer")]
  seconds: tuple[list[float], list[float]] = ([], [])
  for _ in range(TURNS.value):
    for worker, taken in zip(sides, seconds, strict=True):
      taken += worker.run(STEPS.value)
  ours, peer = (statistics.median(taken) for taken in seconds)
  our_peak, peer_peak = (worker.close() for worker in sides)
  tokens = BATCH.value * LENGTH.value
  rows = [
    report.Row("qlora_step", ours, peer, "s", f"{tokens / ours:,.0f} tokens/s"),
    report.Row("qlora_peak_mem", our_peak, peer_peak, "MiB", "resident"),
  ]
  report.show(f"QLoRA of SmolLM2, batch {BATCH.value} x {LENGTH.value}, {report.machine()}", rows)
  if OUT.value:
    report.write(OUT.value, rows)


if __name__ == "__main__":
  app.run(main)
