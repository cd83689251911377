"""The model of a finished run, whatever its task."""

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
    base: the directory or file of the pretrained model.
    model, params: with the best checkpoint's adapter.
    mask: true on the trained arrays.
    labels: names of a classifier's outputs.
    rslora: True if its scales are α/√r.
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
    ValueError: `workdir` holds no evaluated run, or the pretrained model has changed since.
  """
  with mirror.read(workdir) as folder:
    if not (folder / "config.json").is_file():
      raise ValueError(
        f"{workdir} holds no run of experiments.train; name one, or write --base=DIR"
      )
    settings = workdirs.settings(folder)
  if settings.model.factory:
    raise ValueError(
      f"{workdir} has the model of {settings.model.factory}, and other formats are of families "
      "that this library knows; its adapter is in checkpoints/best"
    )
  made = Writer(workdir) if settings.task in ("causal_lm", "seq2seq") else Predictor(workdir)
  return Finished(
    settings.model.path(),
    made.model,
    made.params,
    made.mask,
    getattr(made, "labels", None) or None,
    bool(settings.method.get("rslora")),
  )
