"""Pictures of results: metric against trained parameters, and the ranks that AdaLoRA left.

Both take rows of `result.json` or of a sweep's `summary.jsonl`, and average over seeds.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.sweeping import fields

Row = Mapping[str, Any]
# Names of methods of configs/classify.py that train in place, by their targets.
_IN_PLACE = {".*": "full fine-tuning", "head/.*": "head only", ".*/bias, head/.*": "BitFit"}
DOWN = ("loss", "perplexity")  # metrics of which less is better


class Point(NamedTuple):
  """The runs of one config, over its seeds."""

  method: str
  parameters: int
  mean: float
  std: float


def metric(row: Row, split: str = "test") -> tuple[str, float]:
  """The metric that is compared: perplexity where there is one, else the first by name."""
  scores = row["metrics"][split]
  name = "perplexity" if "perplexity" in scores else min(scores)
  return name, scores[name]


def points(rows: Sequence[Row]) -> list[Point]:
  """Mean and standard deviation over the seeds of each config, by trained parameters."""
  made = []
  for _, runs in _by(rows, lambda flat: {k: v for k, v in flat.items() if k != "seed"}):
    values = [metric(run)[1] for run in runs]
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    size = runs[0]["trainable_params"]
    made.append(Point(_method(runs[0]), size, statistics.mean(values), std))
  return sorted(made, key=lambda point: point.parameters)


def front(points: Iterable[Point], less_is_better: bool) -> list[Point]:
  """The points that no other one with as few parameters or fewer beats, by parameters."""
  sign = -1 if less_is_better else 1
  best: list[Point] = []
  for point in sorted(points, key=lambda p: (p.parameters, -sign * p.mean)):
    if not best or sign * point.mean > sign * best[-1].mean:
      best.append(point)
  return best


def pareto(rows: Sequence[Row], path: Path) -> None:
  """Draws test metric against trained parameters with the Pareto front, one colour per method.

  Results of different questions (another data set, model or number of steps) get a panel each.
  """
  questions = _by(rows, fields.question)
  apart = fields.varying(question for question, _ in questions)
  plt = _pyplot()
  figure, axes = plt.subplots(
    1, len(questions), figsize=(1 + 5.5 * len(questions), 4.5), squeeze=False, layout="constrained"
  )
  methods = sorted({_method(row) for row in rows})
  for axis, (question, runs) in zip(axes[0], questions, strict=True):
    found, name = points(runs), metric(runs[0])[0]
    for number, method in enumerate(methods):
      own = [point for point in found if point.method == method]
      if own:
        _, sizes, means, stds = zip(*own, strict=True)
        look = dict(fmt="os^v"[number // 10 % 4], color=f"C{number % 10}")  # there are ten colours
        axis.errorbar(sizes, means, stds, capsize=3, label=method, **look)
    edge = front(found, name in DOWN)
    axis.plot(
      [*(p.parameters for p in edge), max(p.parameters for p in found)],
      [*(p.mean for p in edge), edge[-1].mean],
      drawstyle="steps-post",
      color="0.6",
      zorder=0,
      label="Pareto front",
    )
    axis.set(xscale="log", xlabel="trained parameters", ylabel=f"test {name.replace('_', ' ')}")
    axis.set_title(fields.label(question, apart), fontsize="small")
    axis.legend(fontsize="small")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def ranks(rows: Sequence[Row], path: Path) -> None:
  """Draws heat maps, layer x matrix, of the mean rank that AdaLoRA left, one panel per config.

  Raises:
    ValueError: if no row has ranks.
  """
  rows = [row for row in rows if row.get("ranks")]
  if not rows:
    raise ValueError("no row has ranks; they are in the results of method=adalora")
  configs = _by(rows, lambda flat: {k: v for k, v in flat.items() if k != "seed"})
  apart = fields.varying(config for config, _ in configs)
  grids = [_grid([run["ranks"] for run in runs]) for _, runs in configs]
  top = max(value for grid in grids for value in grid.values())
  plt = _pyplot()
  columns = min(len(grids), 2)
  lines = math.ceil(len(grids) / columns)
  shape = dict(figsize=(1 + 4 * columns, 1 + 3.2 * lines), squeeze=False, layout="constrained")
  figure, axes = plt.subplots(lines, columns, **shape)
  for axis in axes.flat[len(grids) :]:
    axis.set_visible(False)
  for axis, grid, (config, runs) in zip(axes.flat, grids, configs, strict=False):
    layers, matrices = (list(dict.fromkeys(key[i] for key in grid)) for i in (0, 1))
    layers.sort(key=lambda x: (len(x), x))
    values = [[grid.get((layer, m), math.nan) for m in matrices] for layer in layers]
    image = axis.imshow(values, vmin=0, vmax=top, aspect="auto", cmap="viridis", origin="lower")
    for y, line in enumerate(values):
      for x, value in enumerate(line):
        if not math.isnan(value):
          colour = "black" if value > top / 2 else "white"
          axis.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(matrices)), matrices, rotation=40, ha="right", fontsize=7)
    axis.set_yticks(range(len(layers)), layers)
    axis.set_ylabel("layer")
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    axis.set_title(", ".join(filter(None, (fields.label(config, apart), seeds))), fontsize="small")
  figure.colorbar(image, ax=axes, label="rank left")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _by(rows: Iterable[Row], part: Any) -> list[tuple[dict[str, Any], list[Row]]]:
  """Rows in groups that agree in a part of their flat configs, each with that part."""
  groups: dict[str, tuple[dict[str, Any], list[Row]]] = {}
  for row in rows:
    key = part(fields.flat(row["config"]))
    groups.setdefault(json.dumps(key, sort_keys=True), (key, []))[1].append(row)
  return list(groups.values())


def _method(row: Row) -> str:
  """The method's name; for adapters the placement's, for trained targets one that tells them."""
  method = row["config"]["method"]
  if method["name"] == "unfreeze":
    targets = ", ".join(method["targets"])
    return _IN_PLACE.get(targets, f"train {targets}")
  return (
    f"{method['placement'].replace('_', ' ')} adapters" if "placement" in method else method["name"]
  )


def _grid(runs: Sequence[Mapping[str, int]]) -> dict[tuple[str, str], float]:
  """The mean rank by layer and matrix; a matrix outside the layers is in layer "-"."""
  grid = {}
  for path in runs[0]:
    layer = re.search(r"(?:^|/)layers_(\d+)/", path)
    rest = (path[layer.end() :] if layer else path).removesuffix("/kernel")
    place = (layer[1] if layer else "-", rest)
    grid[place] = statistics.mean(run[path] for run in runs)
  return grid


def _pyplot() -> Any:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  return plt
