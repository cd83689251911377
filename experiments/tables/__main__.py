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

Rows come from experiments/results/tables (--results). Runs that are missing there are trained as a
sweep in --workdir, so a killed run goes on where it was, and the same command in another terminal
takes other runs; other cells are computed one by one. Take lines out to compute them again.

  python -m experiments.tables lora_2 --paper_scale --dry_run

With --paper_scale a table is a paper's own: its models, data, settings and seeds, from
configs/paper (experiments/tables/paper.py has the names). --dry_run prints the command of every
run; without it they are made as a sweep in --workdir, from models below --models and data below
--data.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import runtime

RESULTS = flags.DEFINE_string("results", "experiments/results/tables", "Folder of the results.")
WORKDIR = flags.DEFINE_string("workdir", "runs/tables", "Folder for runs that tables need.")
FORMAT = flags.DEFINE_enum(
  "format", "terminal", ("terminal", "markdown", "latex", "csv"), "Format of the table."
)
PICTURES = flags.DEFINE_string(
  "pictures", None, "Draw the pictures of methods and rank_budget into this folder too."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the rest to compute.")
PAPER = flags.DEFINE_bool("paper_scale", False, "The table at the paper's own size.")
MODELS = flags.DEFINE_string("models", "models", "Folder of the models of --paper_scale.")
DATA = flags.DEFINE_string("data", "data", "Folder of the data of --paper_scale.")
NAMES = (
  *("methods", "rank_budget", "adalora_ablation", "which_matrices", "rank", "ffn"),
  *("parameters", "datatypes", "qlora_vs_lora"),
)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  if PAPER.value:
    return at_paper_scale(argv)
  if len(argv) != 2 or argv[1] not in (*NAMES, "all"):
    raise app.UsageError(f"name one table: {', '.join(NAMES)}, all")
  from experiments.tables import report
  from peftjax.training import build

  runtime.set_up("~/.cache/peftjax")
  for name in NAMES if argv[1] == "all" else argv[1:]:
    module = of(name)
    file, folder = Path(RESULTS.value) / f"{module.RESULTS}.jsonl", build.resolve(WORKDIR.value)
    if DRY_RUN.value:
      print(f"{name}:")
      show_left(module, file, folder / module.RESULTS)
      continue
    made = rows(module, file, folder / module.RESULTS)
    report.write(module.table(made), FORMAT.value)
    if PICTURES.value and hasattr(module, "pictures"):
      Path(PICTURES.value).mkdir(parents=True, exist_ok=True)
      module.pictures(made, Path(PICTURES.value))


def at_paper_scale(argv: list[str]) -> None:
  """Prints the commands of a paper's table, or runs them as a sweep."""
  from experiments.tables import paper, runs
  from peftjax.training import build

  if len(argv) != 2 or argv[1] not in paper.TABLES:
    raise app.UsageError(f"name one table: {', '.join(paper.TABLES)}")
  name, *folders = argv[1], Path(MODELS.value), Path(DATA.value)
  if DRY_RUN.value:
    for i, run in enumerate(paper.runs(name, *folders)):
      print(paper.command(run, Path(WORKDIR.value) / name / f"{i:03d}"))
    return
  runtime.set_up("~/.cache/peftjax")
  folder = build.resolve(WORKDIR.value) / name
  for row in runs.rows(paper.sweep(name, *folders), folder / "rows.jsonl", folder):
    print(row["overrides"]["base"], f"seed {row['config']['seed']}", json.dumps(row["metrics"]))
  print(f"\nAll of it: {folder}/rows.jsonl")


def of(name: str) -> Any:
  """The module of a table: `RESULTS`, the name of its file; a sweep or cells; and `table`."""
  return importlib.import_module(f"experiments.tables.{name}")


def show_left(module: Any, file: Path, folder: Path) -> None:
  """Prints the runs or cells that the file lacks."""
  from experiments.sweeping import driver
  from experiments.tables import cells, runs

  if hasattr(module, "get_config"):
    if plan := runs.left(module.get_config(), file, folder):
      driver.show_left(plan)
    else:
      print("0 trials left")
    return
  missing = cells.left(module.cells(folder), file)
  for cell in missing:
    print(f"  {cell.name}")
  print(f"{len(missing)} cells left")


def rows(module: Any, file: Path, folder: Path) -> list[dict[str, Any]]:
  """The table's rows, in its order; missing ones are computed and added to the file."""
  from experiments.tables import cells, runs

  if hasattr(module, "get_config"):
    return runs.rows(module.get_config(), file, folder)
  return cells.compute(module.cells(folder), file)


if __name__ == "__main__":
  app.run(main, flags_parser=functools.partial(runtime.parse_flags, names=True))
