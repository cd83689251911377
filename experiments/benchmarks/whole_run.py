"""A whole run on a file of short lines against the same in Hugging Face PEFT.

  python -m experiments.benchmarks.whole_run --out=whole_run.jsonl

From starting the process to the test score: reading a CSV, tokenising, LoRA on query and value of
MiniLM (r = 8, batch 32), an evaluation after every epoch, the test split scored with the best.
Ours is `experiments.train` as users call it, with an empty compilation cache and with a filled one;
the peer pads each batch to its longest row. Needs `make parity`'s packages.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments import runtime
from experiments.benchmarks import report
from peftjax import data
from peftjax.data import samples

OUT = flags.DEFINE_string("out", None, "Append the rows to this file as JSON lines.")
LINES = flags.DEFINE_integer("lines", 6_000, "Lines of the sentiment corpus to train on.")
EPOCHS = flags.DEFINE_integer("epochs", 3, "Epochs.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    files = write_files(root, LINES.value)
    peer = seconds_of(
      "experiments.benchmarks.whole_run_peer", *peer_flags(files), root / "peer.json"
    )
    cold = seconds_of("experiments.train", *our_flags(files, root, "cold"))
    warm = seconds_of("experiments.train", *our_flags(files, root, "warm"))
    scores = [
      json.loads((root / "cold" / "result.json").read_text())["metrics"]["test"]["accuracy"],
      json.loads((root / "peer.json").read_text())["accuracy"],
    ]
  note = f"test accuracy {scores[0]:.3f} against {scores[1]:.3f}"
  rows = [
    report.Row("whole_run_short_lines_cold", cold, peer, "s", note),
    report.Row("whole_run_short_lines_warm", warm, peer, "s", note),
  ]
  report.end(f"{LINES.value:,} lines, {EPOCHS.value} epochs", rows, OUT.value)


def write_files(root: Path, lines: int) -> dict[str, str]:
  """Train, validation and test files of short lines, the same for both sides."""
  splits = data.load("sentiment", seed=0).splits
  files = {}
  for part, count in (("train", lines), ("validation", lines // 10), ("test", lines // 10)):
    files[part] = str(root / f"{part}.csv")
    order = np.random.default_rng(0).permutation(len(splits[part]))  # the corpus lies by class
    examples = splits[part].take(order[:count])
    with open(files[part], "w", newline="", encoding="utf-8") as file:
      writer = csv.writer(file)
      writer.writerow(["text", "label"])
      rows = zip(examples.texts, examples.labels.tolist(), strict=True)
      writer.writerows(rows)
  return files


def our_flags(files: dict[str, str], root: Path, name: str) -> list[str]:
  return [
    "--config=configs/classify.py:method=lora,data=files",
    *(f"--config.data.{part}_file={path}" for part, path in files.items()),
    f"--config.train.epochs={float(EPOCHS.value)}",
    "--config.method.dropout=0.0",
    f"--config.compilation_cache={root / 'cache'}",
    f"--workdir={root / name}",
  ]


def peer_flags(files: dict[str, str]) -> list[str]:
  return [
    str(samples.model("minilm")),
    files["train"],
    files["validation"],
    files["test"],
    str(EPOCHS.value),
  ]


def seconds_of(module: str, *arguments: object) -> float:
  begun = time.perf_counter()
  subprocess.run(
    [sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=sys.stderr
  )
  return time.perf_counter() - begun


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
