"""Flags and sweep files, against the ranges that the mathematics asks for."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import causal_lm, classify
from experiments.sweeping import trials
from peftjax.training.settings import from_config
from tests.fuzz import damage

_positive = lambda x: x > 0 and math.isfinite(x)
_rate = lambda x: 0 <= x < 1
# Ranges of numbers, by the end of a field's path.
RANGES = {
  **dict.fromkeys(("batch_size", "eval_batch_size", "accumulate", "log_every"), lambda x: x >= 1),
  **dict.fromkeys(("rank", "size", "length", "block_size", "interval"), lambda x: x >= 1),
  **dict.fromkeys(("save_every", "steps", "eval_rows", "train_examples"), lambda x: x >= 1),
  **dict.fromkeys(("b1", "b2", "dropout", "beta1", "beta2"), _rate),
  **dict.fromkeys(("eps", "clip_norm", "learning_rate"), _positive),
  **dict.fromkeys(("weight_decay", "warmup", "gamma"), lambda x: x >= 0 and math.isfinite(x)),
  **dict.fromkeys(("alpha", "b_rate", "epochs"), math.isfinite),
}
NUMBERS = (0, 1, -1, 3, 2.5, 0.0, 0.9, 1.0, 1e9, -1e-9, 1e308, 10**400, 2**63)
NUMBERS += (float("nan"), float("inf"), -float("inf"), True, "64")


class Flags:
  name, share = "flags", 6

  def prepare(self, folder: Path) -> None:
    flat = _flat(classify.get_config("method=lora").to_dict())
    (folder / "given.json").write_text(json.dumps(flat))

  def damage(self, rng: random.Random, folder: Path) -> None:
    lm = rng.random() < 0.5
    methods = causal_lm.METHODS if lm else ("lora", "adalora", "adapters", "ia3", "vera", "prefix")
    config = (causal_lm if lm else classify).get_config(f"method={rng.choice(list(methods))}")
    flat = _flat(config.to_dict())
    for _ in range(rng.choice((1, 1, 2))):
      flat[rng.choice(sorted(flat))] = rng.choice((rng.choice(NUMBERS), rng.choice(damage.VALUES)))
    (folder / "given.json").write_text(json.dumps(flat))

  def read(self, folder: Path) -> Any:
    settings = from_config(ConfigDict(_nested(json.loads((folder / "given.json").read_text()))))
    settings.build_method()
    settings.model.options()
    settings.quant.format()
    return settings

  def check(self, folder: Path, got: Any) -> str:
    for path, value in json.loads((folder / "given.json").read_text()).items():
      last = path.rpartition(".")[2]
      if last in RANGES and value is not None and value != []:
        if type(value) not in (int, float):
          return f"{path}={value!r} was accepted"
        if not RANGES[last](value):
          return f"{path}={value!r} was accepted"
    return ""


class Sweeps:
  name, share = "sweeps", 3
  _sweep = {
    "base": "configs/classify.py:method=lora,data=bbc",
    "trials": [{"method.rank": 2}, {"method.rank": 4, "optimizer.learning_rate": 1e-3}],
    "grid": {"seed": [0, 1], "train": {"steps": [10]}},
    "together": 2,
  }

  def prepare(self, folder: Path) -> None:
    (folder / "sweep.json").write_text(json.dumps(self._sweep))

  def damage(self, rng: random.Random, folder: Path) -> None:
    (folder / "sweep.json").write_text(json.dumps(damage.of_json(rng, self._sweep)))

  def read(self, folder: Path) -> Any:
    given = json.loads((folder / "sweep.json").read_text())
    return trials.expand(ConfigDict(given) if isinstance(given, dict) else given)

  def check(self, folder: Path, got: Any) -> str:
    given = json.loads((folder / "sweep.json").read_text())
    if not isinstance(given, dict) or any(key.startswith("zz_") for key in given):
      return "accepted, but it is no sweep"
    together = given.get("together", 1)
    if type(together) is not int or together < 1:
      return f"together={together!r} was accepted"
    for trial in got:
      flat = _flat(trial.config.to_dict())
      for path, value in flat.items():
        last = path.rpartition(".")[2]
        if last in RANGES and isinstance(value, int | float) and not RANGES[last](value):
          return f"{path}={value!r} was accepted"
    return ""


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(config, dict):
    return {prefix[:-1]: config}
  return {k: v for key, sub in config.items() for k, v in _flat(sub, f"{prefix}{key}.").items()}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
  nested: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split(".")
    node = nested
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = value
  return nested
