"""A table of plans, and a picture of how the peak of a step grows.

  python -m experiments.planning.report

The picture shows those plans of experiments/results/plans/plan.jsonl that differ in one thing
alone: the model, the rank, the length of a row or the devices.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import runtime
from experiments.planning.chips import GIB

RESULTS = Path(__file__).parents[1] / "results" / "plans"
PLANS = flags.DEFINE_string("plans", str(RESULTS / "plan.jsonl"), "A file written by --out.")
PICTURE = flags.DEFINE_string("picture", str(RESULTS / "plan_growth.png"), "The picture to draw.")

# Quantities that vary: name, number in a row, and the flags that say it.
_AXES: dict[str, tuple[str, Callable[[Mapping[str, Any]], float], tuple[str, ...]]] = {
  "model": ("parameters in billions", lambda row: row["total_params"] / 1e9, ("--model",)),
  "rank": ("rank", lambda row: row["rank"] or 0, ("--config.method.rank",)),
  "length": ("tokens per row", lambda row: row["length"], ("--config.data.max_length",)),
  "devices": (
    "devices, fsdp",
    lambda row: row["devices"],
    ("--devices", "--mesh", "--topology"),
  ),
}


def series(rows: list[Mapping[str, Any]], axis: str) -> list[tuple[float, float]]:
  """(quantity, GiB at the peak) for the largest group of plans alike but for it, in order."""
  _, number, said = _AXES[axis]
  groups: dict[tuple[str, ...], dict[float, float]] = {}
  for row in rows:
    given = row["command"].split()
    alike = [part for part in given if part.partition("=")[0] not in (*said, "--out")]
    groups.setdefault(tuple(sorted(alike)), {})[number(row)] = row["bytes"]["peak"] / GIB
  return sorted(max(groups.values(), key=len).items())


def table(rows: list[Mapping[str, Any]]) -> str:
  """The plans in Markdown, one line per plan."""
  lines = [
    "| flags | devices | rows x tokens | GiB at the peak | s per step, at best |",
    "|---|---|---|---|---|",
  ]
  for row in rows:
    given = re.sub(r"^.*causal_lm\.py:", "", row["command"])
    dropped = r"--(config\.data\.max_length|config\.train\.batch_size|topology|devices|out)=\S+"
    given = re.sub(dropped, "", given).replace("--config.", "").replace("--", "")
    last = {part.partition("=")[0]: part for part in given.split()}  # for a flag given twice
    told = " ".join(last.values())
    devices = f"{row['devices']} x {row['chip'].removeprefix('TPU ')}"
    peak, seconds = row["bytes"]["peak"] / GIB, row["step_seconds"]
    shape = f"{row['rows']} x {row['length']}"
    lines.append(f"| {told} | {devices} | {shape} | {peak:.2f} | {seconds:.3f} |")
  return "\n".join(lines)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  from matplotlib.figure import Figure

  lines = Path(PLANS.value).read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  print(table(rows))
  figure = Figure(figsize=(10, 3), layout="constrained")
  panels = figure.subplots(1, len(_AXES))
  for panel, (axis, (label, *_)) in zip(panels, _AXES.items(), strict=True):
    found = series(rows, axis)
    panel.plot(*zip(*found, strict=True), "o-")
    panel.set_xlabel(label)
    panel.set_ylim(bottom=0)
    print(label, ", ".join(f"{x:g}: {y:.2f} GiB" for x, y in found))
  panels[0].set_ylabel("GiB at the peak, on a device")
  figure.savefig(PICTURE.value, dpi=120)
  print(PICTURE.value)


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)
