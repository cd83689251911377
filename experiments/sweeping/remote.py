"""The work of a worker that an executor has started: the same as of one started by hand."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import runtime
from experiments.sweeping import plan
from experiments.sweeping.folder import Folder
from experiments.sweeping.view import View
from peftjax.training.loop import Stopped


@dataclasses.dataclass(frozen=True)
class Job:
  """A sweep's config, its folder, and the folder that relative paths are relative to."""

  sweep: dict[str, Any]
  root: str
  where: str


def work(job: Job) -> str:
  """Works until nothing is left; returns what stopped it, if something did. Its output is a log."""
  os.chdir(job.where)
  folder = Folder(Path(job.root))
  own = plan.of(ConfigDict(job.sweep), folder)
  runtime.set_up(own.config.get("compilation_cache"))
  try:
    with View(folder) as view:
      own.work(view)
  except (Stopped, KeyboardInterrupt) as stopped:
    return str(stopped) or "stopped"
  return ""
