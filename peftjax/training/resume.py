"""Checks of what a workdir already holds, and whether this run may go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftjax.io import records
from peftjax.training import workdir
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.mirror import Here
from peftjax.training.run import Run
from peftjax.training.workdir import Meta

# Settings that may change between a run and its continuation: they change no number.
FREE = ("compilation_cache", "train.log_every", "train.save_every", "train.eval_batch_size")


def latest_meta(folder: Path) -> Meta | None:
  """The record of the latest checkpoint in the workdir, without creating anything.

  Raises:
    ValueError: the files are damaged, or not whole: without the config, the best checkpoint or
      the rows of metrics.
  """
  workdir.check_checkpoints(folder / "checkpoints")
  if workdir.newest(folder / "checkpoints") is None:
    return None
  checkpoints = Checkpoints(folder / "checkpoints", read_only=True, alone=True)
  try:
    found = checkpoints.meta("latest")
    step, best = (checkpoints.step(name) for name in workdir.CHECKPOINTS)
  finally:
    checkpoints.close()
  if found is None or step is None:
    return None
  meta = Meta.of(found, folder / "checkpoints" / "latest" / str(step))
  if not (folder / "config.json").exists():
    workdir.settings(folder)  # says so
  if meta.best and (best is None or best < meta.best.step):
    raise ValueError(
      f"{folder / 'checkpoints' / 'best'} has {'no checkpoint' if best is None else f'step {best}'}"
      f", but the latest one names step {meta.best.step} as the best. Put it back from a copy, or"
      " start anew in another --workdir."
    )
  workdir.check_log(folder / "metrics.jsonl", meta.log, step)
  return meta


def restore(run: Run, place: Here) -> None:
  """Puts the run at the state of its latest checkpoint.

  Raises:
    ValueError: its arrays are damaged, do not fit the run, or are those of another step.
  """
  checkpoints = place.checkpoints(read_only=True)
  try:
    run.restore(checkpoints)
    step = checkpoints.step("latest")
  finally:
    checkpoints.close()
  if run.steps_done != step:
    where = place.folder / "checkpoints" / "latest" / str(step)
    raise ValueError(
      f"{where} holds step {run.steps_done}. Give it its own name again, or give another --workdir."
    )


def finished(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
  """The result in the workdir for this config, None if it has none yet.

  Raises:
    ValueError: its config or its result is of another config, or damaged.
  """
  check_config(folder / "config.json", config)
  result = workdir.result(folder / "result.json")
  if result is not None:
    _check_same(folder, result["config"], config)
  return result


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(config, dict):
    return {prefix[:-1]: config}
  return {k: v for key, sub in config.items() for k, v in flat(sub, f"{prefix}{key}.").items()}


def check_config(path: Path, config: dict[str, Any]) -> None:
  old = workdir.config(path)
  if old is not None:
    _check_same(path.parent, old, config)


def check_inputs(folder: Path, saved: Meta | None, now: dict[str, Any]) -> None:
  if saved is None:
    return
  for name, what in (("base", "another pretrained model"), ("data", "other data")):
    there = getattr(saved, name)
    if there != now[name]:
      raise ValueError(
        f"{folder} was trained on {what}: digest {there[:12]} there, {now[name][:12]} now. "
        "Put the same files back to go on with it, or give another --workdir."
      )


def _check_same(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
  old, new = flat(there), flat(now)
  differ = [k for k in sorted({*old, *new} - {*FREE}) if old.get(k) != new.get(k)]
  if differ:
    rows = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differ)
    raise ValueError(
      f"{folder} holds a run of another config:\n{records.clip(rows, 2000, quote=False)}\n"
      "Give the same values to go on with it, or another --workdir."
    )
