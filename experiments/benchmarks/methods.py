"""The training step of each method against LoRA's of the same rank.

  python -m experiments.benchmarks.methods --out=methods.jsonl

MiniLM, float32, AdamW, LoRA of r = 12 on all linear layers without dropout of its own. The methods
take turns of ten steps in one process; costs are a step's share of a turn, the median of turns, and
the peer is always LoRA. AdaLoRA's step has its regulariser, its scores and, once a turn, the
allocation. About four minutes on two cores that
nothing else uses.
"""

from collections.abc import Callable
from typing import Any

from absl import app, flags

import peftjax as pj
from experiments import runtime, timing
from experiments.benchmarks import report
from experiments.benchmarks.batch import example
from experiments.benchmarks.stepping import stepping
from peftjax.data import samples
from peftjax.methods.base import Method
from peftjax.training.classification import CLASSES

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
NAMES = flags.DEFINE_list("methods", None, "Methods to measure; by default all.")
RANK = flags.DEFINE_integer("rank", 12, "r of LoRA, DoRA and, at first, AdaLoRA.")
BATCH = flags.DEFINE_integer("batch", 16, "Rows per batch.")
LENGTH = flags.DEFINE_integer("length", 64, "Tokens per row.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns that each method takes.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps per turn.")

PEER = "lora"


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up(None)
  methods = made(RANK.value)
  chosen = NAMES.value or [name for name in methods if name != PEER]
  if unknown := set(chosen) - set(methods):
    raise app.UsageError(f"unknown methods {sorted(unknown)}; there are {', '.join(methods)}")
  steps = {name: steps_of(methods[name]) for name in (PEER, *chosen)}
  taken = timing.medians([*steps.values()], TURNS.value, steps=STEPS.value, uncounted=1)
  costs = dict(zip(steps, taken, strict=True))
  rows = [report.Row(f"step_{name}", costs[name], costs[PEER], "ms") for name in chosen]
  report.end(f"Step against LoRA's, {BATCH.value} x {LENGTH.value}", rows, OUT.value)


def made(rank: int) -> dict[str, Method]:
  targets = "all-linear"
  return {
    "lora": pj.lora(rank, targets=targets),
    "adalora": pj.adalora(rank, target_rank=2 * rank / 3, targets=targets, interval=10),
    "dora": pj.dora(rank, targets=targets),
    "vera": pj.vera(256, targets),
    "ia3": pj.ia3(["key", "value"], [r".*/layers(_\d+)?/output/dense/kernel"]),
    "houlsby": pj.adapters(32, "houlsby"),
    "parallel": pj.adapters(64, "parallel"),
    "prefix": pj.prefix(20),
    "full": pj.unfreeze(r"(?!head/).*"),  # the head is trained with every method
  }


def steps_of(method: Method) -> Callable[[], Any]:
  """A function that takes one step and returns its numbers."""
  model, params = pj.load_pretrained(samples.model("minilm"), num_labels=2)
  method = pj.chain(method, pj.unfreeze("head/.*"))
  total = 1 + (1 + TURNS.value) * (STEPS.value + 1)
  batch = example(BATCH.value, LENGTH.value)
  once = stepping(model, params, method, CLASSES, batch, total=total)
  once()  # compiles
  return once


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
