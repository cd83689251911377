"""Outputs of a finished run: test scores, the adapter for PEFT, `result.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from peftjax import hf_peft
from peftjax.core.params import Params
from peftjax.io import disk
from peftjax.training import process
from peftjax.training.logs import Bar, write_json
from peftjax.training.peers import Peers
from peftjax.training.run import Run
from peftjax.training.scores import Scores


def finish(
  run: Run,
  params: Params,
  workdir: Path,
  bar: Bar,
  config: Mapping[str, Any],
  scores: Scores,
  peers: Peers,
  **measured: Any,
) -> dict[str, Any]:
  """Scores the best parameters, exports them and writes the result, which it returns.

  Args:
    run: its model, task and settings.
    params: the best parameters, in the shapes that the method attached them with.
    workdir: workdir of the run.
    bar: prints the scores.
    config: the config as JSON.
    scores: scores of the validation part, whose best are those of `params`, and before training.
    peers: processes of which the main one writes.
    **measured: seconds, and whatever else is to be written.
  """
  final = {part: run.evaluate(part, params) for part in run.task.final}
  for part, found in final.items():
    bar.scores(part, found)
  if peers.count > 1:
    params = run.on_host(params)

  def write() -> dict[str, Any]:
    export(run, params, workdir, bar)
    result = {
      "config": dict(config),
      "method": run.settings.method["name"],
      "trainable_params": run.trainable,
      "total_params": run.parameters,
      "metrics": {"validation": scores.best["metrics"], **final},
      **({"before": scores.untrained} if scores.untrained else {}),
      **run.method.summary(params),
      "best_step": scores.best["step"],
      "steps": run.total,
      **run.task.summary(),
      "seed": run.settings.seed,
      "commit": process.commit(),
      "device": jax.devices()[0].device_kind,
      **measured,
      "peak_memory_mb": process.peak_memory_mb(),
    }
    write_json(workdir / "result.json", result)
    return result

  return peers.told(write)


def export(run: Run, params: Params, workdir: Path, bar: Bar) -> None:
  """Writes the adapter for Hugging Face PEFT too, where that format can say it."""
  if not hf_peft.has_adapter(params):
    return
  base = str(run.settings.model.directory) or run.settings.model.path().parent.name
  try:
    with disk.told(workdir / "peft"):
      hf_peft.save(
        workdir / "peft",
        params,
        run.module,
        base_model=base,
        trained=run.mask,
        task_type=run.task.peft_type,
        **run.method.peft_options(),
      )
  except ValueError as error:
    bar.print(f"no Hugging Face PEFT directory: {error}")
