"""Numbers of committed results: those that take too long to be measured again for a claim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.sweeping import trials
from experiments.tables import cells, qlora_vs_lora, runs
from experiments.tables.runs import Overrides, Row

FOLDER = Path(__file__).parents[1] / "results" / "tables"


def rows(name: str) -> dict[str, dict[str, Any]]:
  """The rows of a table of cells by name.

  Raises:
    ValueError: if there are none.
  """
  found = cells.rows(FOLDER / f"{name}.jsonl")
  if not found:
    raise ValueError(f"no {name}.jsonl in {FOLDER}: `python -m experiments.tables {name}` makes it")
  return found


def classifier(table: str, wanted: Sequence[Overrides]) -> list[list[Row]]:
  """The runs of a table of the classifier: the rows of each trial, one per seed."""
  return runs.by_trial(_runs(table, runs.CLASSIFIER, runs.sweep(wanted)))


def perplexity(base: str, when: str, part: str) -> dict[int, float]:
  """Perplexity by seed, from table qlora_vs_lora: "before" or "metrics", on "test" or "other"."""
  name = qlora_vs_lora.RESULTS
  found = qlora_vs_lora.by_base(_runs(name, name, qlora_vs_lora.get_config()))
  return {row["config"]["seed"]: row[when][part]["perplexity"] for row in found[base]}


def _runs(table: str, file: str, sweep: ConfigDict) -> list[Row]:
  """The rows of a table's runs; ValueError if one is missing."""
  listed = trials.expand(sweep)
  found = runs.found(listed, FOLDER / f"{file}.jsonl")
  missing = [one.id for one, row in zip(listed, found, strict=True) if row is None]
  if missing:
    raise ValueError(
      f"{len(missing)} runs have no result, {missing[0]} the first: `python -m experiments.tables "
      f"{table}` computes them"
    )
  return [row for row in found if row]
