"""Feed-forward variants at equal parameters and steps, beside table 1 of Shazeer 2020."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from experiments.tables import from_scratch
from experiments.tables.cells import Cell
from experiments.tables.report import Report, mean

SEEDS = (0, 1, 2)
# The variant, and the log-perplexity of held-out text that table 1 of Shazeer 2020 (2002.05202)
# prints after 65,536 steps.
VARIANTS = (
  ("relu", "1.997"),
  ("gelu", "1.983"),
  ("swish", "1.994"),
  ("glu", "1.982"),
  ("bilinear", "1.960"),
  ("geglu", "1.942"),
  ("swiglu", "1.944"),
  ("reglu", "1.953"),
)


def cells(folder: Path) -> list[Cell]:
  return [
    Cell(f"{name} seed={seed}", functools.partial(from_scratch.train, name, seed), 0.8)
    for seed in SEEDS
    for name, _ in VARIANTS
  ]


def table(rows: list[dict[str, Any]]) -> Report:
  found = {(row["variant"], row["seed"]): row for row in rows}
  lines = []
  for name, printed in VARIANTS:
    own = [found[name, seed] for seed in SEEDS]
    apart = [row["loss"] - found["relu", row["seed"]]["loss"] for row in own]
    losses = [row["loss"] for row in own]
    lines.append(
      [name, f"{own[0]['parameters']:,}", mean(losses, ".4f"), mean(apart, "+.4f"), printed]
    )
  columns = ["variant", "parameters", "held-out loss", "- relu, by seed", "Shazeer t. 1"]
  return Report(TITLE, columns, lines, NOTES)


TITLE = (
  f"Feed-forward variants: a byte-level decoder of {from_scratch.LAYERS} layers, width "
  f"{from_scratch.WIDTH}, from scratch on BBC news; {from_scratch.STEPS} steps of "
  f"{from_scratch.BATCH * from_scratch.LENGTH:,} bytes; {len(SEEDS)} seeds."
)
NOTES = (
  "loss: nats a byte. Shazeer t. 1: log-perplexity of T5-base's span filling after 65,536 steps.",
)
