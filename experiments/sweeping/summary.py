"""The state of a sweep: rows of results, and a table of all trials."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from rich.table import Table

from experiments import plots
from experiments.sweeping import fields
from experiments.sweeping.folder import Folder
from peftjax.training.logs import write_atomic

_KEPT = (
  *(
    "method",
    "seed",
    "before",
    "metrics",
    "trainable_params",
    "total_params",
    "ranks",
    "best_step",
  ),
  *("best_step", "steps", "seconds", "together", "device", "commit", "config"),
)
_STYLES = {"done": "green", "failed": "red", "running": "bold"}
Listed = Mapping[str, Mapping[str, Any]]


def rows(folder: Folder, listed: Listed) -> list[dict[str, Any]]:
  """One row per finished trial: id, overrides, and the fields of its result."""
  made = []
  for name, entry in listed.items():
    if result := folder.result(name):
      kept = {key: result[key] for key in _KEPT if key in result}
      made.append({"id": name, "overrides": entry["overrides"], **kept})
  return made


def write(folder: Folder) -> list[str]:
  """Writes `summary.jsonl` and, where there is something to draw, pictures; returns their names."""
  with folder.guard():
    done = rows(folder, folder.listed())  # with trials that others have listed since
    write_atomic(folder.root / "summary.jsonl", "".join(json.dumps(row) + "\n" for row in done))
    written = ["summary.jsonl"]
    if done:
      plots.pareto(done, folder.root / "pareto.png")
      written.append("pareto.png")
    if any("ranks" in row for row in done):
      plots.ranks(done, folder.root / "ranks.png")
      written.append("ranks.png")
  return written


def states(folder: Folder, listed: Listed, mine: Collection[str] = ()) -> dict[str, dict[str, Any]]:
  """The state of every trial: its "status" and, if it is done, "metric", "value" (on
  test), "validation", "trained" and "seconds"; if it has failed, type and message of the error as
  "metric" and "value".
  """
  made: dict[str, dict[str, Any]] = {}
  for name in listed:
    if result := folder.result(name):
      metric, value = plots.metric(result)
      made[name] = {"status": "done", "metric": metric, "value": f"{value:.4f}"}
      made[name]["validation"] = f"{plots.metric(result, 'validation')[1]:.4f}"
      made[name]["trained"] = f"{result['trainable_params']:,}"
      made[name]["seconds"] = f"{result['seconds']:.0f}"
    elif error := folder.error(name):
      message = (error["message"].splitlines() or [""])[0]
      made[name] = {"status": "failed", "metric": error["type"], "value": message}
    elif name in mine:
      made[name] = {"status": "running"}
    else:
      made[name] = {"status": "running elsewhere" if folder.running(name) else "waiting"}
  return made


def counts(states: Mapping[str, Mapping[str, Any]]) -> str:
  """The counts by status, as `3 done, 1 running, 8 waiting`."""
  kinds = ("done", "failed", "running", "running elsewhere", "waiting")
  found = [(sum(x["status"] == kind for x in states.values()), kind) for kind in kinds]
  return ", ".join(f"{number} {kind}" for number, kind in found if number)


def table(
  listed: Listed, states: Mapping[str, Mapping[str, Any]], height: int | None = None
) -> Table:
  """A table with one line per trial; if more than `height`, those about the running one."""
  names = list(states)
  shown = names
  if height is not None and len(names) > height:
    kinds = ("running", "running elsewhere")
    at = next((i for x in kinds for i, n in enumerate(names) if states[n]["status"] == x), 0)
    first = min(max(at - height // 2, 0), len(names) - height)
    shown = names[first : first + height]
  flat = {
    name: {"base": entry["overrides"].get("base"), **fields.flat(entry["config"])}
    for name, entry in listed.items()
  }
  # The id tells these already.
  apart = [x for x in fields.varying(flat.values()) if x in _swept(listed)]
  metrics = dict.fromkeys(x["metric"] for x in states.values() if x["status"] == "done")
  made = Table(title=f"{len(names)} trials: {counts(states)}")
  made.add_column("trial", no_wrap=True)
  if apart:
    made.add_column("swept")
  made.add_column("status", no_wrap=True)
  for title in ("validation", f"test {', '.join(metrics)}", "trained", "seconds"):
    made.add_column(title, justify="right", min_width=max(map(len, title.split())))
  for name in shown:
    state = states[name]
    swept = [fields.label(flat[name], apart)] if apart else []
    score = state.get("value", "") if state["status"] == "done" else state.get("metric", "")
    if state["status"] == "done" and len(metrics) > 1:
      score = f"{state['metric']} {score}"
    cells = (
      state.get("validation", ""),
      score,
      state.get("trained", ""),
      state.get("seconds", ""),
    )
    made.add_row(name, *swept, state["status"], *cells, style=_STYLES.get(state["status"]))
  return made


def _swept(listed: Listed) -> set[str]:
  told = {"seed", "method.rank"}
  return {path for entry in listed.values() for path in entry["overrides"]} - told
