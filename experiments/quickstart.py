"""Fine-tunes MiniLM on BBC news by LoRA, head only and in full, and compares them.

  python -m experiments.quickstart

First 64 tokens of 2,225 articles, 5 classes, 3 epochs each; six minutes on two CPU cores.
Writes runs/quickstart/summary.json and learning_curves.png; a second run only prints.
"""

import time

STARTED = time.perf_counter()

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import runtime

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for the three runs.")
METHODS = ("lora", "head", "full")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  from configs.classify import get_config

  configs = {name: get_config(f"method={name},data=bbc") for name in METHODS}
  runtime.set_up(configs["lora"].compilation_cache)
  from peftjax.training import build
  from peftjax.training.logs import write_atomic
  from peftjax.training.loop import train_and_evaluate

  workdir = build.resolve(WORKDIR.value)
  rows: list[dict[str, Any]] = []
  for name, config in configs.items():
    print(f"\n== {name}")
    result = train_and_evaluate(config, workdir / name, started=STARTED if not rows else None)
    rows.append(summary_row(name, result))
  write_atomic(workdir / "summary.json", json.dumps({"rows": rows}, indent=2) + "\n")
  plot(workdir)
  show(rows, workdir)


def summary_row(name: str, result: dict[str, Any]) -> dict[str, Any]:
  return {
    "method": name,
    "trainable_params": result["trainable_params"],
    "total_params": result["total_params"],
    **{key: result["metrics"]["test"][key] for key in ("accuracy", "macro_f1")},
    "seconds": round(result["seconds"], 1),
  }


def show(rows: list[dict[str, Any]], workdir: Path) -> None:
  from rich.console import Console
  from rich.table import Table

  table = Table(title="MiniLM on BBC news, test split")
  for column in ("method", "trained", "share", "accuracy", "macro F1", "seconds"):
    table.add_column(column, justify="left" if column == "method" else "right")
  for row in rows:
    share = 100 * row["trainable_params"] / row["total_params"]
    scores = [f"{row[key]:.4f}" for key in ("accuracy", "macro_f1")]
    table.add_row(
      row["method"],
      f"{row['trainable_params']:,}",
      f"{share:.2f} %",
      *scores,
      f"{row['seconds']:.0f}",
    )
  console = Console()
  console.print()
  console.print(table)
  print(f"\nNumbers: {workdir}/summary.json   Curves: {workdir}/learning_curves.png\n")
  print("Label a text of your own with the LoRA adapter:")
  print(
    f"  .venv/bin/python -m experiments.predict --workdir={workdir}/lora "
    '--text="The striker scored twice in the final"'
  )


def plot(workdir: Path) -> None:
  """Draws training loss and validation accuracy by step, one line per method."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  from peftjax.training.workdir import metrics

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  for name in METHODS:
    rows = metrics(workdir / name / "metrics.jsonl")
    for axis, key in ((left, "loss"), (right, "validation_accuracy")):
      points = [(row["step"], row[key]) for row in rows if key in row]
      axis.plot(*zip(*points, strict=True), marker="o" if axis is right else None, label=name)
  left.set(xlabel="step", ylabel="training loss", yscale="log")
  right.set(xlabel="step", ylabel="validation accuracy")
  right.legend()
  figure.savefig(workdir / "learning_curves.png", dpi=120)
  plt.close(figure)


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
