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

What is in experiments/results (--results) is shown from there; cells that are missing
are computed and added one by one, so a killed run goes on where it was, and the same command in
another terminal takes other cells. Take lines out to compute them again.
"""

from pathlib import Path

from absl import app, flags

from experiments import runtime
from experiments.tables import report

RESULTS = flags.DEFINE_string("results", "experiments/results", "Folder of the results.")
WORKDIR = flags.DEFINE_string("workdir", "runs/tables", "Folder for runs that cells need.")
FORMAT = flags.DEFINE_enum("format", "terminal", report.FORMATS, "How the table is written.")
PICTURES = flags.DEFINE_string(
  "pictures", None, "Draw the pictures of methods and rank_budget into this folder too."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what is left to compute, and how long.")


def main(argv: list[str]) -> None:
  from experiments.tables import (
    adalora_ablation,
    cells,
    datatypes,
    ffn,
    methods,
    parameters,
    qlora_vs_lora,
    rank,
    rank_budget,
    which_matrices,
  )

  tables = {
    "methods": methods,
    "rank_budget": rank_budget,
    "adalora_ablation": adalora_ablation,
    "which_matrices": which_matrices,
    "rank": rank,
    "ffn": ffn,
    "parameters": parameters,
    "datatypes": datatypes,
    "qlora_vs_lora": qlora_vs_lora,
  }
  if len(argv) != 2 or argv[1] not in (*tables, "all"):
    raise app.UsageError(f"name one table: {', '.join(tables)}, all")
  runtime.set_up("~/.cache/peftjax")
  with runtime.readable_errors():
    for name in tables if argv[1] == "all" else argv[1:]:
      kept = getattr(tables[name], "RESULTS", name)
      results = Path(RESULTS.value) / f"{kept}.jsonl"
      todo = tables[name].cells(Path(WORKDIR.value) / kept)
      if DRY_RUN.value:
        cells.show_left(name, todo, results)
        continue
      rows = cells.compute(todo, results)
      report.write(tables[name].table(rows), FORMAT.value)
      if PICTURES.value and hasattr(tables[name], "pictures"):
        folder = Path(PICTURES.value)
        folder.mkdir(parents=True, exist_ok=True)
        tables[name].pictures(rows, folder)


if __name__ == "__main__":
  app.run(main)
