"""The trials of a sweep, from its config."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from ml_collections import ConfigDict
from msgspec import Meta

from experiments import runtime
from experiments.sweeping import fields
from peftjax.io import records
from peftjax.training import resume
from peftjax.training.settings import from_config

_KEYS = ("base", "grid", "trials", "together", "optuna")


@dataclasses.dataclass(frozen=True)
class Sections:
  """The sections of a sweep's file; see `experiments.sweep`."""

  base: str | list[str] = ""
  grid: dict[str, Any] = dataclasses.field(default_factory=dict)
  trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  together: Annotated[int, Meta(ge=1, le=4096)] = 1
  optuna: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    id: depends on `config` alone, so that one run has one id in every sweep.
    overrides: "base", and the value of every field that the sweep sets, by dotted path.
    config: the whole config of the run.
  """

  id: str
  overrides: Mapping[str, Any]
  config: ConfigDict


def expand(sweep: ConfigDict) -> list[Trial]:
  """The trials of a sweep: its bases x its listed trials x its grid, the seed varying slowest.

  Equal configs are one trial.

  Raises:
    ValueError: on a field that a base does not have, a value that does not fit its field, or a
      config that `peftjax.training.settings` refuses; before anything has run.
  """
  given = check(sweep)
  run_path = functools.cache(runpy.run_path)
  made = (make(entry, run_path) for entry in _product(given))
  trials = {trial.id: trial for trial in made}
  if not trials:
    raise ValueError("the sweep has no trial: give every field of its grid a value, and a base")
  return list(trials.values())


def make(
  overrides: Mapping[str, Any], run_path: Callable[[str], dict[str, Any]] = runpy.run_path
) -> Trial:
  """The trial of a base and values of its fields; raises ValueError as `expand` does."""
  return _trial(_load(overrides["base"], run_path), overrides)


def check(sweep: ConfigDict) -> dict[str, Any]:
  """The sections of a sweep, each of its type; ValueError if one is not, or is unknown."""
  given = sweep.to_dict()
  for key in given:
    if key not in _KEYS:
      near = difflib.get_close_matches(key, _KEYS, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ValueError(f"a sweep has no {key!r}{hint} It has: {', '.join(_KEYS)}")
  records.convert(given, Sections, "the sweep")
  return given


def trial_id(config: ConfigDict) -> str:
  """Method, rank, seed and a hash of every field that can change a result."""
  flat = fields.flat(json.loads(config.to_json()))
  digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:8]
  rank = f"-rank{config.method.rank}" if "rank" in config.method else ""
  return f"{config.method.name}{rank}-seed{config.seed}-{digest}"


def _product(given: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The overrides of every trial."""
  grid = resume.flat(given.get("grid", {}))
  for path, values in grid.items():
    if not isinstance(values, tuple | list):
      raise ValueError(f"grid: {path} is {values!r}; write its values as a tuple: ({values!r},)")
  bases = given.get("base", ())
  bases = (bases,) if isinstance(bases, str) else bases
  listed: list[dict[str, Any]] = []
  entries: Sequence[dict[str, Any]] = given.get("trials") or ({},)
  for entry in entries:
    own = resume.flat(entry)
    if "base" not in own and not bases:
      raise ValueError('the sweep has no base; write base="configs/classify.py:method=lora"')
    listed += [own] if "base" in own else [{"base": base, **own} for base in bases]
  paths = sorted(grid, key=lambda path: path != "seed")
  points = itertools.product(*(grid[path] for path in paths))
  made = []
  for point, entry in itertools.product(points, listed):
    if twice := set(entry) & set(paths):
      raise ValueError(f"{', '.join(sorted(twice))}: both in grid and in trials; leave one out")
    made.append({**entry, **dict(zip(paths, point, strict=True))})
  return made


def _load(base: str, run_path: Callable[[str], dict[str, Any]]) -> ConfigDict:
  """The config of `file.py:argument`; a new one each time, for a copy forgets the types of None."""
  path, _, argument = base.partition(":")
  try:
    return runtime.load_config(path, argument, run=run_path)
  except ValueError as error:
    raise ValueError(f"base {base!r}: {error}") from None


def _trial(config: ConfigDict, overrides: Mapping[str, Any]) -> Trial:
  base = overrides["base"]
  for path, value in overrides.items():
    if path == "base":
      continue
    runtime.check_field(config, path, here=base)
    try:
      config.update_from_flattened_dict({path: value})
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{base}: {path}={records.clip(value)} does not fit: "
        f"{records.clip(str(error), quote=False)}"
      ) from None
  try:
    from_config(config).build_method()
  except (ValueError, TypeError, AttributeError, KeyError) as error:
    told = fields.label(overrides, [path for path in overrides if path != "base"])
    raise ValueError(f"{base}, {told}: {error}") from None
  return Trial(trial_id(config), overrides, config)
