"""A finished run, read from its workdir."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from peftjax.core import tree
from peftjax.core.params import Mask, Params
from peftjax.methods.base import Method
from peftjax.training import build, mirror
from peftjax.training import factory as factories
from peftjax.training import workdir as workdirs
from peftjax.training.checkpoint import Checkpoints


class Finished(NamedTuple):
  """A trained model.

  Attributes:
    base: the directory or file of the pretrained model; for a factory's, that of its tokenizer.
    model, params: with the best checkpoint's adapter.
    mask: true on the trained arrays.
    method: the method that was trained.
    labels: names of a classifier's outputs; empty for a regression and a language model.
    settings: settings of the run; None for a model that no run trained.
  """

  base: Path
  model: Any
  params: Params
  mask: Mask
  method: Method
  labels: list[str]
  settings: Any = None


def load(
  workdir: str | Path,
  *tasks: str,
  factory: str | None = None,
  ours: str = "",
  adapted: bool = True,
) -> Finished:
  """The best checkpoint of a run.

  Args:
    workdir: a folder here or in a bucket.
    *tasks: the tasks that the run may have; if none is named, any.
    factory: for a run on a model by import path, that path again: its code is run (see
      `training.factory`).
    ours: if not empty, the reason why such a model is refused, whatever `factory` is.
    adapted: False for the model as it was before training.

  Raises:
    ValueError: `workdir` holds no evaluated run, or a damaged one, or one of another task, or one
      with the model of another factory than given, or the pretrained model has changed since.
  """
  with mirror.read(workdir) as folder:
    return _load(folder, tasks, factory, ours, adapted)


def _load(
  workdir: Path, tasks: tuple[str, ...], factory: str | None, ours: str, adapted: bool
) -> Finished:
  kind = f" of task={' or '.join(tasks)}" if tasks else ""
  config = f"configs/{(*tasks, 'classify')[0]}.py"
  untrained = ValueError(
    f"{workdir} holds no evaluated run{kind}; train first:\n  python -m experiments.train "
    f"--config={config} --workdir={workdir}"
  )
  folder = workdir / "checkpoints"
  workdirs.check_checkpoints(folder)
  if not (folder / "best").is_dir():
    raise untrained
  settings = workdirs.settings(workdir)
  if tasks and settings.task not in tasks:
    raise ValueError(
      f"{workdir} holds a run of task={settings.task}, and not{kind}. Label texts by python -m "
      "experiments.predict, and continue them by python -m experiments.generate"
    )
  model = settings.model
  if model.factory and ours:
    raise ValueError(f"{workdir} has the model of {model.factory}, {ours}")
  factories.check_trusted(model, factory, workdir)
  checkpoints = Checkpoints(folder, read_only=True)
  try:
    meta = checkpoints.meta("best")
    if meta is None:
      raise untrained
    known = workdirs.Meta.of(meta, folder / "best")
    workdirs.check_model(known, model, workdir)
    is_lm = build.TASKS[settings.task].LABELS_OF is None
    made = build.attached(settings, None if is_lm else len(known.labels) or 1)
    if made.base:
      workdirs.check_base(known, made.base, model.factory, workdir)
    adapter, rest = tree.partition(made.params, tree.adapter_mask(made.params, made.mask))
    if adapted:  # over what `attach` has just drawn, which changes nothing
      adapter = checkpoints.arrays("best", {"adapter": adapter})["adapter"]
  finally:
    checkpoints.close()
  params = tree.combine(adapter, rest)
  base = model.path()
  return Finished(base, made.module, params, made.mask, made.method, known.labels, settings)
