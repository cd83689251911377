"""What a quantised base costs when it is fine-tuned: the same small budget over each of them.

Beside it stands QLoRA's table 3 (Dettmers et al. 2023): full fine-tuning and LoRA in 16 bits, then
LoRA over Int8, FP4 and NF4 with double quantisation, on GLUE and on Super-NaturalInstructions. Ours
is in float32, of one small model and of 60 steps, so only the differences down a column compare.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax

from configs import causal_lm
from experiments.tables.cells import Cell
from experiments.tables.report import Report, mean
from peftjax.training.loop import train_and_evaluate

SEEDS = (0, 1, 2)
STEPS = 60  # of 4 rows of 256 tokens
EVAL_ROWS = 64  # of 256 tokens


class Base(NamedTuple):
  """A line of the table.

  Attributes:
    name: shown.
    arg: of configs/causal_lm.py.
    double_quant: of the base's scales.
    glue: RoBERTa-large's accuracy in QLoRA's table 3.
    rouge: T5-80M's RougeL there.

  The paper's row of full fine-tuning is its own replication in BF16.
  """

  name: str
  arg: str
  double_quant: bool
  glue: float | None
  rouge: float


BASES = (
  Base("full fine-tuning", "quant=none,method=full", False, 88.6, 40.0),
  Base("LoRA, dense", "quant=none,method=lora", False, 88.8, 40.5),
  Base("LoRA, int8", "quant=int8,method=lora", False, 88.8, 40.4),
  Base("LoRA, FP4", "quant=fp4,method=lora", False, 88.6, 40.3),
  Base("LoRA, NF4 + DQ", "quant=nf4,method=lora", True, None, 40.4),
)


def cells(folder: Path) -> list[Cell]:
  made = []
  for seed, base in itertools.product(SEEDS, BASES):
    label = base.arg.replace("quant=", "").replace(",method=", "-") + f"-{seed}"
    made.append(Cell(label, functools.partial(_train, base, seed, folder / label), 6.5))
  return made


def _train(base: Base, seed: int, workdir: Path) -> dict[str, Any]:
  config = causal_lm.get_config(f"model=smollm2,data=bbc,{base.arg}")
  config.seed, config.train.steps, config.data.eval_rows = seed, STEPS, EVAL_ROWS
  config.quant.double_quant = base.double_quant
  jax.clear_caches()  # the programs of the run before are of no use to this one
  result = train_and_evaluate(config, workdir)
  return {
    "base": base.name,
    "seed": seed,
    "before": result["before"],
    "after": {part: result["metrics"][part] for part in result["before"]},
    "best_step": result["best_step"],
    "trainable_params": result["trainable_params"],
    "predicted_tokens": result["predicted_tokens"],
    "config": result["config"],
    "run_commit": result["commit"],
  }


def table(rows: list[dict[str, Any]]) -> Report:
  """A line a base: mean and standard deviation over the seeds."""
  dense = {
    row["seed"]: row["after"]["test"]["perplexity"] for row in rows if row["base"] == "LoRA, dense"
  }
  lines = []
  for base in BASES:
    own = [row for row in rows if row["base"] == base.name]
    value = lambda when, part, own=own: [row[when][part]["perplexity"] for row in own]
    apart = [row["after"]["test"]["perplexity"] - dense[row["seed"]] for row in own]
    lines.append(
      [
        base.name,
        mean(value("before", "test")),
        mean(value("after", "test")),
        mean(apart, "+.2f"),
        mean(value("before", "other")),
        mean(value("after", "other")),
        "" if base.glue is None else f"{base.glue}",
        f"{base.rouge}",
      ]
    )
  return Report(
    f"SmolLM2-135M (from Q4_1) on BBC news, {STEPS} steps of 1,024 tokens, {len(SEEDS)} seeds: "
    "perplexity of held-out texts.",
    [
      "base",
      "news before",
      "news after",
      "- LoRA, dense",
      "sentiment before",
      "sentiment after",
      "QLoRA t. 3: GLUE",
      "T5-80M RougeL",
    ],
    lines,
  )
