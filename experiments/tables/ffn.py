"""Feed-forward variants at equal parameters and steps, beside table 1 of Shazeer 2020."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import from_scratch as configs
from experiments import from_scratch
from experiments.tables.cells import Cell
from experiments.tables.report import Report, mean
from experiments.tables.runs import SEEDS

RESULTS = "ffn"
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
    Cell(
      _cell(name, seed),
      functools.partial(from_scratch.train, _config(name, seed)),
      functools.partial(_check, config=_config(name, seed)),
    )
    for seed in SEEDS
    for name, _ in VARIANTS
  ]


def table(rows: list[dict[str, Any]]) -> Report:
  named = {row["cell"]: row for row in rows}
  found = {(name, seed): named[_cell(name, seed)] for name, _ in VARIANTS for seed in SEEDS}
  lines = []
  for name, printed in VARIANTS:
    own = [found[name, seed] for seed in SEEDS]
    apart = [row["loss"] - found["relu", row["seed"]]["loss"] for row in own]
    losses = [row["loss"] for row in own]
    lines.append(
      [name, f"{own[0]['parameters']:,}", mean(losses, ".4f"), mean(apart, "+.4f"), printed]
    )
  columns = ["variant", "parameters", "held-out loss", "vs relu, by seed", "Shazeer t. 1"]
  return Report(_title(), columns, lines, NOTES)


def _cell(variant: str, seed: int) -> str:
  return f"{variant} seed={seed}"


def _config(variant: str, seed: int) -> ConfigDict:
  config = configs.get_config(variant)
  config.seed = seed
  return config


def _check(row: Mapping[str, Any], config: ConfigDict) -> None:
  """Raises ValueError if a row was computed with other fields than the table has now."""
  for field, now in json.loads(config.to_json()).items():
    then = row["config"].get(field)
    if then != now:
      raise ValueError(
        f"{row['cell']}: its result was computed with {field}={then!r}, but the table now asks for "
        f"{now!r}. Take its line out of the results file to compute it again."
      )


def _title() -> str:
  c = configs.get_config()
  return (
    f"Feed-forward variants: a byte-level decoder of {c.layers} layers, width {c.width}, from "
    f"scratch on BBC news; {c.steps} steps of {c.batch_size * c.length:,} bytes; "
    f"{len(SEEDS)} seeds."
  )


NOTES = (
  "loss: nats per byte. Shazeer t. 1: log-perplexity of T5-base's span filling after 65,536 steps.",
)
