"""Makes a table of a paper again, at a scale that two CPU cores can do.

  python -m experiments.tables datatypes --dry_run
  python -m experiments.tables datatypes

datatypes: perplexity of SmolLM2 and accuracy of MiniLM with their linear layers in each data type,
  at each block size, beside QLoRA's table 2.
qlora_vs_lora: SmolLM2 fine-tuned whole, and by LoRA over a dense, int8, FP4 and NF4 base, beside
  QLoRA's table 3.

What is in experiments/results/NAME.jsonl (--results) is shown from there; cells that are missing
are computed and added one by one, so a killed run goes on where it was. Take lines out to compute
them again.
"""

from pathlib import Path

from absl import app, flags

from experiments import runtime

RESULTS = flags.DEFINE_string("results", "experiments/results", "Folder of the results.")
WORKDIR = flags.DEFINE_string("workdir", "runs/tables", "Folder for runs that cells need.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what is left to compute, and how long.")


def main(argv: list[str]) -> None:
  from experiments.tables import cells, datatypes, qlora_vs_lora

  tables = {"datatypes": datatypes, "qlora_vs_lora": qlora_vs_lora}
  if len(argv) != 2 or argv[1] not in tables:
    raise app.UsageError(f"name one table: {', '.join(tables)}")
  runtime.set_up("~/.cache/peftjax")
  name = argv[1]
  results = Path(RESULTS.value) / f"{name}.jsonl"
  with runtime.readable_errors():
    todo = tables[name].cells(Path(WORKDIR.value) / name)
    if DRY_RUN.value:
      cells.show_left(name, todo, results)
      return
    rows = cells.compute(todo, results)
  tables[name].show(rows)


if __name__ == "__main__":
  app.run(main)
