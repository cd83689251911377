"""Fields of configs by dotted path: those that count, that differ, that have to agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from peftjax.io.records import clip
from peftjax.training import resume

_WORDS = {"data.name": "dataset:"}  # where the last part of a path says too little
# Fields that a sweep compares. Trials that differ in anything else answer different questions.
_COMPARED = ("method.", "optimizer.")


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields that can change a result, by dotted path."""
  fields = resume.flat(dict(config))
  return {path: value for path, value in fields.items() if path not in resume.FREE}


def varying(configs: Iterable[Mapping[str, Any]]) -> list[str]:
  """The paths at which flat configs differ; a path that a config does not have counts as None."""
  found: dict[str, set[str]] = {}
  configs = list(configs)
  for path in dict.fromkeys(path for config in configs for path in config):
    found[path] = {json.dumps(config.get(path)) for config in configs}
  return [path for path, values in found.items() if len(values) > 1]


def question(config: Mapping[str, Any]) -> dict[str, Any]:
  """The part of a flat config that all runs must share whose metrics are compared."""
  return {
    path: value
    for path, value in config.items()
    if path != "seed" and not path.startswith(_COMPARED)
  }


def label(config: Mapping[str, Any], paths: Iterable[str]) -> str:
  """Some fields for people: `target rank 4, gamma 0.1`; for a base its argument."""
  word = lambda path: _WORDS.get(path, path.rpartition(".")[2].replace("_", " "))
  given = [(word(path), config[path]) for path in paths if path in config]
  shown = (
    x.partition(":")[2] if name == "base" else f"{name} {clip(x, 80, quote=False)}"
    for name, x in given
  )
  return ", ".join(filter(None, shown))
