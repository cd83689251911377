"""Rows of a benchmark: a table for people, JSON lines for `--out`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftjax.training import process, workdir

COLUMNS = ("case", "ours", "peer", "unit", "ratio", "note")
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Row:
  """One comparison: `ratio` is the peer's cost over ours, above 1 we are ahead.

  Where only our side ran, `peer` and `ratio` are None.
  """

  case: str
  ours: float
  peer: float | None
  unit: str
  note: str = ""

  @classmethod
  def of(cls, case: str, costs: Sequence[float], unit: str, note: str = "") -> Row:
    """Our cost and, if both sides ran, the peer's."""
    return cls(case, costs[0], costs[1] if len(costs) > 1 else None, unit, note)

  @property
  def ratio(self) -> float | None:
    return None if self.peer is None else self.peer / self.ours


@functools.cache
def gpu() -> str | None:
  """The name of the NVIDIA GPU that JAX runs on, if any.

  Another process asks, for JAX keeps some of a GPU's memory as soon as it sees it.
  """
  if not shutil.which("nvidia-smi"):
    return None
  ask = "import jax; print(jax.devices('cuda')[0].device_kind)"
  asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
  return asked.stdout.strip() or None


def machine() -> str:
  """The processor, the cores this process may use, and the accelerator if there is one."""
  name = platform.processor() or platform.machine()
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    pass
  cores = f"{name}, {len(os.sched_getaffinity(0))} cores"
  return f"{cores}, {gpu()}" if gpu() else cores


def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def origin(module: str) -> dict[str, Any]:
  """The origin of the rows that a module of experiments writes."""
  command = shlex.join(["python", "-m", f"experiments.{module}", *sys.argv[1:]])
  if flags := os.environ.get("XLA_FLAGS"):
    command = f"XLA_FLAGS={shlex.quote(flags)} {command}"
  return {
    "command": command,
    "commit": process.commit(),
    "machine": machine(),
    "versions": versions(),
  }


def show(title: str, rows: list[Row]) -> None:
  table = Table(title=title)
  for column in COLUMNS:
    table.add_column(column, justify="right" if column in ("ours", "peer", "ratio") else "left")
  for row in rows:
    numbers = (_cost(row.ours), _cost(row.peer), row.unit, _ratio(row.ratio))
    table.add_row(row.case, *numbers, row.note)
  console = Console()
  console.print(table)
  console.print("ratio: the peer's cost over ours; above 1 we are ahead.", highlight=False)


def end(title: str, rows: list[Row], out: str | None) -> None:
  """Shows the rows and, if a file is named, adds them to it."""
  show(f"{title}, {machine()}", rows)
  if out:
    write(out, rows)


def write(path: str, rows: list[Row]) -> None:
  """Appends one JSON line per row, making the folder if need be."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  common = {**origin(f"benchmarks.{Path(sys.argv[0]).stem}"), "seed": 0}
  with open(path, "a", encoding="utf-8") as file:
    for row in rows:
      fields = {**dataclasses.asdict(row), "ratio": row.ratio, **common}
      file.write(json.dumps(fields) + "\n")


def markdown(path: str) -> str:
  """The rows of a results file as Markdown tables, one per machine and command."""
  rows = [row for _, row in workdir.rows(Path(path))]
  lines: list[str] = []
  for made, own in itertools.groupby(rows, lambda row: f"{row['machine']}, `{row['command']}`:"):
    lines += ["", made, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in own:
      costs = (_cost(row["ours"]), _cost(row["peer"]), row["unit"], _ratio(row["ratio"]))
      lines.append(f"| {' | '.join((row['case'], *costs, row['note']))} |")
  return "\n".join(lines[1:])


def _cost(value: float | None) -> str:
  if value is None:
    return ""
  return f"{value:.1f}" if value >= 1 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
  print(markdown(sys.argv[1]))
