"""Makes a table of a paper again, at a scale that two CPU cores can do.

  python -m experiments.tables all --dry_run
  python -m experiments.tables methods

methods: every method on two tasks, beside LoRA's table 2 and AdaLoRA's table 1.
rank_budget: AdaLoRA against LoRA at equal budgets, beside AdaLoRA's table 5.
adalora_ablation: its parts at one budget, beside AdaLoRA's tables 4 and 5.
which_matrices, rank: beside LoRA's tables 5 and 6.
ffn: feed-forward variants from scratch, beside GLU variants' table 1.
parameters: the papers' counts of trained parameters, from abstract models (seconds).
datatypes: perplexity of SmolLM2 and accuracy of MiniLM with their linear layers in each data type,
  at each block size, beside QLoRA's table 2.
qlora_vs_lora: SmolLM2 fine-tuned whole, and by LoRA over a dense, int8, FP4 and NF4 base, beside
  QLoRA's table 3.

What is in experiments/results/tables (--results) is shown from there; cells that are missing
are computed and added one by one, so a killed run goes on where it was, and the same command in
another terminal takes other cells. Take lines out to compute them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import app, flags

from experiments import runtime
from experiments.tables import report

if TYPE_CHECKING:
  from experiments.tables.cells import Cell

RESULTS = flags.DEFINE_string("results", "experiments/results/tables", "Folder of the results.")
WORKDIR = flags.DEFINE_string("workdir", "runs/tables", "Folder for runs that cells need.")
FORMAT = flags.DEFINE_enum("format", "terminal", report.FORMATS, "How the table is written.")
PICTURES = flags.DEFINE_string(
  "pictures", None, "Draw the pictures of methods and rank_budget into this folder too."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what is left to compute, and how long.")


class Wanted(NamedTuple):
  """A table that was asked for: its module, its cells and where their rows are kept."""

  name: str
  module: Any
  cells: list[Cell]
  file: Path


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  from peftjax.training import build

  known = tables()
  if len(argv) != 2 or argv[1] not in (*known, "all"):
    raise app.UsageError(f"name one table: {', '.join(known)}, all")
  runtime.set_up("~/.cache/peftjax")
  wanted = []
  for name in known if argv[1] == "all" else argv[1:]:
    kept = getattr(known[name], "RESULTS", name)  # tables may share runs
    todo = known[name].cells(build.resolve(WORKDIR.value) / kept)
    wanted.append(Wanted(name, known[name], todo, Path(RESULTS.value) / f"{kept}.jsonl"))
  if DRY_RUN.value:
    show_left(wanted)
    return
  compute(wanted)


def tables() -> dict[str, Any]:
  """The modules that make a table each, by name; all have `cells` and `table`."""
  from experiments.tables import (
    adalora_ablation,
    datatypes,
    ffn,
    methods,
    parameters,
    qlora_vs_lora,
    rank,
    rank_budget,
    which_matrices,
  )

  of_runs = (methods, rank_budget, adalora_ablation, which_matrices, rank)
  found = (*of_runs, ffn, parameters, datatypes, qlora_vs_lora)
  return {module.__name__.rpartition(".")[2]: module for module in found}


def left(wanted: list[Wanted]) -> list[Cell]:
  """The cells that are to be computed, those that tables share once."""
  from experiments.tables import cells

  missing = {(x.file, c.name): c for x in wanted for c in cells.left(x.cells, x.file)}
  return list(missing.values())


def show_left(wanted: list[Wanted]) -> None:
  from experiments.tables import cells

  for table in wanted:
    cells.show_left(table.name, table.cells, table.file)
  if len(wanted) > 1:
    todo = left(wanted)
    print(f"in all: {len(todo)} cells left, about {cells.hours(todo)} hours")


def compute(wanted: list[Wanted]) -> None:
  """Computes what is missing and shows the tables, one after the other."""
  from experiments.tables import cells
  from peftjax.training import process
  from peftjax.training.loop import Stopped

  with process.interrupts() as asked:
    try:
      for table in wanted:
        rows = cells.compute(table.cells, table.file, asked)
        report.write(table.module.table(rows), FORMAT.value)
        if PICTURES.value and hasattr(table.module, "pictures"):
          folder = Path(PICTURES.value)
          folder.mkdir(parents=True, exist_ok=True)
          table.module.pictures(rows, folder)
    except process.Again:
      raise
    except (Stopped, KeyboardInterrupt):
      todo = left(wanted)
      told = f"{len(todo)} cells left, about {cells.hours(todo)} hours"
      raise Stopped(f"{told}; run the same command to go on") from None


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
