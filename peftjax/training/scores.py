"""`Scores`: the scores of a run on its held-out parts, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftjax.training.run import Run


class Scores:
  """The scores of a run on its held-out parts, and the step of the best.

  Attributes:
    untrained: the scores of each part that is also scored before training.
    best: "step", "value" and "metrics" of the best parameters so far; empty without any.
  """

  def __init__(
    self,
    run: Run,
    write: Callable[[dict[str, Any]], None],
    show: Callable[[str, Mapping[str, float]], None] = lambda *_: None,
    *,
    untrained: Mapping[str, Any] | None = None,
    best: Mapping[str, Any] | None = None,
  ):
    """Begins anew, or goes on.

    Args:
      run: the run whose current parameters are scored.
      write: takes a row of numbers.
      show: takes a name and its scores, for people.
      untrained, best: the attributes of a run that goes on.
    """
    self._run, self._write, self._show = run, write, show
    self.untrained, self.best = dict(untrained or {}), dict(best or {})

  def start(self) -> None:
    """Scores the parameters before the first step."""
    for part in self._run.task.before:
      self.untrained[part] = scores = self._run.evaluate(part)
      self._show(f"{part}, before", scores)
      self._write({"step": 0, **_named(part, scores)})

  def take(self, done: int) -> bool:
    """Scores the validation part after `done` steps; True if it is the best so far."""
    scores = self._run.evaluate("validation")
    epoch = done / self._run.stream.steps_per_epoch
    self._write({"step": done, "epoch": epoch, **_named("validation", scores)})
    self._show(f"epoch {epoch:.4g}", scores)
    value = self._run.task.criterion(scores)
    # Parameters that are larger than the method leaves them in the end are no candidates.
    if done < self._run.settled or self.best and value <= self.best["value"]:
      return False
    self.best = {"step": done, "value": value, "metrics": scores}
    return True


def _named(part: str, scores: Mapping[str, float]) -> dict[str, float]:
  return {f"{part}_{key}": value for key, value in scores.items()}
