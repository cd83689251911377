"""PEFT directories of LoRA, against s·BA computed from the files."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from tests.fuzz import damage
from tests.fuzz.tensors import rewrite_header, unique

GOLDEN = Path(__file__).parents[1] / "golden"
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "inference_mode", "use_qalora")


class Adapter:
  name, share = "adapter", 14

  def __init__(self) -> None:
    self._seed = GOLDEN / "peft_query_value"
    self._base: Any = None

  def prepare(self, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
      shutil.copy(self._seed / name, folder)
    self._base = pj.load_pretrained(GOLDEN / "bert_tiny")

  def damage(self, rng: random.Random, folder: Path) -> None:
    config, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    kind = rng.randrange(8)
    if kind < 5:
      value = damage.of_json(rng, json.loads(config.read_text()))
      config.write_bytes(damage.dumps(rng, value))
    elif kind == 5:
      rewrite_header(rng, path)
    elif kind == 6:
      path.write_bytes(damage.of_bytes(rng, path.read_bytes()))
    else:
      tensors = load_file(path)
      for name in rng.sample(sorted(tensors), rng.choice((1, 2))):
        change = rng.randrange(4)
        if change == 0:
          del tensors[name]
        elif change == 1:
          tensors[name] = np.ascontiguousarray(tensors[name].T)
        elif change == 2:
          tensors[name] = tensors[name].astype(np.int32)
        else:
          tensors[name] = tensors[name][:-1]
      save_file(tensors, path)

  def read(self, folder: Path) -> Any:
    model, params = self._base
    return hf_peft.load(folder, params, model)[0]

  def check(self, folder: Path, got: Any) -> str:
    try:
      text = (folder / "adapter_config.json").read_bytes().decode("utf-8-sig")
      config = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
      return f"accepted, but {error!r}"
    if invented := [key for key in config if key.startswith("zz_")]:
      return f"the unknown field {invented[0]} was accepted"
    for flag in FLAGS:
      if type(config.get(flag, False)) is not bool and config.get(flag) is not None:
        return f"{flag}={config[flag]!r} was accepted"
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if type(rank) is not int or type(alpha) not in (int, float) or not math.isfinite(alpha):
      return f"r={rank!r}, lora_alpha={alpha!r} was accepted"
    tensors = load_file(folder / "adapter_model.safetensors")
    base = paths.leaves(self._base[1])
    try:
      patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
      for path, leaf in paths.leaves(pj.merge(got)).items():
        module = _module(path)
        a, b = (tensors.get(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
        if (a is None) != (b is None):
          return f"{module} has half an adapter"
        if path.startswith("head/") or not path.endswith("kernel"):
          continue
        want = np.asarray(base[path], np.float32)
        if a is not None:
          r = _match(patterns[0], module, rank)
          s = _match(patterns[1], module, alpha) / (math.sqrt(r) if config.get("use_rslora") else r)
          want = want + s * (b.astype(np.float32) @ a.astype(np.float32)).T
        elif _targeted(config["target_modules"], module):
          return f"{module} is a target and has no adapter"
        close = np.allclose(np.asarray(leaf), want, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not close and np.isfinite(want).all():
          return f"{path} is not W + s·BA"
    except (KeyError, TypeError, ZeroDivisionError, re.error) as error:
      return f"accepted, but {error!r}"
    return ""


def _module(path: str) -> str:
  """Torch's name of a module of `bert_tiny`."""
  name = re.sub(r"layers_(\d+)", r"layer.\1", path.rpartition("/")[0].replace("/", "."))
  return name


def _match(patterns: dict[str, Any], module: str, default: Any) -> Any:
  found = (x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
  return next(found, default)


def _targeted(targets: Any, module: str) -> bool:
  if isinstance(targets, str):
    return re.fullmatch(targets, module) is not None
  return any(module == t or module.endswith(f".{t}") for t in targets)
