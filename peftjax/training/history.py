"""`History`: the numbers of a run, which draw themselves."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

# Beginning of the names of held-out scores.
_HELD_OUT = "validation_"


@dataclasses.dataclass(frozen=True, eq=False)
class History:
  """The measurements of a run, in the order of its steps.

  A notebook shows it as the curves of `plot`.

  Attributes:
    rows: per step "step", "loss", "grad_norm" and "learning_rate"; after every epoch, if there
      are held-out data, "step", "epoch" and "validation_..." for each of their scores.
    best_step: the step whose parameters `fit` returned.
  """

  rows: tuple[Mapping[str, Any], ...]
  best_step: int

  def series(self, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number, such as "loss" or "validation_accuracy".

    Raises:
      ValueError: no row has it.
    """
    found = [(row["step"], row[name]) for row in self.rows if name in row]
    if not found:
      known = dict.fromkeys(key for row in self.rows for key in row if key != "step")
      raise ValueError(f"no row has {name!r}; there are: {', '.join(known)}")
    return [step for step, _ in found], [value for _, value in found]

  @property
  def scores(self) -> dict[str, float]:
    """The scores of held-out data with the parameters of `best_step`; empty without such data."""
    held_out = lambda row: {k: x for k, x in row.items() if k.startswith(_HELD_OUT)}
    found = [held_out(row) for row in self.rows if row["step"] == self.best_step]
    return {key.removeprefix(_HELD_OUT): x for scores in found for key, x in scores.items()}

  def plot(self) -> Any:
    """The loss and every score of held-out data by step: a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure  # takes half a second to import; belongs to no window

    losses, scores = self._names()
    figure = Figure(figsize=(4.2 * (1 + len(scores)), 2.8), layout="constrained")
    panels = figure.subplots(1, 1 + len(scores), squeeze=False)[0]
    for axes, names in zip(panels, (losses, *((name,) for name in scores)), strict=True):
      for name in names:
        steps, values = self.series(name)
        axes.plot(steps, values, marker="" if name == "loss" else "o", label=name)
      axes.set_xlabel("step")
      axes.set_title(names[0].removeprefix(_HELD_OUT).replace("_", " "), fontsize="medium")
      axes.grid(alpha=0.3)
      if len(names) > 1:
        axes.legend()
    return figure

  def _names(self) -> tuple[tuple[str, ...], list[str]]:
    """The losses, for one panel, and the other scores, for one each."""
    found = dict.fromkeys(k for row in self.rows for k in row if k.startswith(_HELD_OUT))
    losses = ("loss", *(name for name in found if name == f"{_HELD_OUT}loss"))
    return losses, [name for name in found if name not in losses]

  def _repr_png_(self) -> bytes:
    """The plot, as a notebook shows it."""
    file = io.BytesIO()
    self.plot().savefig(file, format="png", dpi=100)
    return file.getvalue()

  def __repr__(self) -> str:
    losses = self.series("loss")[1]
    shown = "".join(f", {name} {x:.4f}" for name, x in self.scores.items())
    kept = f"; step {self.best_step}{shown}" if shown else ""
    return f"<{len(losses)} steps: loss {losses[0]:.4f} to {losses[-1]:.4f}{kept}>"
