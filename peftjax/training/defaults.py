"""The config of a run, from the dataclasses that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from peftjax.methods.registry import METHODS
from peftjax.training.sections import section
from peftjax.training.settings import DATA, SECTIONS

# Methods of a config that only unfreeze: the regexes of the leaves they train.
MASKS: Mapping[str, tuple[str, ...]] = {
  "head": ("head/.*",),
  "full": (".*",),
  "bitfit": (".*/bias", "head/.*"),
}


def names() -> tuple[str, ...]:
  """Names of methods in a config, except `MASKS`."""
  return tuple(name for name in METHODS if name != "unfreeze")


def config(
  task: str, method: str, changes: Mapping[str, Any], head: bool, **sections: Mapping[str, Any]
) -> ConfigDict:
  """Every section with its defaults, and the changes to them.

  Args:
    task: a key of `settings.DATA`.
    method: one of `names()` or `MASKS`.
    changes: to the method's own defaults.
    head: train the task's head beside the method; a mask says itself which leaves it trains.
    **sections: changes to the others, by the names of `settings.SECTIONS`.
  """
  classes = {**SECTIONS, "data": DATA[task]}
  typed = {name: section(cls, **sections.get(name, {})) for name, cls in classes.items()}
  if method in MASKS:
    name, changes, head = "unfreeze", {"targets": MASKS[method]}, False
  else:
    name = method
  # The seed is the run's.
  own = dict(name=name, **section(METHODS[name], without=("seed",), **changes), head=head)
  return ConfigDict(
    dict(seed=0, task=task, **typed, method=own, rules=(), compilation_cache="~/.cache/peftjax")
  )
