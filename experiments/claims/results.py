"""Numbers of committed results: what takes too long to be measured again for a claim."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.tables import cells

FOLDER = Path(__file__).parents[1] / "results"


def rows(name: str) -> dict[str, dict[str, Any]]:
  """The rows of a table by cell.

  Raises:
    ValueError: if there are none.
  """
  found = cells.rows(FOLDER / f"{name}.jsonl")
  if not found:
    raise ValueError(f"no {name}.jsonl in {FOLDER}: run python -m experiments.tables {name}")
  return found


def perplexity(base: str, when: str, part: str, seeds: tuple[int, ...] = (0, 1, 2)) -> float:
  """Mean over the seeds of table qlora_vs_lora, "before" or "after", on "test" or "other"."""
  table = rows("qlora_vs_lora")
  return statistics.mean(table[f"{base}-{seed}"][when][part]["perplexity"] for seed in seeds)
