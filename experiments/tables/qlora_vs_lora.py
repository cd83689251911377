"""The cost of a quantised base in fine-tuning: the same small budget over each of them.

Beside it stands QLoRA's table 3 (Dettmers et al. 2023): full fine-tuning and LoRA in 16 bits, then
LoRA over Int8, FP4 and NF4 with double quantisation, on GLUE and on Super-NaturalInstructions. Ours
is in float32, of one small model and of 60 steps, so only the differences down a column compare.
"""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.tables.report import Report, mean
from experiments.tables.runs import SEEDS, Row, by_trial, sweep

RESULTS = "qlora_vs_lora"
STEPS = 60  # steps of 4 rows of 256 tokens
EVAL_ROWS = 64  # rows of 256 tokens


class Base(NamedTuple):
  """A line of the table.

  Attributes:
    name: the name that is shown.
    arg: argument of configs/causal_lm.py.
    double_quant: True if the base's scales are quantised.
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


def get_config() -> ConfigDict:
  listed = (
    {
      "base": f"configs/causal_lm.py:model=smollm2,data=bbc,{base.arg}",
      "quant.double_quant": base.double_quant,
    }
    for base in BASES
  )
  return sweep(listed, train={"steps": (STEPS,)}, data={"eval_rows": (EVAL_ROWS,)})


def by_base(rows: list[Row]) -> dict[str, list[Row]]:
  """The rows of each base, one per seed."""
  return dict(zip((base.name for base in BASES), by_trial(rows), strict=True))


def table(rows: list[Row]) -> Report:
  """The report: one line per base, mean and standard deviation over the seeds."""
  found = by_base(rows)
  score = lambda own, when, part: [row[when][part]["perplexity"] for row in own]
  dense = score(found["LoRA, dense"], "metrics", "test")
  lines = []
  for base in BASES:
    own = found[base.name]
    news = score(own, "metrics", "test")
    lines.append(
      [
        base.name,
        mean(score(own, "before", "test")),
        mean(news),
        mean([a - b for a, b in zip(news, dense, strict=True)], "+.2f"),
        mean(score(own, "before", "other")),
        mean(score(own, "metrics", "other")),
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
      "vs LoRA, dense",
      "sentiment before",
      "sentiment after",
      "QLoRA t. 3: GLUE",
      "T5-80M RougeL",
    ],
    lines,
  )
