"""A finished run's model, of whatever task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from peftjax.training import mirror
from peftjax.training import workdir as workdirs
from peftjax.training.predict import Predictor
from peftjax.training.writer import Writer


class Finished(NamedTuple):
  """A trained model.

  Attributes:
    base: the directory or file of the pretrained one.
    model, params: with the best checkpoint's adapter.
    mask: true on what was trained.
    labels: names of a classifier's outputs.
    rslora: whether its scales are α/√r.
  """

  base: Path
  model: Any
  params: Any
  mask: Any
  labels: list[str] | None
  rslora: bool


def load(workdir: str | Path) -> Finished:
  """The best checkpoint of a run.

  Raises:
    ValueError: `workdir` holds no evaluated run, or the pretrained model is another now.
  """
  with mirror.read(workdir) as folder:
    if not (folder / "config.json").is_file():
      raise ValueError(
        f"{workdir} holds no run of experiments.train; name one, or write --base=DIR"
      )
    settings = workdirs.settings(folder)
  made = Predictor(workdir) if settings.task == "classify" else Writer(workdir)
  return Finished(
    settings.model.path(),
    made.model,
    made.params,
    made.mask,
    getattr(made, "labels", None) or None,
    bool(settings.method.get("rslora")),
  )
