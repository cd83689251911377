"""Makes a table of a paper again, at a scale that two CPU cores can do.

  python -m experiments.tables datatypes --dry_run
  python -m experiments.tables datatypes

datatypes: perplexity of SmolLM2 and accuracy of MiniLM with their linear layers in each data type,
  at each block size, beside QLoRA's table 2.
qlora_vs_lora: SmolLM2 fine-tuned whole, and by LoRA over a dense, int8, FP4 and NF4 base, beside
  QLoRA's table 3.

A cell that has been computed is kept in --workdir: a killed run goes on where it was.
"""

from pathlib import Path

from absl import app, flags

from experiments import runtime

WORKDIR = flags.DEFINE_string("workdir", "runs/tables", "Folder for what is computed.")
OUT = flags.DEFINE_string("out", None, "Write the rows to this file as JSON lines.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what is left to compute, and how long.")


def main(argv: list[str]) -> None:
  from experiments.tables import cells, datatypes, qlora_vs_lora

  tables = {"datatypes": datatypes, "qlora_vs_lora": qlora_vs_lora}
  if len(argv) != 2 or argv[1] not in tables:
    raise app.UsageError(f"name one table: {', '.join(tables)}")
  runtime.set_up("~/.cache/peftjax")
  name = argv[1]
  folder = Path(WORKDIR.value) / name
  with runtime.readable_errors():
    todo = tables[name].cells(folder)
    if DRY_RUN.value:
      cells.show_left(name, todo, folder)
      return
    rows = cells.compute(todo, folder)
  tables[name].show(rows)
  if OUT.value:
    cells.write(OUT.value, rows)


if __name__ == "__main__":
  app.run(main)
